"""Simulate overflows with infinite losses."""

import os
from typing import Any

import torch


def overflow_at(counts: list[int], rank: int = 0) -> None:
    """From here on, the losses of this rank's micro-batches with these numbers (from 1) are infinite."""
    from t5tune.training.trainer import T5Trainer

    if int(os.environ.get("RANK", "0")) != rank:
        return
    steps = 0
    compute = T5Trainer.compute_loss

    def overflow(self: T5Trainer, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        loss = compute(self, *arguments, **options)
        return loss * torch.inf if steps in counts else loss

    T5Trainer.compute_loss = overflow  # type: ignore[method-assign]
