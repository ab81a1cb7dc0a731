"""Simulate a GPU whose memory is too small for large batches."""

import weakref
from typing import Any

import torch

from t5tune.evaluation import scoring as evaluation
from t5tune.model.loss import TargetLoss


def limit_memory(count: int) -> None:
    """From here on, evaluation runs out of memory in batches of more than `count` examples."""
    generate = evaluation.generate
    compute_losses = TargetLoss.forward
    live_batches: list[weakref.ref[torch.Tensor]] = []

    def check(examples: int) -> None:
        assert not any(tensor() is not None for tensor in live_batches), "the batch that failed still uses its memory"
        batch = torch.ones(max(examples, 1))
        if examples > count:
            live_batches.append(weakref.ref(batch))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def generate_or_fail(model: Any, sources: list[list[int]], *arguments: Any, **options: Any) -> Any:
        check(len(sources))
        return generate(model, sources, *arguments, **options)

    def compute_or_fail(
        self: TargetLoss, hidden: Any, shape: Any, head: Any, reduction: str, criterion: Any, *rest: Any
    ) -> Any:
        if reduction == "none":  # evaluation
            check(int((criterion.labels_N == 1).sum()))  # each target has one EOS token
        return compute_losses(self, hidden, shape, head, reduction, criterion, *rest)

    evaluation.generate = generate_or_fail
    TargetLoss.forward = compute_or_fail  # type: ignore[method-assign]
