"""Runs on preference pairs and with a teacher: ranks, ZeRO, resuming, the reference, evaluations, and refusals."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM

from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.data.caches.prepared import open_examples
from t5tune.data.tokens.tokenizer import decode_reference, load_tokenizer
from t5tune.errors import CheckpointError, SettingsError, Stopped
from t5tune.progress import Advanced, Event, Note
from t5tune.settings import EvaluateSettings, MergeSettings, PrepareSettings, TrainSettings
from t5tune.training import reference as reference_module
from t5tune.training.reference import ReferenceFile
from tests.support.caches import open_only
from tests.support.models.model_types import make_checkpoint
from tests.support.processes.command_line import OnRanks
from tests.support.processes.runs import read_adapter, stop_at
from tests.support.train_runs import make_settings as make_run_settings
from tests.support.train_runs import read_losses, read_metrics_lines, read_steps

pytestmark = pytest.mark.slow

LOG_2 = math.log(2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pairs: the better answer is the sum alone, the worse one is a sentence."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rng = np.random.default_rng(3)
    lines = []
    for one, other in rng.integers(0, 9, (48, 2)).tolist():
        better, worse = f"{one + other}.", f"I think it is about {one * other + 1}, but who can tell"
        lines.append(json.dumps({"prompt": f"What is {one} plus {other}?", "chosen": better, "rejected": worse}))
    path.write_text("\n".join(dict.fromkeys(lines)))
    return path


def make_settings(base: Path, data: Path, run: Path, **changes: Any) -> TrainSettings:
    return make_run_settings(base, data, run, **{"objective": "dpo", "eval_fraction": 0.25, "eval_steps": 3} | changes)


def read_evaluations(run: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics_lines(run) if "eval_loss" in line]


def read_reference(run: Path, name: str) -> np.ndarray[Any, Any]:
    return safetensors.numpy.load_file(run / f"reference-{name}.safetensors")["logps"]


def compute_log_probabilities(folder: Path, cache: Path) -> torch.Tensor:
    """Compute the answers' log-probabilities with stock transformers in fp64, an answer at a time: (pairs, 2)."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).double().eval()
    found = []
    for pair in open_only(cache):
        source = torch.from_numpy(pair.source_S)[None]
        for target in map(torch.from_numpy, pair.targets):
            with torch.inference_mode():
                logits = model(input_ids=source, decoder_input_ids=functional.pad(target[None, :-1], (1, 0))).logits[0]
            found.append(functional.log_softmax(logits, -1).gather(1, target[:, None]).sum())
    return torch.stack(found).view(-1, 2)


@pytest.fixture(scope="module")
def run(untied_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DPO in one process."""
    folder = tmp_path_factory.mktemp("dpo") / "run"
    train(make_settings(untied_base, data, folder))
    return folder


def test_the_loss_begins_at_log_2_with_trl_metric_names(run: Path) -> None:
    steps, evaluations = read_steps(run), read_evaluations(run)
    assert steps[0]["loss"] == pytest.approx(LOG_2, abs=1e-7)
    assert steps[-1]["loss"] < 0.9 * LOG_2
    names = [f"{group}/{which}" for group in ("rewards", "logps") for which in ("chosen", "rejected")]
    for name in (*names, "rewards/accuracies", "rewards/margins"):
        assert all(name in line for line in steps)
        assert all(f"eval_{name}" in line for line in evaluations)
    for line in steps:
        margin = line["rewards/chosen"] - line["rewards/rejected"]
        assert line["rewards/margins"] == pytest.approx(margin, abs=1e-9)
    assert evaluations[-1]["eval_rewards/accuracies"] == 1
    result = json.loads((run / "result.json").read_text())
    assert result["eval"]["rewards/accuracies"] == 1
    page = (run / "report.html").read_text()
    assert "rewards/margins" in page


def test_the_reference_equals_stock_transformers(run: Path, untied_base: Path, data: Path) -> None:
    stock = compute_log_probabilities(untied_base, run / "data")
    parts = open_examples(run / "data").split(0.25, 42)
    for name, part in zip(("training", "held-out"), parts, strict=True):
        found = read_reference(run, name)
        indices = [part.name_example(index) for index in range(len(part))]
        np.testing.assert_allclose(found, stock[indices].numpy(), rtol=0, atol=2e-4)


def test_held_out_metrics_equal_the_merged_model(run: Path, untied_base: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge(MergeSettings(model_name_or_path=str(untied_base), adapter=run, output_dir=merged, verify=False))
    before, after = (compute_log_probabilities(folder, run / "data") for folder in (untied_base, merged))
    _, held_out = open_examples(run / "data").split(0.25, 42)
    indices = [held_out.name_example(index) for index in range(len(held_out))]
    rewards = 0.1 * (after - before)[indices]
    margins = rewards[:, 0] - rewards[:, 1]
    last = read_evaluations(run)[-1]
    assert last["eval_loss"] == pytest.approx(float(-functional.logsigmoid(margins).mean()), abs=1e-4)
    assert last["eval_rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-3)
    assert last["eval_logps/chosen"] == pytest.approx(float(after[indices, 0].mean()), abs=1e-3)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
@pytest.mark.parametrize(
    "options", [["--packing=off"], ["--num-processes=2"], ["--num-processes=2", "--deepspeed=zero2"],
                ["--num-processes=2", "--deepspeed=zero3", "--gradient-checkpointing"]],
    ids=["padded", "two ranks", "zero2", "zero3"],
)  # fmt: skip
@pytest.mark.variants("zero3-dpo", "padded-orpo")
def test_each_way_has_the_losses_of_one_process(
    options: list[str], objective: str, untied_base: Path, data: Path, tmp_path: Path,
    on_ranks: OnRanks,
) -> None:  # fmt: skip
    ranks = 2 if "--num-processes=2" in options else 1
    arguments = [
        "train", f"--model-name-or-path={untied_base}", f"--data-path={data}", f"--objective={objective}",
        "--max-steps=5", "--learning-rate=1e-2", "--logging-steps=1", "--use-cpu", "--report-samples=0",
        "--eval-fraction=0.25", "--eval-steps=5", "--gradient-accumulation-steps=2",
    ]  # fmt: skip
    runs = tmp_path / "one", tmp_path / "other"
    done = on_ranks(1, *arguments, f"--output-dir={runs[0]}", "--per-device-train-batch-size=4")
    assert done.code == 0, done.stderr
    others = [option for option in options if not option.startswith("--num-processes")]
    done = on_ranks(
        ranks, *arguments, f"--output-dir={runs[1]}", f"--per-device-train-batch-size={4 // ranks}", *others
    )
    assert done.code == 0, done.stderr
    np.testing.assert_allclose(read_losses(runs[1]), read_losses(runs[0]), rtol=2e-4)
    one, other = (read_evaluations(each)[-1] for each in runs)
    for name in (name for name in one if "eval_" in name and "second" not in name and name != "eval_runtime"):
        assert other[name] == pytest.approx(one[name], rel=2e-3, abs=2e-4), name
    if objective == "dpo":
        for name in ("training", "held-out"):
            found, expected = (read_reference(each, name) for each in reversed(runs))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"packing": "off", "tokens_per_batch": 300}, {"q_lora": True, "dropout": True}]
)
@pytest.mark.variants("options2")
def test_a_run_that_is_stopped_ends_with_the_same_bits(
    options: dict[str, Any], untied_base: Path, data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "whole", tmp_path / "stopped"
    train(make_settings(untied_base, data, runs[0], **options))
    settings = make_settings(untied_base, data, runs[1], **options)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 4)))
    before = (runs[1] / "reference-training.safetensors").stat().st_mtime_ns
    train(settings)
    assert read_adapter(runs[0]) == read_adapter(runs[1])
    assert read_losses(runs[1]) == read_losses(runs[0])
    assert (runs[1] / "reference-training.safetensors").stat().st_mtime_ns == before


def test_a_run_is_stopped_within_the_reference_and_continues_there(
    untied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_module, "PAIRS_PER_SAVE", 8)
    write = ReferenceFile.write
    written: list[int] = []

    def stop_after_two(self: ReferenceFile, pairs: Any) -> None:
        write(self, pairs)
        written.append(len(pairs))
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ReferenceFile, "write", stop_after_two)
    settings = make_settings(untied_base, data, tmp_path / "run")
    with pytest.raises(Stopped, match="before training began"):
        train(settings)
    assert len(read_reference(tmp_path / "run", "training")) == 16
    train(settings)
    whole = len(read_reference(tmp_path / "run", "training"))
    assert whole > 24
    assert written[:3] == [8, 16, 24]
    monkeypatch.undo()
    train(make_settings(untied_base, data, tmp_path / "other"))
    for name in ("training", "held-out"):
        found, expected = (read_reference(tmp_path / each, name) for each in ("run", "other"))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


VARIANTS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq", "q_lora": True},
    "full": {"train_mode": "full"},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.variants("adapter", "pissa", "full")
def test_the_reference_is_the_model_before_training(
    variant: str, run: Path, untied_base: Path, data: Path, tmp_path: Path
) -> None:
    options = dict(VARIANTS[variant])
    if variant == "adapter":
        options["adapter"] = run
    train(make_settings(untied_base, data, tmp_path / "next", **options))
    first = read_steps(tmp_path / "next")[0]
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-6 if variant != "bf16" else 1e-3)
    found = read_reference(tmp_path / "next", "training")
    differs = np.abs(found - read_reference(run, "training")).max() > 1e-2
    assert differs == (variant in ("adapter", "loftq", "bf16"))


def test_an_adapter_can_be_the_reference(run: Path, untied_base: Path, data: Path, tmp_path: Path) -> None:
    same = make_settings(untied_base, data, tmp_path / "same", adapter=run, reference_adapter=run)
    for name, changes, tolerance in (("same", {}, 1e-6), ("bf16", {"bf16": True, "eval_steps": None}, 1e-4)):
        train(same.replace(output_dir=tmp_path / name, max_steps=1, **changes))
        assert read_losses(tmp_path / name)[0] == pytest.approx(LOG_2, abs=tolerance)
    train(make_settings(untied_base, data, tmp_path / "other", reference_adapter=run))
    steps = read_steps(tmp_path / "other")
    assert steps[0]["rewards/chosen"] < 0 < steps[0]["rewards/rejected"]
    found, continued = (read_reference(tmp_path / each, "training") for each in ("other", "same"))
    np.testing.assert_array_equal(found, continued)


def test_a_reference_of_other_inputs_is_replaced(
    untied_base: Path, tied_base: Path, data: Path, tmp_path: Path
) -> None:
    def read_key(folder: Path, name: str) -> str:
        with safetensors.safe_open(folder / f"reference-{name}.safetensors", "numpy") as file:
            return file.metadata()["key"]

    folder = tmp_path / "run"
    train(make_settings(untied_base, data, folder, max_steps=2))
    keys = {name: read_key(folder, name) for name in ("training", "held-out")}
    assert len(set(keys.values())) == 2
    before = {name: read_reference(folder, name) for name in keys}
    for name in keys:  # replace the files by files of a different run
        path = folder / f"reference-{name}.safetensors"
        saved = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file({"logps": saved["logps"] - 7}, path, {"format": "1", "key": "0"})
    (folder / "result.json").unlink()
    train(make_settings(untied_base, data, folder, max_steps=4, allow_change=["max_steps"]))
    assert {name: read_key(folder, name) for name in keys} == keys
    (folder / "reference-held-out.safetensors").write_bytes(b"broken")
    (folder / "result.json").unlink()
    train(make_settings(untied_base, data, folder, max_steps=5, allow_change=["max_steps"]))
    assert read_key(folder, "held-out") == keys["held-out"]
    for name, logps in before.items():
        np.testing.assert_array_equal(read_reference(folder, name), logps)


def test_changed_log_probabilities_are_reported_and_measured_again(
    untied_base: Path, data: Path, tmp_path: Path
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train(make_settings(untied_base, data, whole))
    with pytest.raises(Stopped):
        train(make_settings(untied_base, data, folder), stop_at(Advanced("train", 2)))
    expected = read_reference(folder, "training")
    for name, change in (("training", lambda logps: logps - 7), ("held-out", lambda logps: logps * np.nan)):
        path = folder / f"reference-{name}.safetensors"
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata()
        safetensors.numpy.save_file({"logps": change(read_reference(folder, name))}, path, metadata)
    events: list[Event] = []
    train(make_settings(untied_base, data, folder), events.append)
    notes = [event.text.partition(":") for event in events if isinstance(event, Note)]
    changed = [path for path, _, problem in notes if "changed since it was written" in problem]
    assert changed == [str(folder / f"reference-{name}.safetensors") for name in ("training", "held-out")]
    np.testing.assert_array_equal(read_reference(folder, "training"), expected)
    assert read_adapter(whole) == read_adapter(folder)


def test_caches_of_pairs_are_for_both_objectives(untied_base: Path, data: Path, tmp_path: Path) -> None:
    """Without an objective, a run has the objective of its caches."""
    values: dict[str, Any] = {"model_name_or_path": str(untied_base), "num_workers": 1, "data_path": str(data)}
    for name, objective in (("pairs", "dpo"), ("plain", "sft")):
        prepare(PrepareSettings(**values, output_dir=tmp_path / name, objective=objective, add_tokens="none"))
    pairs, plain = tmp_path / "pairs", tmp_path / "plain"
    changes = {"objective": "orpo", "max_steps": 1, "eval_fraction": 0, "eval_steps": None}
    given = make_settings(untied_base, pairs, tmp_path / "orpo", **changes)
    train(given)
    assert "nll_loss" in read_steps(tmp_path / "orpo")[0]
    unset = {name: getattr(given, name) for name in given.model_fields_set - {"objective", "data"}}
    for name, paths in (("one", [pairs]), ("mixture", [f"{pairs}:1"])):
        train(TrainSettings(**unset | {"output_dir": tmp_path / name, "data_path": paths}))
        assert read_losses(tmp_path / name)[0] == pytest.approx(LOG_2, abs=1e-6)
    assert "objective: dpo" in (tmp_path / "mixture" / "settings.yaml").read_text()
    for objective, path, found in (("sft", pairs, "dpo"), ("orpo", plain, "sft"), ("dpo", f"{plain}:1", "sft")):
        refused = unset | {"objective": objective, "data_path": [path], "output_dir": tmp_path / "refused"}
        with pytest.raises(SettingsError, match=f"objective: '{objective}' here, '{found}' in the cache .*; leave it"):
            train(TrainSettings(**refused))


def test_the_best_checkpoint_is_chosen_by_a_reward(untied_base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    best = {"metric_for_best_model": "eval_rewards/margins", "eval_steps": 1, "save_steps": 1}
    train(make_settings(untied_base, data, folder, **best))
    margins = {line["step"]: line["eval_rewards/margins"] for line in read_evaluations(folder)}
    largest = max(margins, key=margins.__getitem__)
    found = (folder / f"checkpoint-{int(largest)}" / "adapter_model.safetensors").read_bytes()
    assert (folder / "adapter_model.safetensors").read_bytes() == found


@pytest.fixture(scope="module")
def teacher(untied_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of supervised fine-tuning."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(make_settings(untied_base, data, folder, objective="sft", eval_fraction=0, eval_steps=None))
    return folder


def make_student(base: Path, data: Path, run: Path, teacher: Path, **changes: Any) -> TrainSettings:
    values = {"teacher_model_name_or_path": teacher, "objective": "sft", "eval_fraction": 0, "eval_steps": None}
    return make_settings(base, data, run, **values | changes)


def test_a_student_comes_near_its_teacher(untied_base: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    settings = make_student(
        untied_base, data, tmp_path / "run", teacher, distillation_alpha=1.0, max_steps=40, dropout=False
    )
    train(settings)
    steps = read_steps(tmp_path / "run")
    assert steps[-1]["kl"] < 0.5 * steps[0]["kl"]
    assert steps[0]["loss"] == pytest.approx(4 * steps[0]["kl"], rel=1e-5)


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("zero", [[], ["--deepspeed=zero3"]], ids=["ddp", "zero3"])
@pytest.mark.variants("zero3")
def test_two_ranks_distill_as_one_process(
    zero: list[str], base_without_dropout: Path, data: Path, teacher: Path, tmp_path: Path,
    on_ranks: OnRanks,
) -> None:  # fmt: skip
    train(make_student(base_without_dropout, data, tmp_path / "one", teacher, lora_dropout=0.0))
    done = on_ranks(
        2, "train", f"--model-name-or-path={base_without_dropout}", f"--data-path={data}", "--max-steps=6",
        f"--output-dir={tmp_path / 'two'}", "--learning-rate=1e-2", "--logging-steps=1", "--use-cpu",
        "--report-samples=0", "--per-device-train-batch-size=2", "--lora-dropout=0",
        f"--teacher-model-name-or-path={teacher}", *zero,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    np.testing.assert_allclose(read_losses(tmp_path / "two"), read_losses(tmp_path / "one"), rtol=2e-4)
    assert [line["kl"] for line in read_steps(tmp_path / "two")] == pytest.approx(
        [line["kl"] for line in read_steps(tmp_path / "one")], rel=2e-3
    )


def test_a_run_with_a_teacher_resumes_to_equal_bits(
    untied_base: Path, data: Path, teacher: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "whole", tmp_path / "stopped"
    train(make_student(untied_base, data, runs[0], teacher, teacher_q_lora=True))
    settings = make_student(untied_base, data, runs[1], teacher, teacher_q_lora=True)
    with pytest.raises(Stopped):
        train(settings, stop_at(Advanced("train", 4)))
    with pytest.raises(SettingsError, match="teacher: "):
        train(settings.replace(teacher_model_name_or_path=str(untied_base)))
    train(settings)
    assert read_adapter(runs[0]) == read_adapter(runs[1])


def test_a_teacher_with_other_tokens_is_refused(tied_base: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    base = make_checkpoint("t5", tmp_path / "t5")
    with pytest.raises(SettingsError, match="teacher_model_name_or_path: .*: the tokenizers differ: .*token"):
        train(make_student(base, data, tmp_path / "run", teacher))
    with pytest.raises(
        SettingsError, match="has id .*, but the teacher's tokenizer lacks it"
    ):  # the base lacks the added tokens
        train(make_student(tied_base, data, tmp_path / "two", tied_base))
    with pytest.raises(SettingsError, match="in the teacher's tokenizer, but this run's lacks it; .*add_tokens"):
        train(make_student(tied_base, data, tmp_path / "three", teacher, add_tokens="none"))


def test_predictions_can_be_targets_of_a_student(
    untied_base: Path, data: Path, teacher: Path, conversations: Path, tmp_path: Path
) -> None:
    """The prompts in predictions.jsonl become the sources that the teacher has read, with its template."""
    for name, path in (("texts", data), ("chats", conversations)):
        options: dict[str, Any] = {"model_name_or_path": str(teacher), "data_path": str(path), "use_cpu": True}
        evaluate(EvaluateSettings(**options, output_dir=tmp_path / name, max_new_tokens=6, num_data=20))
        file = tmp_path / name / "predictions.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [line for line in lines if line["prediction"].strip()]
        values: dict[str, Any] = {
            "model_name_or_path": str(untied_base), "data_path": str(file), "num_workers": 1, "source_column": "prompt",
            "conversation_template": str(teacher / "template.yaml"), "add_tokens": "auto",
        }  # fmt: skip
        prepare(PrepareSettings(**values, target_column="prediction", output_dir=tmp_path / f"{name}-sft"))
        written = open_only(tmp_path / f"{name}-sft")
        tokenizer = load_tokenizer(written.tokenizer_folder)
        sources = [decode_reference(tokenizer, example.source_S, "") for example in written]
        assert {line["source"] for line in kept} <= {*sources}
        columns = {"target_column": "target", "rejected_column": "prediction", "objective": "dpo"}
        prepare(PrepareSettings(**values, **columns, output_dir=tmp_path / f"{name}-pairs"))
        wrong = [line for line in kept if line["prediction"] != line["target"]]
        assert len(open_only(tmp_path / f"{name}-pairs")) == len(wrong) > 10


def test_a_reference_without_the_run_s_tokens_is_refused(untied_base: Path, data: Path, tmp_path: Path) -> None:
    plain = make_settings(untied_base, data, tmp_path / "plain", objective="sft", add_tokens="none", max_steps=1)
    train(plain.replace(eval_fraction=0, eval_steps=None))
    with pytest.raises(CheckpointError, match="reference_adapter: .*: its tokenizer lacks .*, which this run adds"):
        train(make_settings(untied_base, data, tmp_path / "run", reference_adapter=tmp_path / "plain"))
