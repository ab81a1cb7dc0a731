"""The log-probabilities of targets under a model: all targets of a source need one pass of its encoder.

    collator = set_up_scoring(model, pad_token_id)
    ((yes, no),) = score_targets(model, [Candidates(source_S, yes_T, (no_T,))], collator)
    yes.logprob, yes.token_logprobs, yes.is_greedy    # -0.21, [-0.2, -0.01], True

They are log-softmaxes of the logits in fp32, without constraints and temperature, in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from t5tune.data.tokens.encoding import Example
from t5tune.model.attention.packing import can_pack, use_packing
from t5tune.model.batches import Collator, LabelCollator, PackedCollator, make_collator
from t5tune.model.loss import CrossEntropy


@dataclass(frozen=True)
class Candidates(Example):
    """A source with several targets. All sources of a batch have the same number of them."""

    others: tuple[npt.NDArray[np.int64], ...]

    @property
    def targets(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self.target_T, *self.others


@dataclass(frozen=True)
class CandidateList(Sequence[Example]):
    """Examples with further targets. They are made on access, because a list would hold the ids of all sources.

    Args:
        more: the further targets of each example.
    """

    examples: Sequence[Example]
    more: Sequence[Sequence[npt.ArrayLike]]

    def __len__(self) -> int:
        return len(self.more)

    def __getitem__(self, index: Any) -> Any:
        example = self.examples[index]
        return Candidates(example.source_S, example.target_T, tuple(map(np.asarray, self.more[index])))


@dataclass(frozen=True)
class TargetScore:
    """The log-probability of each token of a target; `is_greedy`: whether each is the likeliest at its position."""

    token_logprobs: list[float]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        return sum(self.token_logprobs)


def set_up_scoring(model: Any, pad_token_id: int) -> Collator:
    """Set up a model for packed batches, once, and make their collator; padded batches if the model can't pack."""
    if is_packed := can_pack(model):
        use_packing(model)
    if model.label_task is not None:
        return LabelCollator(model.label_task, pad_token_id, is_packed)
    return make_collator(model.architecture.start_token_id, pad_token_id, is_packed)


def score_targets(model: Any, examples: Sequence[Example], collator: Collator) -> list[tuple[TargetScore, ...]]:
    """Score the targets of a batch, with a model in evaluation mode."""
    is_greedy: list[Tensor] = []
    batch = collate(model, examples, collator)
    criterion = CrossEntropy(batch["labels"].flatten(), is_greedy=is_greedy)
    with torch.no_grad():
        losses_BT = model(**batch, reduction="none", use_cache=False, criterion=criterion)
    values_BT2 = torch.stack([-losses_BT, torch.cat(is_greedy).view(losses_BT.shape).to(losses_BT.dtype)], -1)
    by_target = split_by_target(values_BT2, examples, collator)
    return [tuple(TargetScore(part[:, 0].tolist(), bool(part[:, 1].all())) for part in each) for each in by_target]


def collate(model: Any, examples: Sequence[Example], collator: Collator) -> dict[str, Any]:
    """Make a batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in collator(examples).items()}


def split_by_target(values_BT: Tensor, examples: Sequence[Example], collator: Collator) -> list[list[Tensor]]:
    """Divide the values of a batch's labels: for each example, the values of each of its targets, on the CPU."""
    lengths = [len(target) for example in examples for target in example.targets]
    is_packed, values_BT = isinstance(collator, PackedCollator), values_BT.cpu()
    # padding follows a packed row, or each target
    rows = torch.split(values_BT[0, : sum(lengths)], lengths) if is_packed else values_BT.unbind()
    parts = iter([row[:length] for row, length in zip(rows, lengths, strict=True)])
    return [[next(parts) for _ in example.targets] for example in examples]
