"""Training on several processes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t5tune.commands.prepare import prepare
from t5tune.io.yaml_file import read_yaml
from t5tune.settings import PrepareSettings
from t5tune.training.callbacks import sample_predictions
from tests.commands.train.commands import TWO, make_command
from tests.support.processes.command_line import CommandResult, t5tune_in_fork
from tests.support.processes.runs import Running
from tests.support.train_runs import read_losses, read_metrics_lines

BATCHES = {
    "accumulated": ("--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2", "--use-cpu"),
    "ddp": ("--per-device-train-batch-size", "4"),
    "zero2": ("--per-device-train-batch-size", "4", "--deepspeed", "zero2"),
    "zero3": ("--per-device-train-batch-size", "4", "--deepspeed", "zero3"),
    "zero2-accumulated": (
        "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2", "--deepspeed", "zero2",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", BATCHES)
@pytest.mark.variants("zero3")
def test_dividing_a_batch_keeps_its_loss_and_gradient(
    way: str,
    base_without_dropout: Path,
    conversations: Path,
    one_step: dict[str, float],
    tmp_path: Path,
    on_ranks: Callable[..., CommandResult],
) -> None:
    more = ("--num-data", "8", "--max-steps", "1", *BATCHES[way])
    done = on_ranks(2, *make_command(base_without_dropout, conversations, tmp_path / "run", *more))
    assert done.code == 0, done.stderr
    line = read_metrics_lines(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(one_step["loss"], rel=1e-4)
    assert line["grad_norm"] == pytest.approx(one_step["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", [("zero3", "--q-lora", "--no-bf16"), ("zero1", "--bf16"), ("zero0", "--bf16")])
@pytest.mark.variants(2)
def test_deepspeed_stages_reduce_the_loss_and_save_the_fp32_masters(
    way: tuple[str, ...], untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    more = ["--deepspeed", *way, "--max-steps", "3", "--per-device-train-batch-size", "4"]
    done = on_ranks(2, *make_command(untied_base, conversations, tmp_path / "run", *more))
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2
    assert read_losses(tmp_path / "run")[-1] < read_losses(tmp_path / "run")[0]
    values = torch.cat([v.flatten() for v in load_file(tmp_path / "run" / "adapter_model.safetensors").values()])
    assert not torch.equal(values, values.bfloat16().float())


@pytest.mark.slow
def test_a_finished_run_of_two_processes_is_not_repeated(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    command = make_command(untied_base, conversations, tmp_path / "run", "--max-steps", "1")
    first = on_ranks(2, *command)
    again = t5tune_in_fork(*command, *TWO)
    assert first.code == again.code == 0, first.stderr + again.stderr
    assert first.json == again.json


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.long
def test_processes_get_the_settings_of_command_and_cache(untied_base: Path, tmp_path: Path) -> None:
    """In each process, a flag overrides a variable, and settings that aren't given come from the token cache."""
    pairs, cache, run = tmp_path / "pairs.jsonl", tmp_path / "cache", tmp_path / "run"
    records = [{"prompt": f"Say {word}.", "chosen": word, "rejected": "No."} for word in ("one", "two", "six", "ten")]
    pairs.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    prepare(
        PrepareSettings(model_name_or_path=str(untied_base), data_path=str(pairs), output_dir=cache, objective="dpo")
    )
    command = make_command(untied_base, cache, run, "--max-steps", "1", "--use-cpu", "--q-lora")
    environment = {"T5TUNE_LEARNING_RATE": "0.5", "T5TUNE_OUTPUT_DIR": str(tmp_path / "other")}
    done = t5tune_in_fork(*command, *TWO, env=environment)
    assert done.code == 0, done.stderr
    assert done.json["world_size"] == 2
    assert done.stderr.count("q_lora turns bf16 on") == 1
    saved = read_yaml(run / "settings.yaml")
    assert (saved["learning_rate"], saved["objective"]) == (0.01, "dpo")
    assert not (tmp_path / "other").exists()
    assert t5tune_in_fork(*command).json == done.json  # the same run with one process: it has finished


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_training_runs_under_other_launchers(
    launcher: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    arguments = make_command(untied_base, conversations, tmp_path / "run", "--max-steps", "1", "--use-cpu")
    if launcher == "torchrun":
        module, flags = "torch.distributed.run", ["--standalone", "--nproc-per-node", "2", "-m", "t5tune"]
    else:
        module, flags = "deepspeed.launcher.runner", ["--num_gpus", "2", "--module", "t5tune"]
        arguments += ["--deepspeed", "zero2"]
    # the deepspeed launcher counts GPUs with torch; on a CPU, --num_gpus and DS_ACCELERATOR set the number of processes
    code = f"from {module} import main; main({[*flags, *map(str, arguments)]!r})"
    with Running([sys.executable, "-c", code], tmp_path / "launcher", DS_ACCELERATOR="cpu") as running:
        assert running.wait() == 0, running.log.read_text()[-3000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == 2


@pytest.mark.long
@pytest.mark.slow
def test_an_error_in_all_workers_is_shown_once(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    command = make_command(untied_base, conversations, tmp_path / "run", *TWO, "--lora-target-modules", "query")
    done = t5tune_in_fork(*command, "--max-steps", "1")
    assert done.code == 2
    assert len(done.errors) == 1, done.stderr
    assert "lora_target_modules: query" in done.errors[0]
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "SettingsError"
    assert "in add_lora" in t5tune_in_fork(*command, "--max-steps", "1", "--debug").stderr  # the worker's traceback


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "stage", "more"),
    [
        ("untied", "zero3", ()),
        ("tied", "zero3", ()),
        ("untied", "zero2", ()),
        ("tied", "zero0", ()),
        ("untied", "zero3", ("--q-lora", "--no-bf16")),
        ("untied", None, ("--q-lora",)),
    ],
)
@pytest.mark.variants("untied-zero3-more0")
def test_the_live_base_equals_its_file_before_and_after_training(
    kind: str,
    stage: str | None,
    more: tuple[str, ...],
    conversations: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    on_ranks: Callable[..., CommandResult],
) -> None:
    base, found = request.getfixturevalue(f"{kind}_base"), tmp_path / "found.json"
    more = [*(("--deepspeed", stage) if stage else ()), *more, "--max-steps", "2"]
    call = f"tests.support.ranks.records:record_base_weights({str(base)!r}, {str(found)!r})"
    done = on_ranks(2 if stage else 1, *make_command(base, conversations, tmp_path / "run", *more), calls=[call])
    assert done.code == 0, done.stderr[-3000:]
    before, after = json.loads(found.read_text())
    assert before["different"] == after["different"] == []
    names = {name.split()[1] for name in after["equal"]}
    assert "shared.weight" in names
    assert any(name.endswith("layer_norm.weight") for name in names)
    if kind == "untied":
        assert "lm_head.weight" in names


def shorten_samples() -> None:
    """From here on, samples have at most six predicted tokens: under ZeRO-3 every token gathers the whole model."""
    sample_predictions.MAX_PREDICTED_TOKENS = 6


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_of_zero3_resume_to_the_same_bits(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    run = tmp_path / "run"
    more = ["--deepspeed", "zero3", "--max-steps", "4", "--save-steps", "2", "--lora-dropout", "0.05"]
    more += ["--per-device-train-batch-size", "2", "--report-samples", "3"]
    arguments = make_command(untied_base, conversations, run, *more)
    shorten = "tests.commands.train.test_ranks:shorten_samples()"
    first = on_ranks(2, *arguments, calls=[shorten])
    assert first.code == 0, first.stderr
    uninterrupted = (run / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoint-4")
    for name in ("result.json", "adapter_model.safetensors"):
        (run / name).unlink()
    again = on_ranks(2, *arguments, calls=[shorten])
    assert again.code == 0, again.stderr
    assert again.json["resumed_from"] == str(run / "checkpoint-2")
    for name in ("tokens", "train_loss"):
        assert again.json[name] == pytest.approx(first.json[name], rel=1e-6)
    assert (run / "adapter_model.safetensors").read_bytes() == uninterrupted
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples) == 3
    assert all({"source", "target", "before", "after", "loss"} <= set(sample) for sample in samples)
    assert "Sample predictions before and after training" in (run / "report.html").read_text()
