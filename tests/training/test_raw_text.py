"""Training on raw text: each epoch masks different spans, resuming is exact, and scores equal evaluate's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.evaluate import evaluate
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.errors import SettingsError
from t5tune.progress import Note
from t5tune.settings import EvaluateSettings, PrepareSettings, TrainSettings
from tests.support.caches import open_only
from tests.support.processes.command_line import OnRanks
from tests.support.processes.runs import read_adapter
from tests.support.prose import english_text
from tests.support.train_runs import run_recorded, write_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    paragraphs = [part for part in english_text().split("\n\n") if len(part) > 200][:20]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs))
    return path


def make_settings(base: Path, text: Path, run: Path, /, **changes: Any) -> TrainSettings:
    values = {
        "model_name_or_path": str(base), "data_path": [text], "output_dir": run, "objective": "span-corruption",
        "model_max_length": 64, "num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "report_samples": 0, "use_cpu": True,
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})


@pytest.mark.long
@pytest.mark.distributed
def test_each_epoch_masks_other_spans_on_any_number_of_ranks(
    untied_base: Path, text: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    steps = {}
    for ranks in (1, 2):
        size = {"packing": "off", "gradient_accumulation_steps": 2 // ranks}
        settings = make_settings(untied_base, text, tmp_path / f"run-{ranks}", seed=5, **size)
        steps[ranks] = run_recorded(on_ranks, ranks, settings, tmp_path / f"steps-{ranks}")
    assert steps[1] == steps[2]
    cache = open_only(tmp_path / "run-1" / "data")
    per_epoch = len(steps[1]) // 3
    for epoch in range(3):
        targets = [row for step in list(steps[1])[epoch * per_epoch :][:per_epoch] for row in steps[1][step]]
        expected = [cache.read(index, repeat=epoch).target_T.tolist() for index in range(len(cache))]
        assert sorted(targets) == sorted(expected)
    first, second = ([cache.read(index, epoch).target_T.tolist() for index in range(len(cache))] for epoch in (0, 1))
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 0.9 * len(cache)


@pytest.mark.long
@pytest.mark.parametrize("batching", [{"tokens_per_batch": 512}, {"packing": "off"}])
def test_a_run_stopped_halfway_resumes_to_equal_bits(
    batching: dict[str, Any], untied_base: Path, text: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    settings = make_settings(untied_base, text, tmp_path / "whole", denoisers=["ul2"], **batching)
    whole = train(settings)
    config = write_config(settings.replace(output_dir=tmp_path / "run"), tmp_path / "run.yaml")
    step = whole.steps // 2
    stopped = on_ranks(1, "train", "--config", config, calls=[f"tests.support.ranks.faults:stop_in_step({step})"])
    assert stopped.code == 143, stopped.stderr[-3000:]
    assert on_ranks(1, "train", "--config", config).code == 0
    assert read_adapter(tmp_path / "whole") == read_adapter(tmp_path / "run")


def test_a_raw_text_mixture_has_the_losses_of_separate_evaluations(
    untied_base: Path, text: Path, conversations: Path, tmp_path: Path
) -> None:
    parts = {
        "text": {"path": str(text), "name": "text", "objective": "span-corruption"},
        "chats": {"path": str(conversations), "name": "chats"},
    }
    settings = make_settings(
        untied_base, text, tmp_path / "run", data_path=None, objective="sft", data=list(parts.values()),
        eval_data=[{**part, "num_data": 20} for part in parts.values()], num_train_epochs=1,
    )  # fmt: skip
    result = train(settings)
    for name, data, objective in (("text", text, "span-corruption"), ("chats", conversations, "sft")):
        separate = evaluate(
            EvaluateSettings(
                model_name_or_path=str(result.run), data_path=[data], num_data=20, objective=objective, use_cpu=True,
                output_dir=tmp_path / name, model_max_length=64, max_new_tokens=1, conversation_template=name,
            )
        )  # fmt: skip
        assert result.datasets[name]["loss"] == pytest.approx(separate.loss, abs=1e-5)
        assert separate.examples == 20


def test_raw_text_is_evaluated_with_the_masks_of_training(untied_base: Path, text: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"dialogue": "Count to two.", "summary": "One, two."}))
    columns = {"source_column": "dialogue", "target_column": "summary", "source_prefix": "summarize: "}
    on_pairs = make_settings(untied_base, pairs, tmp_path / "pairs", objective="sft", max_steps=1, **columns)
    on_text = make_settings(untied_base, text, tmp_path / "text", denoisers=["ul2-x"], max_steps=1)

    def measure(run: Path, output: str, **changes: Any) -> tuple[float, list[str]]:
        notes: list[str] = []
        values = {"data_path": [text], "objective": "span-corruption", "model_max_length": 64, "max_new_tokens": 1}
        settings = EvaluateSettings(
            model_name_or_path=str(run), use_cpu=True, output_dir=tmp_path / output, **{**values, **changes}
        )
        result = evaluate(settings, lambda event: notes.append(event.text) if isinstance(event, Note) else None)
        return result.loss, [note for note in notes if note.startswith("as in training: ") and "bf16" not in note]

    assert measure(train(on_pairs).run, "a")[1] == []
    run = train(on_text).run
    loss, notes = measure(run, "b")
    assert notes == ["as in training: denoisers ul2-x"]
    assert measure(run, "c", denoisers=["ul2-x"]) == (loss, [])
    assert measure(run, "d", denoisers=["t5"])[0] != loss
    lines = [json.loads(line) for line in (tmp_path / "b" / "predictions.jsonl").read_text().splitlines()]
    assert all("<extra_id_0>" in line["source"] and line["target"].startswith("<extra_id_0>") for line in lines)
    assert not any("</s>" in line["source"] + line["target"] for line in lines)
    changes = {"data_path": [pairs], "objective": "sft", "source_column": "dialogue", "target_column": "summary"}
    assert measure(run, "e", **changes)[1] == []


def test_raw_text_is_evaluated_with_the_family_of_training(untied_base: Path, text: Path, tmp_path: Path) -> None:
    base = shutil.copytree(untied_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "strange_t5"}))
    run = train(make_settings(base, text, tmp_path / "run", family="t5", max_steps=1)).run
    settings = EvaluateSettings(
        model_name_or_path=str(run), data_path=[text], objective="span-corruption", num_data=2, max_new_tokens=1,
        use_cpu=True, output_dir=tmp_path / "scores",
    )  # fmt: skip
    assert evaluate(settings).examples == 2


def test_a_run_refuses_a_cache_with_different_masks(untied_base: Path, text: Path, tmp_path: Path) -> None:
    values = {"model_name_or_path": str(untied_base), "objective": "span-corruption", "model_max_length": 64}
    prepared = PrepareSettings(**values, data_path=[text], output_dir=tmp_path / "cache", seed=1)
    prepare(prepared)
    settings = TrainSettings(
        model_name_or_path=str(untied_base), data_path=[tmp_path / "cache"], output_dir=tmp_path / "run", use_cpu=True,
        max_steps=1, report_samples=0,
    )  # fmt: skip
    train(settings)
    (tmp_path / "run" / "result.json").unlink()
    longer = settings.replace(max_steps=2, allow_change=["max_steps"])
    prepare(prepared.replace(seed=2))
    with pytest.raises(SettingsError, match="data: .* before, .* now"):
        train(longer)
    prepare(prepared)
    assert train(longer).steps == 2
