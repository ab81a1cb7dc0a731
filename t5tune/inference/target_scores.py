"""The log-probabilities of targets under a model: all targets of a source need one pass of its encoder.

    collator = set_up_scoring(model, pad_token_id)
    ((yes, no),) = score_targets(model, [make_candidates(source, [[4273, 1], [150, 1]])], collator)
    yes.logprob, yes.token_logprobs, yes.is_greedy    # -0.21, [-0.2, -0.01], [True, True]

They are log-softmaxes of the logits in fp32, without constraints and temperature. Each is in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from t5tune.data.tokens.encoding import Example
from t5tune.model.attention.packing import can_pack, use_packing
from t5tune.model.batches import PackedCollator, PaddedCollator
from t5tune.model.loss import GreedyCrossEntropy


@dataclass(frozen=True)
class Candidates(Example):
    """A source with several targets. All sources of a batch have the same number of them."""

    others: tuple[npt.NDArray[np.int64], ...]

    @property
    def targets(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self.target_T, *self.others


@dataclass(frozen=True)
class TargetScore:
    """The log-probability of each token of a target, and whether it is the likeliest token at its position."""

    token_logprobs: list[float]
    is_greedy: list[bool]

    @property
    def logprob(self) -> float:
        return math.fsum(self.token_logprobs)


def make_candidates(source: Sequence[int], targets: Sequence[Sequence[int]]) -> Candidates:
    """Make candidates from ids, with the special tokens of the source and the token that ends each target."""
    first, *others = (np.array(target, np.int64) for target in targets)
    return Candidates(np.array(source, np.int64), first, tuple(others))


def set_up_scoring(model: Any, pad_token_id: int) -> PackedCollator | PaddedCollator:
    """Set up a model for packed batches, and make their collator; a padding collator if the model can't pack."""
    start = model.architecture.start_token_id
    if not can_pack(model):
        return PaddedCollator(pad_token_id, start)
    use_packing(model)
    return PackedCollator(start, pad_token_id)


def score_targets(
    model: Any, examples: Sequence[Example], collator: PackedCollator | PaddedCollator
) -> list[tuple[TargetScore, ...]]:
    """Score the targets of a batch, with a model in evaluation mode."""
    batch = collate(model, examples, collator)
    criterion = GreedyCrossEntropy(batch["labels"].flatten())
    with torch.no_grad():
        losses_BT = model(**batch, reduction="none", use_cache=False, criterion=criterion)
    is_greedy_BT = torch.cat(criterion.is_greedy).view(losses_BT.shape)
    values = (split_by_target(values_BT, examples, collator) for values_BT in (-losses_BT, is_greedy_BT))
    pairs = zip(*values, strict=True)
    return [tuple(TargetScore(a.tolist(), b.tolist()) for a, b in zip(*pair, strict=True)) for pair in pairs]


def collate(model: Any, examples: Sequence[Example], collator: PackedCollator | PaddedCollator) -> dict[str, Any]:
    """Make a batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in collator(examples).items()}


def split_by_target(
    values_BT: Tensor, examples: Sequence[Example], collator: PackedCollator | PaddedCollator
) -> list[tuple[Tensor, ...]]:
    """Divide the values of a batch's labels: for each example, the values of each of its targets, on the CPU."""
    lengths = [len(target) for example in examples for target in example.targets]
    values_BT = values_BT.cpu()
    if isinstance(collator, PackedCollator):
        parts = iter(torch.split(values_BT[0, : sum(lengths)], lengths))  # the row's padding follows
    else:
        parts = (row[:length] for row, length in zip(values_BT, lengths, strict=True))
    return [tuple(next(parts) for _ in example.targets) for example in examples]
