"""Batches of a token cache's examples: padded or packed, with a fixed number of examples or a token budget."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from t5tune.data.batching import Integers, TokenBudget, make_count_batches
from t5tune.data.cache import Cache
from t5tune.data.encoding import Example
from t5tune.errors import SettingsError
from t5tune.model.flex_attention import divide_rows
from t5tune.model.loss import IGNORED_LABEL
from t5tune.model.segments import Segments
from t5tune.settings import TrainSettings


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


class StepSampler(Sampler[list[int | Filler]]):
    """The micro-batches of all ranks, step by step and rank by rank, as a torch batch sampler.

    The order depends only on the seed and the epoch, not on any random state. A micro-batch for which no examples
    remain gets a `Filler`.

    Args:
        make_batches: makes the micro-batches of an epoch.
        count: their number, which is the same in every epoch.
        step_size: micro-batches per step: gradient accumulation steps × ranks.
    """

    def __init__(self, make_batches: Callable[[int], list[Integers]], count: int, step_size: int) -> None:
        # accelerate would drop incomplete batches if this sampler had an attribute `batch_size`
        self.make_batches = make_batches
        self.count = count
        self.step_size = step_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order `__iter__` yields. The trainer calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int | Filler]]:
        batches = self.make_batches(self.epoch)
        for position, batch in enumerate(batches):
            first_of_step = batches[position - position % self.step_size]
            yield batch.tolist() or [Filler(int(first_of_step[0]))]


def make_sampler(settings: TrainSettings, cache: Cache, is_packed: bool, num_ranks: int) -> StepSampler:
    """Make the sampler that the settings ask for."""
    sources, targets = cache.read_lengths()
    step_size = settings.gradient_accumulation_steps * num_ranks
    if settings.tokens_per_batch is not None:
        return make_budget_sampler(sources, targets, settings.tokens_per_batch, is_packed, step_size, settings.seed)
    lengths = sources + targets if settings.group_by_length else np.zeros_like(sources)
    return make_count_sampler(lengths, settings.per_device_train_batch_size, step_size, settings.seed)


def count_steps(num_batches: int, step_size: int, epochs: float) -> int:
    """Count the steps of a run with so many micro-batches per epoch, as Hugging Face's Trainer does."""
    return math.ceil(-(-num_batches // step_size) * epochs)


def make_count_sampler(lengths: Integers, batch_size: int, step_size: int, seed: int) -> StepSampler:
    """Make the sampler of `make_count_batches`: a fixed number of examples per micro-batch."""
    count = -(-len(lengths) // (batch_size * step_size)) * step_size
    return StepSampler(lambda epoch: make_count_batches(lengths, batch_size, step_size, seed, epoch), count, step_size)


def make_budget_sampler(
    sources: Integers, targets: Integers, tokens: int, packed: bool, step_size: int, seed: int
) -> StepSampler:
    """Make the sampler of a `TokenBudget`.

    Raises:
        SettingsError: an example is longer than the budget, or there are fewer examples than micro-batches in a step.
    """
    longest = int((sources + targets).max())
    if longest > tokens:
        raise SettingsError(
            f"tokens_per_batch: {tokens}: the longest example has {longest} source and target tokens",
            hint=f"set at least {longest}, or shorten the examples with model_max_length",
        )
    budget = TokenBudget(tokens, packed, step_size, seed)
    count = budget.count_batches(sources, targets)
    if count > len(sources):
        raise SettingsError(
            f"tokens_per_batch: {tokens}: too few examples ({len(sources)}) for a step of {step_size} batches "
            "(gradient_accumulation_steps × processes)"
        )
    return StepSampler(lambda epoch: budget.make_batches(sources, targets, count, epoch), count, step_size)


class PackedCollator:
    """Concatenates the examples of a batch in one row (see model/attention.py).

    Args:
        pad_token_id: what fills rows up to whole blocks.
        divides_rows: whether to divide rows into blocks, for attention in one kernel.
    """

    def __init__(self, decoder_start_token_id: int, pad_token_id: int, divides_rows: bool = False) -> None:
        self.decoder_start_token_id = decoder_start_token_id
        self.pad_token_id = pad_token_id
        self.divides_rows = divides_rows

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        sources = [example.source_S for example in examples]
        targets = [example.target_T for example in examples]
        shifted = _shift_right(targets, self.decoder_start_token_id)
        segments = Segments(tuple(map(len, sources)), tuple(map(len, targets)))
        if self.divides_rows:
            segments = replace(segments, rows=(rows := divide_rows(segments.sources, segments.targets)))
            sources.append(np.full(rows.source_length - sum(segments.sources), self.pad_token_id))
            padding = rows.target_length - sum(segments.targets)
            shifted.append(np.full(padding, self.pad_token_id))
            targets.append(np.full(padding, IGNORED_LABEL))
        return {
            "input_ids": _concatenate(sources),
            "decoder_input_ids": _concatenate(shifted),
            "labels": _concatenate(targets),
            "packing": segments,
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
