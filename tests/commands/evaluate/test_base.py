"""Evaluate: a bare base is scored as by transformers, also next to the run that was trained from it; scores.json."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from t5tune.commands.evaluate import EvaluateResult, evaluate
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.progress import Note, Report, silent
from t5tune.settings import EvaluateSettings, PrepareSettings
from tests.support.caches import open_only
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow

FORMATS = ["file", "cache"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Orders as JSON on several lines, whose braces and newlines T5's vocabulary lacks."""
    path = tmp_path_factory.mktemp("orders") / "orders.jsonl"
    lines = []
    for number in range(16):
        target = json.dumps({"name": "Aida", "tea": number}, indent=2)
        lines.append(json.dumps({"source": f"{number} teas {{to}} Aida", "target": target}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def cache(untied_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orders") / "cache"
    prepare(PrepareSettings(model_name_or_path=str(untied_base), data_path=str(data), output_dir=folder))
    assert {"{", "}", "\n"} < set(open_only(folder).added_tokens)
    return folder


@pytest.fixture(scope="module")
def run(untied_base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orders") / "run"
    train(make_settings(untied_base, cache, folder, max_steps=4, learning_rate=0.1))
    return folder


def run_evaluate(model: Path, data: Path, output: Path, /, report: Report = silent, **changes: Any) -> EvaluateResult:
    values = {"model_name_or_path": str(model), "data_path": str(data), "output_dir": output, "use_cpu": True}
    return evaluate(EvaluateSettings(**{**values, "max_new_tokens": 4, **changes}), report)


def read_lines(result: EvaluateResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.predictions.read_text(encoding="utf-8").splitlines()]


def measure_with_transformers(base: Path, data: Path) -> list[tuple[float, int]]:
    """Return the sum of each target's losses in fp64, in nats, and its number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSeq2SeqLM.from_pretrained(base).double().eval()
    found = []
    for pair in map(json.loads, data.read_text().splitlines()):
        labels = tokenizer(pair["target"], return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(**tokenizer(pair["source"], return_tensors="pt"), labels=labels).loss
        found.append((float(loss) * labels.shape[1], labels.shape[1]))
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_a_bare_base_is_scored_as_by_transformers(
    kind: str, untied_base: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    result = run_evaluate(untied_base, data if kind == "file" else cache, tmp_path / "scores")
    expected = measure_with_transformers(untied_base, data)
    total, tokens = map(sum, zip(*expected, strict=True))
    assert result.loss == pytest.approx(total / tokens, abs=1e-6)
    lines = read_lines(result)
    assert [line["loss"] for line in lines] == pytest.approx([loss / count for loss, count in expected], abs=2e-6)
    targets = [json.loads(line)["target"] for line in data.read_text().splitlines()]
    assert [line["target"] for line in lines] == targets
    assert result.bits_per_character == pytest.approx(total / math.log(2) / sum(map(len, targets)), abs=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_compare_base_scores_both_on_the_same_texts(
    kind: str, run: Path, untied_base: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    given = data if kind == "file" else cache
    both = run_evaluate(run, given, tmp_path / "both", compare_base=True)
    tuned, base = (run_evaluate(model, given, tmp_path / model.name) for model in (run, untied_base))
    assert both.base is not None
    assert (both.base["loss"], both.base["bits_per_character"]) == (base.loss, base.bits_per_character)
    assert (both.loss, both.bits_per_character) == (tuned.loss, tuned.bits_per_character)
    for line, with_adapter, without in zip(read_lines(both), read_lines(tuned), read_lines(base), strict=True):
        of_base = {f"base_{name}": without[name] for name in ("prediction", "logprob", "probability", "loss")}
        assert line == with_adapter | of_base
    losses = [loss for loss, _ in measure_with_transformers(untied_base, data)]
    characters = sum(len(line["target"]) for line in read_lines(both))
    assert both.base["bits_per_character"] == pytest.approx(sum(losses) / math.log(2) / characters, abs=1e-5)


def test_an_untrained_run_differs_from_its_base_by_tokens(untied_base: Path, tmp_path: Path) -> None:
    """Without a token that training adds in the texts, both have the same loss."""
    (tmp_path / "plain.csv").write_text("source,target\n" + "".join(f"say {n},it is {n}\n" for n in range(8)))
    train(make_settings(untied_base, tmp_path / "plain.csv", tmp_path / "run", max_steps=1, learning_rate=0))
    result = run_evaluate(tmp_path / "run", tmp_path / "plain.csv", tmp_path / "scores", compare_base=True)
    assert result.base is not None
    assert (result.loss, result.bits_per_character) == (result.base["loss"], result.base["bits_per_character"])


def test_targets_that_a_vocabulary_cannot_write_are_counted(run: Path, tmp_path: Path) -> None:
    """The base has no `{`, which training added; neither has the second letter."""
    (tmp_path / "data.csv").write_text("source,target\na,{ b }\na,ꙮ\na,plain\n" + f"a,{'long ' * 30}\n")
    notes: list[str] = []
    run_evaluate(
        run, tmp_path / "data.csv", tmp_path / "scores", compare_base=True, model_max_length=16,
        report=lambda event: notes.append(event.text) if isinstance(event, Note) and event.warning else None,
    )  # fmt: skip
    texts = "targets are truncated or have characters that"
    assert [note for note in notes if "bits_per_character" in note] == [
        f"{whose}'s bits_per_character: {count} of 4 {texts} {whose}'s vocabulary lacks, so it can't be compared "
        "between models"
        for whose, count in (("the model", 2), ("the base", 3))
    ]


def test_several_datasets_are_compared_on_the_same_texts(
    run: Path, untied_base: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    paths = [f"{data}:1", f"{cache}:1"]
    result = run_evaluate(run, data, tmp_path / "scores", data_path=paths, compare_base=True)
    base = run_evaluate(untied_base, data, tmp_path / "base")
    assert result.datasets is not None
    for scores in result.datasets.values():
        assert scores["base_loss"] == base.loss
        assert scores["base_bits_per_character"] == base.bits_per_character != scores["bits_per_character"]


def test_scores_json_has_all_that_is_printed_and_the_settings(run: Path, data: Path, tmp_path: Path) -> None:
    given = ("--model-name-or-path", run, "--data-path", data, "--num-data", 6, "--max-new-tokens", 4, "--compare-base")
    done = t5tune_in_fork("evaluate", *given, "--output-dir", tmp_path / "scores", "--use-cpu", "--json")
    assert done.code == 0, done.stderr
    saved = json.loads((tmp_path / "scores" / "scores.json").read_text())
    settings = saved.pop("settings")
    assert saved == done.json
    assert settings == {
        "model_name_or_path": str(run), "adapter": None, "data_path": [str(data)], "num_data": 6, "max_new_tokens": 4,
        "num_beams": 1, "bf16": False, "q_lora": False, "compare_base": True, "use_cpu": True,
        "output_dir": str(tmp_path / "scores"),
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {
        "scores.json", "predictions.jsonl", "settings.yaml"
    }  # fmt: skip
