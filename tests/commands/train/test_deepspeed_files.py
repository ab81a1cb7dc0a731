"""DeepSpeed configs that were written for other tools."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.settings import packaged_templates
from tests.commands.train.commands import make_command
from tests.support.processes.command_line import CommandResult

# as in transformers' documentation
DOCUMENTED = {
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    },
}  # fmt: skip


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["zero1", "zero2"])
@pytest.mark.variants("zero1")
def test_another_tools_deepspeed_config_trains_with_the_settings(
    stage: str, base_without_dropout: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    config, notes = tmp_path / "own.json", {}
    config.write_text(json.dumps(packaged_templates.read_deepspeed_config(stage) | DOCUMENTED))
    for name, used, schedule in (
        ("without", stage, "constant_with_warmup"),
        ("with", config, "constant_with_warmup"),
        ("other", config, "linear"),
        ("linear", stage, "linear"),
    ):
        command = make_command(base_without_dropout, conversations, tmp_path / name, "--max-steps", "4", "--use-cpu")
        command += ["--weight-decay", "0.5", "--warmup-steps", "2", "--lr-scheduler-type", schedule]
        done = on_ranks(1, *command, "--deepspeed", used)
        assert done.code == 0, done.stderr
        notes[name] = [line for line in done.stderr.splitlines() if "is replaced by" in line]
    adapters = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in notes}
    assert adapters["with"] == adapters["without"]
    assert adapters["other"] == adapters["linear"] != adapters["with"]
    replaced = f"deepspeed: {config}: the scheduler WarmupLR is replaced by lr_scheduler_type linear"
    assert notes.pop("other") == [f"{replaced}; --lr-scheduler-type constant_with_warmup uses the file's schedule"]
    assert not any(notes.values())


@pytest.mark.slow
@pytest.mark.distributed
def test_step_counts_in_a_deepspeed_config_are_compared_later(
    base_without_dropout: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    config, run = tmp_path / "own.json", tmp_path / "run"
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2, "weight_decay": 0, "eps": 1e-8}}
    own = packaged_templates.read_deepspeed_config("zero2") | {"optimizer": optimizer, "train_batch_size": 4}
    command = make_command(base_without_dropout, conversations, run, "--num-data", "16", "--num-train-epochs", "2")
    command += ["--per-device-train-batch-size", "4", "--warmup-steps", "0.25", "--use-cpu", "--deepspeed", str(config)]

    def write_config(warmup: int, total: int) -> None:
        params = {"warmup_max_lr": 1e-2, "warmup_num_steps": warmup, "total_num_steps": total}
        config.write_text(json.dumps(own | {"scheduler": {"type": "WarmupDecayLR", "params": params}}))

    write_config(3, 99)
    done = on_ranks(1, *command)
    assert done.code == 2, done.stderr
    problem = f"num_train_epochs: 2: {config} has scheduler.params.total_num_steps 99, but the settings make it 8"
    assert f'{problem}; set it to "auto"' in done.stderr
    problem = f"warmup_steps: 0.25: {config} has scheduler.params.warmup_num_steps 3, but the settings make it 2"
    assert f'{problem}; set it to "auto"' in done.stderr
    write_config(2, 8)
    done = on_ranks(1, *command)
    assert done.code == 0, done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_deepspeed_config_gets_missing_values_from_the_settings(
    base_without_dropout: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    whole = packaged_templates.read_deepspeed_config("zero2")
    missing: dict[str, set[str]] = {
        "nothing": set(),
        "clipping": {"gradient_clipping"},
        "accumulation": {"gradient_accumulation_steps"},
        "batch": {"gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"},
    }
    found = {}
    for name, keys in missing.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({key: whole[key] for key in whole.keys() - keys}))
        command = make_command(base_without_dropout, conversations, tmp_path / name, "--max-steps", "2", "--use-cpu")
        command += ["--optim", "sgd", "--max-grad-norm", "0.1", "--gradient-accumulation-steps", "2"]
        done = on_ranks(1, *command, "--deepspeed", str(tmp_path / f"{name}.json"))
        assert done.code == 0, done.stderr
        found[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert len({*found.values()}) == 1, [*found]
