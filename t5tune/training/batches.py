"""Batches of a token cache's examples: padded or packed, with a fixed number of examples or a token budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

from t5tune.data.batching import TokenBudget, make_count_batches
from t5tune.data.cache import Cache
from t5tune.data.encoding import Example
from t5tune.errors import SettingsError
from t5tune.model.attention import Segments
from t5tune.model.loss import IGNORED_LABEL
from t5tune.settings.training import TrainingSettings


@dataclass(frozen=True)
class Filler:
    """The only item of a micro-batch that would be empty: a token of an example's source, and nothing to learn.

    Args:
        example: index of the example.
    """

    example: int


class ExampleDataset(Dataset[Example]):
    """A token cache as a torch Dataset."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, item: int | Filler) -> Example:
        if isinstance(item, Filler):
            return Example(self.cache[item.example].source_S[-1:], np.array([IGNORED_LABEL]))
        example: Example = self.cache[item]
        return example


class BucketSampler(Sampler[list[int | Filler]]):
    """`make_count_batches` as a torch batch sampler: the micro-batches of all ranks, step by step and rank by rank.

    The order depends only on the seed and the epoch, not on any random state. A micro-batch for which no examples
    remain gets a `Filler`.

    Args:
        lengths: length of each example, in tokens.
        batch_size: examples per micro-batch.
        step_size: micro-batches per step: gradient accumulation steps × ranks.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], batch_size: int, step_size: int, seed: int) -> None:
        self.lengths = lengths
        # accelerate would drop incomplete batches if this sampler had an attribute `batch_size`
        self.examples_per_batch = batch_size
        self.step_size = step_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.examples_per_batch * self.step_size)) * self.step_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order `__iter__` yields. The trainer calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int | Filler]]:
        batches = make_count_batches(self.lengths, self.examples_per_batch, self.step_size, self.seed, self.epoch)
        for position, batch in enumerate(batches):
            first_of_step = batches[position - position % self.step_size]
            yield batch.tolist() or [Filler(int(first_of_step[0]))]


class BudgetSampler(Sampler[list[int | Filler]]):
    """The batches of a `TokenBudget` as a torch batch sampler, for all ranks, step by step and rank by rank.

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
        self.step_size = step_size
        self.budget = TokenBudget(tokens, packed, step_size, seed)
        self.count = self.budget.count_batches(sources, targets)
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

    def __iter__(self) -> Iterator[list[int | Filler]]:
        batches = self.budget.make_batches(*self.lengths, self.count, self.epoch)
        yield from (batch.tolist() for batch in batches)


StepSampler = BucketSampler | BudgetSampler


def make_sampler(settings: TrainingSettings, cache: Cache, is_packed: bool, num_ranks: int, seed: int) -> StepSampler:
    """Make the sampler that the settings ask for."""
    sources, targets = cache.read_lengths()
    step_size = settings.gradient_accumulation_steps * num_ranks
    if settings.tokens_per_batch is not None:
        return BudgetSampler(sources, targets, settings.tokens_per_batch, is_packed, step_size, seed)
    lengths = sources + targets if settings.group_by_length else np.zeros_like(sources)
    return BucketSampler(lengths, settings.per_device_train_batch_size, step_size, seed)


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
