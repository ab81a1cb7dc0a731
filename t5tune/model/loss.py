"""Cross-entropy over the target tokens of a whole step.

Trainer's own way is wrong for T5: it takes the mean of each micro-batch, and multiplies loss and gradient by
accumulation steps and ranks. Here it is the sum in fp32 over the number of target tokens of the global step.
"""

from typing import Any

import torch
from torch.nn import functional

IGNORED_LABEL = -100


def step_loss(
    outputs: Any, labels_BT: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Trainer's `compute_loss_func`.

    Args:
        outputs: with logits, [B, T, V] in any floating dtype.
        num_items_in_batch: target tokens of the step, over all micro-batches and ranks; None: of this batch.
    """
    logits_NV = outputs["logits"].flatten(0, 1).float()
    labels_N = labels_BT.flatten()
    if num_items_in_batch is None:
        num_items_in_batch = labels_N.ne(IGNORED_LABEL).sum().clamp_min(1)
    total = functional.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / num_items_in_batch
