"""Whether the disk has room for a run's checkpoints, before the first step is made."""

import shutil
from pathlib import Path

from t5tune.errors import TrainingError
from t5tune.progress import Note, Report

BYTES_PER_PARAMETER = 4 + 8  # the adapter in fp32, and Adam's two moments
BYTES_OF_SHARDS = 4 + 4  # DeepSpeed's fp32 masters, and the parameters once more
OVERHEAD = 1 << 20  # random states, the trainer's state, the manifest


def bytes_of_checkpoint(trainable: int, has_deepspeed: bool, tokenizer: Path) -> int:
    """About the bytes of one checkpoint, with what belongs to its adapter."""
    parameters = trainable * (BYTES_PER_PARAMETER + (BYTES_OF_SHARDS if has_deepspeed else 0))
    return parameters + sum(path.stat().st_size for path in tokenizer.rglob("*") if path.is_file()) + OVERHEAD


def check_space(run: Path, size: int, count: int, report: Report) -> None:
    """Compare the room that checkpoints need with what is free.

    Args:
        size: bytes of a checkpoint.
        count: of the checkpoints that will stand there at a time, beside those that do.

    Raises:
        TrainingError: there is no room for one and the next, which is written before the old one goes.
    """
    free = shutil.disk_usage(run).free
    least = 2 * size
    if free < least:
        raise TrainingError(
            f"{run}: {free:,} bytes are free; two checkpoints need about {least:,}",
            hint="make room, or name another output_dir",
        )
    if free < (needed := (count + 1) * size):
        report(
            Note(
                f"{run}: {free:,} bytes are free; {count} checkpoints will need about {needed:,}; save_total_limit "
                "keeps fewer",
                warning=True,
            )
        )
