"""Short runs whose checkpoints are exported, and what tests of exports check."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from t5tune.errors import CheckpointError
from tests.support.models.exports import assert_same, list_files, run_export
from tests.support.processes.command_line import CommandResult

STEPS = 3


def train_run(
    on_ranks: Callable[..., CommandResult], ranks: int, base: Path, data: Path, run: Path, *flags: str
) -> Path:
    done = on_ranks(
        *(ranks, "train", "--model-name-or-path", base, "--data-path", data, "--output-dir", run, "--use-cpu"),
        *("--max-steps", STEPS, "--learning-rate", "1e-2", "--per-device-train-batch-size", 2, "--report-samples", 0),
        *flags,
    )
    assert done.code == 0, done.stderr
    return run


def check_full_state(run: Path, base: Path, folder: Path) -> None:
    """Check that the full state is the base's tensors, with the trained token rows."""
    run_export(run, folder / "trained")
    result = run_export(run, folder / "full", non_lora_state="full")
    state = load_file(folder / "full" / "non_lora_state.safetensors")
    rows = load_file(folder / "trained" / "non_lora_state.safetensors")
    assert_same(state, load_file(base / "model.safetensors") | rows)
    assert result.non_lora_tensors == len(state)


def check_refusal(checkpoint: Path, tmp_path: Path, named: str, **changes: Any) -> CheckpointError:
    """Check that a checkpoint is refused, and that nothing is written."""
    before = list_files(tmp_path)
    with pytest.raises(CheckpointError, match=named) as caught:
        run_export(checkpoint, tmp_path / "adapter", **changes)
    assert list_files(tmp_path) == before
    return caught.value


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
