"""Losses and replies of a model on examples, shared among the ranks: for training's evaluation and for evaluate.

Every rank makes the same number of forward passes, since under ZeRO-3 each of them gathers from all ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from t5tune.data.encoding import Example
from t5tune.model.generation import generate
from t5tune.model.loss import IGNORED_LABEL
from t5tune.progress import Report, silent, track
from t5tune.training.batches import PaddedCollator

TASK = "evaluate"


@dataclass(frozen=True)
class Losses:
    """Of each example: the sum of its target tokens' cross-entropies in nats, and their number."""

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """The loss per target token."""
        return sum(self.sums) / sum(self.tokens)


def measure_losses(
    model: Any, examples: Sequence[Example], collator: PaddedCollator, batch_size: int, report: Report = silent
) -> Losses:
    """The cross-entropy of every example's target, the model reading the true target as it goes."""
    device = next(model.parameters()).device
    measured: dict[int, tuple[float, int]] = {}
    with _evaluating(model), torch.no_grad():
        for indices in _share(examples, batch_size, report, "losses"):
            batch = {name: value.to(device) for name, value in collator([examples[i] for i in indices]).items()}
            labels_BT = batch.pop("labels")
            logits_BTV = model(**batch, use_cache=False).logits.float()
            losses_BT = functional.cross_entropy(
                logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED_LABEL, reduction="none"
            )
            sums, counts = losses_BT.double().sum(1).tolist(), labels_BT.ne(IGNORED_LABEL).sum(1).tolist()
            measured |= {i: (loss, count) for i, loss, count in zip(indices, sums, counts, strict=True)}
    measured = _gathered(measured)
    return Losses([measured[i][0] for i in range(len(examples))], [measured[i][1] for i in range(len(examples))])


def generate_replies(
    model: Any,
    examples: Sequence[Example],
    eos_token_id: int,
    pad_token_id: int,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    report: Report = silent,
) -> list[list[int]]:
    """The reply to each example's source, without its end token: the likeliest by greedy or beam search."""
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    replies: dict[int, list[int]] = {}
    with _evaluating(model):
        for indices in _share(examples, batch_size, report, "replies"):
            sources = [examples[i].source_S.tolist() for i in indices]
            ids = generate(model, sources, eos_token_id, pad_token_id, max_new_tokens, num_beams, synced_gpus=sharded)
            replies |= dict(zip(indices, ids, strict=True))
    replies = _gathered(replies)
    return [replies[i] for i in range(len(examples))]


def longest_target(examples: Sequence[Example]) -> int:
    """Tokens, the end token included."""
    return max(len(example.target_T) for example in examples)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the indices below `count`, evenly spread: (10, 3) -> [0, 4, 9]."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).astype(np.int64)})


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for a while: no dropout. What trained before trains again after."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


def _share(examples: Sequence[Example], batch_size: int, report: Report, what: str) -> Iterator[list[int]]:
    """This rank's batches of indices, of about equal lengths; the last is repeated where others have one more."""
    lengths = [(len(example.target_T), len(example.source_S)) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: lengths[i], reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rank, size = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    rounds = -(-len(batches) // size)
    mine = [batches[min(step * size + rank, len(batches) - 1)] for step in range(rounds)]
    return track(mine, f"{TASK}: {what}", report, total=len(mine), unit="batches")


def _gathered(found: dict[int, Any]) -> dict[int, Any]:
    if not _is_distributed():
        return found
    parts: list[dict[int, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return {index: value for part in parts if part is not None for index, value in part.items()}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
