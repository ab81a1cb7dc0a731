"""Training in one process and in two: what is loaded, trained, logged and saved, and how runs resume."""

import functools
import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.plan import plan
from t5tune.commands.prepare import prepare
from t5tune.commands.train import set_up_run_folder, train
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import TrainingError
from t5tune.progress import Advanced, Evaluated, Event, Finished, Measured, Note, Started
from t5tune.runs.result import read_result
from t5tune.settings import ExportSettings, MergeSettings, PlanSettings, PrepareSettings, TrainSettings
from t5tune.training.trainer import T5Trainer
from tests.commands.train.commands import make_command
from tests.support.models.bases import make_base
from tests.support.processes.command_line import CommandResult, t5tune_in_fork
from tests.support.train_runs import make_settings, read_losses, read_metrics_lines


@pytest.mark.slow
def test_loss_falls_and_the_result_counts_steps_and_tokens(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    assert read_losses(finished_run)[-1] < read_losses(finished_run)[0]
    assert result["steps"] == 6
    assert result["world_size"] == 1
    assert result["tokens"] > 0
    assert result["eval"]["loss"] > 0
    assert 0 < result["trainable_parameters"] < result["total_parameters"]
    lines = [line for line in read_metrics_lines(finished_run) if "loss" in line]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch"} <= set(lines[0])


def test_plain_peft_loads_a_run_folders_adapter(finished_run: Path, untied_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM

    weights = load_file(finished_run / "adapter_model.safetensors")
    assert all(bool(value.any()) for name, value in weights.items() if "lora_B" in name)
    base = AutoModelForSeq2SeqLM.from_pretrained(untied_base)
    shared = base.shared.weight.detach().clone()
    model = PeftModel.from_pretrained(base, str(finished_run))
    assert torch.equal(base.shared.weight, shared)
    loaded = {name.replace(".default", ""): value for name, value in model.state_dict().items() if ".default" in name}
    for name, value in weights.items():
        assert torch.equal(loaded[name], value), name


def test_model_cards_report_data_settings_and_held_out_metrics(
    finished_run: Path, untied_base: Path, tmp_path: Path
) -> None:
    result = json.loads((finished_run / "result.json").read_text())
    training, held_out = open_examples(finished_run / "data").split(0.2, 42)
    source, target = (sum(len(getattr(each, side)) for each in training) for side in ("source_S", "target_T"))
    data = f"Data: {result['examples']} examples from 19 conversations, {source:,} source and {target:,} target tokens"
    mixture = json.loads((finished_run / "data" / "mixture.json").read_text())
    assert (mixture["examples"], mixture["held_out_examples"]) == (result["examples"], len(held_out))
    card = (finished_run / "README.md").read_text()
    assert data in card
    assert "learning_rate 0.01, per_device_train_batch_size 4" in card
    metrics = f"Trained for 6 steps.\nEvaluation on held-out data: loss {result['eval']['loss']:.4g}"
    assert metrics in card
    card_of_a_step = (finished_run / "checkpoint-3" / "README.md").read_text()
    assert "held-out data" not in card_of_a_step  # the metrics belong to the end of the run
    export(ExportSettings(checkpoint=finished_run / "checkpoint-3", output_dir=tmp_path / "exported"))
    assert data in (tmp_path / "exported" / "README.md").read_text()
    values = {"model_name_or_path": str(untied_base), "adapter": finished_run, "output_dir": tmp_path / "merged"}
    merge(MergeSettings.model_validate(values | {"verify": False}))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert data in card
    assert metrics in card
    assert f"from the adapter `{finished_run}`." in card
    for number, (adapters, weights, named) in enumerate(
        (
            ([finished_run], [0.5], f"from the adapter `{finished_run}` (weight 0.5)."),
            (
                [finished_run, tmp_path / "exported"],
                [1, 0.25],
                f"from the adapters `{finished_run}` (weight 1), `{tmp_path}/exported` (weight 0.25).",
            ),
        )
    ):
        other = {"adapter": adapters, "weights": weights, "output_dir": tmp_path / f"sum{number}"}
        merge(MergeSettings.model_validate(values | other | {"verify": False}))
        card = (tmp_path / f"sum{number}" / "README.md").read_text()
        assert named in card
        assert "held-out data" not in card  # the metrics are the adapters', not the sum's


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{}, {"packing": "off"}, {"q_lora": True, "bf16": False}], ids=["packed", "padded", "nf4"]
)
def test_one_process_trains_on_one_gpu_however_many_are_visible(
    more: dict[str, Any], untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    alone = train(make_settings(untied_base, conversations, tmp_path / "one", max_steps=2, **more))
    choose_device = TrainingArguments._setup_devices.func

    def choose_among_four(self: TrainingArguments) -> torch.device:
        device = choose_device(self)
        self._n_gpu = 4  # as on a machine where torch.cuda.device_count() is 4
        return device

    patched = functools.cached_property(choose_among_four)
    patched.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", patched)
    among_four = train(make_settings(untied_base, conversations, tmp_path / "four", max_steps=2, **more))
    assert among_four.tokens == alone.tokens
    for name in ("loss", "grad_norm"):
        one, four = ([line.get(name) for line in read_metrics_lines(tmp_path / run)] for run in ("one", "four"))
        assert one == four
    adapters = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("one", "four")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"q_lora": True}], ids=["lora", "q_lora"])
@pytest.mark.variants("lora")
def test_the_same_seed_gives_the_same_bits(
    untied_base: Path, conversations: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    files = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(make_settings(untied_base, conversations, tmp_path / name, seed=seed, **more))
        files[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert files["a"] == files["b"] != files["c"]


def make_evaluations_take_a_year(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the trainer's clock advance by a year in each evaluation; return a list that gets an item each time."""
    years: list[float] = []
    evaluate = T5Trainer.evaluation_loop

    def evaluate_for_a_year(self: T5Trainer, *arguments: Any, **options: Any) -> Any:
        years.append(3e7)
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(T5Trainer, "evaluation_loop", evaluate_for_a_year)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(years))
    monkeypatch.setattr("t5tune.training.totals.time", clock)
    return years


@pytest.mark.slow
def test_tokens_per_second_exclude_the_time_of_evaluations(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    years = make_evaluations_take_a_year(monkeypatch)
    settings = make_settings(
        untied_base, conversations, tmp_path / "run", eval_fraction=0.2, eval_steps=3, save_steps=3, max_steps=6
    )
    with monkeypatch.context() as interrupted:
        interrupted.setattr("t5tune.training.objectives.measure_losses", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(settings)
    result = train(settings)
    assert result.resumed_from == tmp_path / "run" / "checkpoint-3"
    assert len(years) == 3  # at step 3, at step 3 again when the run resumes, and at step 6
    lines = [line for line in read_metrics_lines(tmp_path / "run") if "loss" in line]
    assert all(1 < line["tokens_per_second"] < 1e7 for line in lines)
    assert 1 < result.tokens_per_second < 1e7


@pytest.mark.slow
def test_evaluation_between_steps_does_not_change_training(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    shared = {"q_lora": True, "bf16": False, "eval_fraction": 0.2, "max_steps": 4}
    train(make_settings(untied_base, conversations, tmp_path / "a", **shared, eval_strategy="no"))
    train(make_settings(untied_base, conversations, tmp_path / "b", **shared, eval_strategy="steps", eval_steps=1))
    a, b = (tmp_path / name / "adapter_model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert sum("eval_loss" in line for line in read_metrics_lines(tmp_path / "b")) == 4


def test_tf32_is_ignored_with_a_note_on_a_cpu(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=1, tf32=True), events.append)
    assert Note("tf32: ignored, since the CPU has no TensorFloat-32") in events


@pytest.mark.slow
def test_a_run_that_keeps_all_checkpoints_reports_their_size(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    def list_notes(name: str, **changes: Any) -> list[str]:
        events: list[Event] = []
        train(make_settings(untied_base, conversations, tmp_path / name, save_steps=2, **changes), events.append)
        return [event.text for event in events if isinstance(event, Note) and "checkpoints will be kept" in event.text]

    [note] = list_notes("all")
    checkpoints = list((tmp_path / "all").glob("checkpoint-*"))
    mebibytes = sum(file.stat().st_size for folder in checkpoints for file in folder.iterdir()) / 2**20
    kept = re.match(
        "all 3 checkpoints will be kept, about ([0-9.]+) MiB; --save-total-limit 2 keeps only the newest", note
    )
    assert kept is not None, note
    assert len(checkpoints) == 3
    assert mebibytes - 1 < float(kept[1]) < mebibytes + 4  # 1 MiB for each checkpoint's small files
    assert list_notes("three", save_total_limit=3) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 3e-4),
        ({"q_lora": True}, 3e-4),
        ({"learning_rate": 5e-5}, 5e-5),
        ({"train_mode": "full"}, 5e-5),
        ({"data_path": "pairs.jsonl", "objective": "dpo"}, 5e-5),
        ({"data_path": "pairs.jsonl", "objective": "orpo"}, 3e-4),
        ({"data_path": "cache"}, 5e-5),  # its examples were made for dpo
    ],
)
def test_the_default_learning_rate_suits_what_is_trained(
    changes: dict[str, Any], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": f"Say {number}", "chosen": "Yes.", "rejected": "No."} for number in range(20)]
    Path("pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pairs = {"model_name_or_path": "pocket", "data_path": "pairs.jsonl", "objective": "dpo"}
    prepare(PrepareSettings(**pairs, output_dir=Path("cache")))
    given = {"model_name_or_path": "pocket", "data_path": "pocket", **changes}
    events: list[Event] = []
    with ExitStack() as locks:
        set_up_run_folder(TrainSettings(**given, output_dir="run"), locks, events.append)
    assert yaml.safe_load(Path("run/settings.yaml").read_text())["learning_rate"] == expected
    assert not any(isinstance(event, Note) and "learning_rate" in event.text for event in events)
    assert plan(PlanSettings(**given, time_run=False)).learning_rate == expected


@pytest.mark.slow
def test_the_last_step_always_has_a_line_of_metrics(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=5, logging_steps=3))
    assert [line["step"] for line in read_metrics_lines(tmp_path / "run") if "loss" in line] == [1, 3, 5]
    saved = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [line["step"] for line in saved["log_history"] if "loss" in line] == [1, 3, 5]


@pytest.mark.slow
def test_a_resumed_run_counts_all_its_tokens_and_losses(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = make_settings(untied_base, conversations, run, max_steps=6, save_steps=4, logging_steps=3)
    uninterrupted = train(chosen)
    shutil.rmtree(run / "checkpoint-6")
    (run / "result.json").unlink()
    resumed = train(chosen)
    assert resumed.resumed_from == run / "checkpoint-4"
    assert resumed.tokens == uninterrupted.tokens
    assert resumed.train_loss == pytest.approx(uninterrupted.train_loss, rel=1e-6)
    per_step = train(chosen.model_copy(update={"output_dir": tmp_path / "other", "logging_steps": 1}))
    assert uninterrupted.train_loss == pytest.approx(sum(read_losses(tmp_path / "other")) / 6, rel=1e-6)
    assert per_step.train_loss == pytest.approx(uninterrupted.train_loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_0_logs_the_gradient_norm_without_clipping(
    base_without_dropout: Path,
    conversations: Path,
    one_step: dict[str, float],
    tmp_path: Path,
    on_ranks: Callable[..., CommandResult],
) -> None:
    more = ("--num-data", "8", "--max-steps", "1", "--per-device-train-batch-size", "8", "--use-cpu")
    more += ("--deepspeed", "zero0", "--max-grad-norm", "0")
    done = on_ranks(1, *make_command(base_without_dropout, conversations, tmp_path / "run", *more))
    assert done.code == 0, done.stderr
    assert read_metrics_lines(tmp_path / "run")[0]["grad_norm"] == pytest.approx(one_step["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_losses(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    for name, on in (("a", False), ("b", True)):
        run = tmp_path / name
        train(make_settings(untied_base, conversations, run, max_steps=2, lora_dropout=0.0, gradient_checkpointing=on))
    assert read_losses(tmp_path / "a") == pytest.approx(read_losses(tmp_path / "b"), rel=1e-5)


@pytest.mark.slow
def test_a_run_resumes_from_its_newest_checkpoint_bit_for_bit(
    finished_run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    notes: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    train(make_settings(untied_base, conversations, run, eval_fraction=0.2))
    for name in ("result.json", "adapter_model.safetensors"):
        (run / name).unlink()
    shard = run / "checkpoint-6" / "optimizer.pt"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = train(make_settings(untied_base, conversations, run, eval_fraction=0.2), report)
    assert result.resumed_from == run / "checkpoint-3"
    assert any("checkpoint-6/optimizer.pt: differs" in note for note in notes)
    expected = (finished_run / "adapter_model.safetensors").read_bytes()
    assert (run / "adapter_model.safetensors").read_bytes() == expected


def test_non_finite_loss_stops_before_the_update(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    broken = make_base(tmp_path / "base", tied=False)
    weights = load_file(broken / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="step 1: the loss is nan; no update was made; .*no checkpoint yet"):
        train(make_settings(broken, conversations, tmp_path / "run"))
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_non_finite_held_out_loss_is_null_in_results(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    base, run = make_base(tmp_path / "base", tied=False), tmp_path / "run"
    texts = {"train": "Two teas, please.", "held-out": "Two cakes, please."}
    encode = AutoTokenizer.from_pretrained(base).encode
    trained, held_out = ({*encode(text)} for text in texts.values())
    weights = load_file(base / "model.safetensors")
    weights["shared.weight"][sorted(held_out - trained)] = float("nan")  # as if they had overflowed
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'source': text, 'target': 'Yes.'})}\n" * 4)
    command = (
        "train", "--model-name-or-path", base, "--data-path", tmp_path / "train.jsonl", "--eval-data-path",
        tmp_path / "held-out.jsonl", "--output-dir", run, "--max-steps", 1, "--report-samples", 0, "--use-cpu",
    )  # fmt: skip
    done = t5tune_in_fork(*command, "--json")
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout, parse_constant=pytest.fail)
    assert (result["eval"]["loss"], result["eval"]["perplexity"]) == (None, None)
    assert result["train_loss"] > 0
    assert json.loads((run / "result.json").read_text(), parse_constant=pytest.fail) == result
    assert "<div><b>–</b><span>held-out loss</span></div>" in (run / "report.html").read_text()
    assert "nan" not in (run / "README.md").read_text()
    table = t5tune_in_fork(*command).stderr  # the run has finished, so this only shows its table
    assert re.search(r"^held-out loss +–$", table, re.MULTILINE), table
    (run / "result.json").write_text((run / "result.json").read_text().replace('"loss": null', '"loss": NaN'))
    assert read_result(run).eval["loss"] is None


@pytest.mark.slow
def test_each_evaluation_reports_progress_and_whether_it_is_best(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    changes = {"eval_fraction": 0.2, "eval_steps": 1, "eval_generate": 2, "max_steps": 3, "learning_rate": 1.0}
    train(make_settings(untied_base, conversations, tmp_path / "run", **changes), events.append)
    measured = next(event for event in events if isinstance(event, Measured))
    assert {"loss", "lr", "grad norm", "tokens/s"} <= set(measured.values)
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    lines = [line for line in read_metrics_lines(tmp_path / "run") if "eval_loss" in line]
    assert [event.step for event in evaluated] == [1, 2, 3]
    assert [event.values["loss"] for event in evaluated] == [line["eval_loss"] for line in lines]
    losses = [line["eval_loss"] for line in lines]
    assert [event.is_best for event in evaluated] == [losses[n] == min(losses[: n + 1]) for n in range(3)]
    assert not evaluated[-1].is_best  # the learning rate is too high
    assert {"perplexity", "exact_match", "rougeL"} <= set(evaluated[0].values)
    assert not any("second" in name or "runtime" in name for name in evaluated[0].values)
    first, second = (events.index(event) for event in evaluated[:2])
    for task, total in (("evaluate: losses", 9), ("evaluate: predictions", 2)):
        progress = [event for event in events[first:second] if getattr(event, "task", None) == task]
        assert progress[0] == Started(task, total, "examples")
        assert progress[-2:] == [Advanced(task, total), Finished(task)]
