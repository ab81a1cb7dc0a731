"""Train by a settings file, the loss of the fifth micro-step being infinite: a stand-in for a real overflow."""

import sys
from typing import Any

import torch

from t5tune.settings import TrainSettings, load_settings
from t5tune.train import train


def overflow_at(count: int) -> None:
    """From here on the loss of this process's `count`-th micro-step is infinite."""
    from t5tune.training.trainer import T5Trainer

    steps = 0
    compute = T5Trainer.compute_loss

    def overflow(self: T5Trainer, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        loss = compute(self, *arguments, **options)
        return loss * torch.inf if steps == count else loss

    T5Trainer.compute_loss = overflow  # type: ignore[method-assign]


if __name__ == "__main__":
    overflow_at(5)
    try:
        train(load_settings(TrainSettings, file=sys.argv[1])[0])
    except Exception as error:
        sys.exit(str(error))
