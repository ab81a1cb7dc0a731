"""Check before the first step that the disk has room for a run's checkpoints."""

import shutil
from pathlib import Path

from t5tune.errors import TrainingError
from t5tune.progress import Note, Report

BYTES_PER_PARAMETER = 4 + 8  # the weights in fp32, and Adam's two moments
EXTRA_BYTES_WITH_DEEPSPEED = 4 + 4  # per parameter: DeepSpeed's fp32 masters, and a second copy of the weights
OVERHEAD_BYTES = 1 << 20  # random states, the Trainer's state, the manifest


def estimate_checkpoint_bytes(trainable: int, has_deepspeed: bool, tokenizer: Path) -> int:
    """Estimate the bytes of one checkpoint, including the tokenizer's files."""
    parameters = trainable * (BYTES_PER_PARAMETER + (EXTRA_BYTES_WITH_DEEPSPEED if has_deepspeed else 0))
    return parameters + sum(path.stat().st_size for path in tokenizer.rglob("*") if path.is_file()) + OVERHEAD_BYTES


def check_disk_space(run: Path, size: int, count: int, report: Report) -> None:
    """Compare the disk space that checkpoints need with the free space.

    Args:
        size: bytes per checkpoint.
        count: the maximum number of checkpoints to keep, in addition to any existing ones.

    Raises:
        TrainingError: there is no room for two checkpoints; a new one is written before the old one is deleted.
    """
    free = shutil.disk_usage(run).free
    least = 2 * size
    if free < least:
        raise TrainingError(
            f"{run}: {free:,} bytes are free, but two checkpoints need about {least:,}",
            hint="free some disk space, or choose another output_dir",
        )
    if free < (needed := (count + 1) * size):
        problem = f"{run}: {free:,} bytes are free, but {count} checkpoints will need about {needed:,}"
        report(Note(f"{problem}; lower save_total_limit to keep fewer", warning=True))
