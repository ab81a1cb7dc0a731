"""Batches of a token cache's examples: padded or packed, with a fixed number of examples or a token budget."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

from t5tune.data.batching import count_budget_batches, epoch_order, make_budget_batches
from t5tune.data.cache import Cache
from t5tune.data.encoding import Example
from t5tune.errors import SettingsError
from t5tune.model.attention import Segments
from t5tune.model.loss import IGNORED_LABEL


class ExampleDataset(Dataset[Example]):
    """A token cache as a torch Dataset.

    The index ~i gives a filler for batches that would be empty: a token of example i's source, and a label that is
    ignored, so that there is nothing to learn from it.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> Example:
        example: Example = self.cache[index if index >= 0 else ~index]
        return example if index >= 0 else Example(example.source_S[-1:], np.array([IGNORED_LABEL]))


class BucketSampler(Sampler[list[int]]):
    """`epoch_order` as a torch batch sampler: the micro-batches of all ranks, step by step and rank by rank.

    The order depends only on the seed and the epoch, not on any random state. The last step of an epoch has the
    remaining examples, divided among as many micro-batches as in every other step, so that a step's examples don't
    depend on how it is divided. A micro-batch for which no examples remain gets a filler (see `ExampleDataset`).

    Args:
        lengths: length of each example, in tokens.
        batch_size: examples per micro-batch.
        step_size: micro-batches per step: gradient accumulation steps × ranks.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], batch_size: int, step_size: int, seed: int) -> None:
        self.lengths = lengths
        # accelerate would drop incomplete batches if this sampler had an attribute `batch_size`
        self.num_examples = batch_size * step_size  # of a step
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.num_examples) * self.step_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order `__iter__` yields. The trainer calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        examples = self.num_examples
        order = epoch_order(self.lengths, examples, self.seed, self.epoch)
        for start in range(0, len(order), examples):
            for batch in np.array_split(order[start : start + examples], self.step_size):
                yield batch.tolist() or [~int(order[start])]


class BudgetSampler(Sampler[list[int]]):
    """`make_budget_batches` as a torch batch sampler: the micro-batches of all ranks, step by step and rank by rank.

    Raises:
        SettingsError: an example is longer than the budget, or there are fewer examples than micro-batches in a step.
    """

    def __init__(
        self,
        sources: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        tokens: int,
        packed: bool,
        step_size: int,
        seed: int,
    ) -> None:
        longest = int((sources + targets).max())
        if longest > tokens:
            raise SettingsError(
                f"tokens_per_batch: {tokens}: the longest example has {longest} source and target tokens",
                hint=f"set at least {longest}, or shorten the examples with model_max_length",
            )
        self.lengths = sources, targets
        self.tokens = tokens
        self.packed = packed
        self.step_size = step_size
        self.seed = seed
        self.count = count_budget_batches(sources, targets, tokens, packed, step_size, seed)
        self.epoch = 0
        if self.count > len(sources):
            raise SettingsError(
                f"tokens_per_batch: {tokens}: {len(sources)} examples are too few for a step of {step_size} batches "
                "(gradient_accumulation_steps × processes)"
            )

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order `__iter__` yields. The trainer calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        batches = make_budget_batches(
            *self.lengths, self.tokens, self.packed, self.step_size, self.count, self.seed, self.epoch
        )
        yield from (batch.tolist() for batch in batches)


class PackedCollator:
    """Concatenates the examples of a batch in one row (see model/attention.py)."""

    def __init__(self, decoder_start_token_id: int) -> None:
        self.decoder_start_token_id = decoder_start_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        sources = [example.source_S for example in examples]
        targets = [example.target_T for example in examples]
        shifted = _shift_right(targets, self.decoder_start_token_id)
        return {
            "input_ids": _concatenate(sources),
            "decoder_input_ids": _concatenate(shifted),
            "labels": _concatenate(targets),
            "packing": Segments(tuple(map(len, sources)), tuple(map(len, targets))),
        }


class PaddedCollator:
    """Pads a batch to its longest source and target.

    The decoder's input is its start token and the targets shifted right; padding gets the label -100. The attention
    mask is made from lengths, so that a pad token within a text counts as text.
    """

    def __init__(self, pad_token_id: int, decoder_start_token_id: int) -> None:
        self.pad_token_id = pad_token_id
        self.decoder_start_token_id = decoder_start_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        sources = [example.source_S for example in examples]
        targets = [example.target_T for example in examples]
        shifted = _shift_right(targets, self.decoder_start_token_id)
        return {
            "input_ids": _pad(sources, self.pad_token_id),
            "attention_mask": _pad([np.ones_like(source) for source in sources], 0),
            "decoder_input_ids": _pad(shifted, self.pad_token_id),
            "labels": _pad(targets, IGNORED_LABEL),
        }


def _shift_right(targets: list[Any], start: int) -> list[Any]:
    return [np.concatenate([[start], target[:-1]]) for target in targets]


def _concatenate(parts: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]


def _pad(rows: list[Any], value: int) -> torch.Tensor:
    padded_BT = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for line, row in zip(padded_BT, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded_BT)
