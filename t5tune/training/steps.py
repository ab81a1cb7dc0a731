"""The examples of each step: the micro-batches of all ranks, of a fixed size or with a token budget.

sampler = make_sampler(run_plan.steps, seed, examples, is_packed, num_ranks)
loader = DataLoader(ExampleDataset(examples), batch_sampler=sampler, collate_fn=collator)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from t5tune.data.caches.batching import Integers, TokenBudget, make_count_batches
from t5tune.data.caches.examples import Examples
from t5tune.data.tokens.encoding import Example, LabeledExample, PreferencePair
from t5tune.errors import SettingsError
from t5tune.model.loss import IGNORED_LABEL
from t5tune.settings.groups.steps import StepSettings

NOTHING = np.array([IGNORED_LABEL])
"""The target of a dummy example."""
NO_VALUE = np.array([np.nan])
"""The values of a dummy example with labels."""


def is_dummy(example: Example) -> bool:
    """Whether an example fills a micro-batch that would be empty otherwise."""
    return bool((example.target_T == IGNORED_LABEL).any())


class Draw(NamedTuple):
    """An item of a micro-batch.

    Args:
        example: the index of an example.
        repeat: how many times the example was sampled before, which determines the masked spans of a text.
        is_filler: whether this is a dummy: a token of the example's source with nothing to learn, in a micro-batch that
            would be empty otherwise.
    """

    example: int
    repeat: int
    is_filler: bool = False


class ExampleDataset(Dataset[Example]):
    """The examples of a run as a torch Dataset, whose items are chosen by `Draw`, with the reference's values."""

    def __init__(self, examples: Examples, reference: Sequence[tuple[float, float]] | None = None) -> None:
        self.examples = examples
        self.reference = reference

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: Draw) -> Example:
        example = self.examples.read(draw.example, draw.repeat)
        if draw.is_filler and isinstance(example, LabeledExample):
            return replace(example, source_S=example.source_S[-1:], values=NO_VALUE)
        if draw.is_filler:
            example = replace(example, source_S=example.source_S[-1:], target_T=NOTHING)
        if not isinstance(example, PreferencePair):
            return example
        reference = None if self.reference is None else self.reference[draw.example]
        rejected_R = NOTHING if draw.is_filler else example.rejected_R
        return replace(example, reference=reference, rejected_R=rejected_R)


class StepSampler(Sampler[list[Draw]]):
    """The micro-batches of all ranks, step by step and rank by rank, as a torch batch sampler.

    The order depends only on the seed and the epoch, not on any random state. If no examples remain for a micro-batch,
    it gets a dummy example.

    Args:
        draw: draws the examples of an epoch, as `Examples.draw_epoch` does: (indices, earlier samples of each).
        make_batches: makes the micro-batches of an epoch; they contain positions among the drawn examples.
        count: the number of micro-batches, which is the same in every epoch.
        step_size: micro-batches per step: gradient accumulation steps × ranks.
    """

    def __init__(
        self,
        draw: Callable[[int], tuple[Integers, Integers]],
        make_batches: Callable[[int], Iterable[Integers]],
        count: int,
        step_size: int,
    ) -> None:
        # accelerate would drop incomplete batches if this sampler had an attribute `batch_size`
        self.draw = draw
        self.make_batches = make_batches
        self.count = count
        self.step_size = step_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    @property
    def steps_per_epoch(self) -> int:
        return count_steps(self.count, self.step_size, 1)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order `__iter__` yields. The trainer calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Draw]]:
        examples, repeats = self.draw(self.epoch)
        for position, batch in enumerate(self.make_batches(self.epoch)):
            if position % self.step_size == 0:
                first_of_step = batch[:1]
            chosen = batch if len(batch) else first_of_step
            pairs = zip(examples[chosen].tolist(), repeats[chosen].tolist(), strict=True)
            yield [Draw(example, repeat, is_filler=not len(batch)) for example, repeat in pairs]


@dataclass(frozen=True)
class EpochDraws:
    """The examples that each epoch of a run draws.

    Args:
        sources, targets: lengths of all examples, in tokens.
        draw: draws the examples of an epoch, as `Examples.draw_epoch` does; None: every epoch has every example once.
        max_steps: takes precedence over num_epochs.
        longest: the longest example that is ever drawn, in tokens; None: the longest of all examples.
        make_bound: makes a function that bounds an epoch's tokens without drawing it; needed with `draw`.
    """

    sources: Integers
    targets: Integers
    seed: int
    draw: Callable[[int], tuple[Integers, Integers]] | None = None
    num_epochs: float = 1.0
    max_steps: int | None = None
    longest: int | None = None
    make_bound: Callable[[], Callable[[int], int]] | None = None

    def draw_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """Return (indices, how many times each example was sampled before)."""
        if self.draw is not None:
            return self.draw(epoch)
        return np.arange(len(self.sources)), np.broadcast_to(epoch, len(self.sources))

    def read_lengths(self, epoch: int) -> tuple[Integers, Integers]:
        """Return (source lengths, target lengths) of the examples of an epoch, in the order of `draw_epoch`."""
        if self.draw is None:
            return self.sources, self.targets
        indices, _ = self.draw(epoch)
        return self.sources[indices], self.targets[indices]

    def find_largest_count(self, budget: TokenBudget, longest: int) -> int:
        """Find the largest number of micro-batches in an epoch. `longest`: see `TokenBudget.bound_batches`."""
        sources, targets = self.read_lengths(0)
        largest, epoch = budget.count_batches(sources, targets), 1
        if self.make_bound is None:  # all epochs have the same examples
            return largest
        bound = self.make_bound()  # drawing 100,000 epochs of one step takes a minute, bounding them two seconds
        while epoch < (self.num_epochs if self.max_steps is None else self.max_steps / (largest // budget.step_size)):
            if budget.bound_batches(len(sources), bound(epoch), longest) > largest:
                largest = max(largest, budget.count_batches(*self.read_lengths(epoch)))
            epoch += 1
        return largest


def make_sampler(settings: StepSettings, seed: int, examples: Examples, is_packed: bool, num_ranks: int) -> StepSampler:
    """Make the sampler that the settings ask for."""
    draw = None if examples.has_every_example_once else partial(examples.draw_epoch, seed)
    sources, targets = examples.read_lengths()
    if examples.has_preferences and not is_packed and settings.tokens_per_batch is not None:
        targets = 2 * examples.read_longest_targets()  # both targets of a pair are padded to the longest
    longest = int((sources + targets)[examples.list_drawn()].max())
    make_bound = None if draw is None else partial(examples.make_epoch_bound, sources + targets)
    draws = EpochDraws(sources, targets, seed, draw, settings.num_train_epochs, settings.max_steps, longest, make_bound)
    step_size = settings.gradient_accumulation_steps * num_ranks
    if settings.tokens_per_batch is not None:
        return make_budget_sampler(draws, settings.tokens_per_batch, is_packed, step_size)
    return make_count_sampler(draws, settings.per_device_train_batch_size, step_size, settings.group_by_length)


def count_steps(num_batches: int, step_size: int, epochs: float) -> int:
    """Count the steps of a run with `num_batches` micro-batches per epoch, as Hugging Face's Trainer does."""
    return math.ceil(-(-num_batches // step_size) * epochs)


def count_all_steps(sampler: StepSampler, args: Any) -> int:
    """Count the steps of a run, given the Trainer's arguments."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return count_steps(len(sampler), sampler.step_size, args.num_train_epochs)


def make_count_sampler(draws: EpochDraws, batch_size: int, step_size: int, group_by_length: bool) -> StepSampler:
    """Make the sampler of micro-batches with a fixed number of examples."""

    def make_batches(epoch: int) -> Iterator[Integers]:
        sources, targets = draws.read_lengths(epoch)
        grouped = sources + targets if group_by_length else np.zeros_like(sources)
        return make_count_batches(grouped, batch_size, step_size, draws.seed, epoch)

    count = -(-len(draws.draw_epoch(0)[0]) // (batch_size * step_size)) * step_size
    return StepSampler(draws.draw_epoch, make_batches, count, step_size)


def make_budget_sampler(draws: EpochDraws, tokens: int, packed: bool, step_size: int) -> StepSampler:
    """Make the sampler of micro-batches with a token budget."""
    longest = int((draws.sources + draws.targets).max()) if draws.longest is None else draws.longest
    if longest > tokens:
        raise SettingsError(
            f"tokens_per_batch: {tokens}: the longest example has {longest} source and target tokens",
            hint=f"set at least {longest}, or shorten the examples with model_max_length",
        )
    budget = TokenBudget(tokens, packed, step_size, draws.seed)
    count = draws.find_largest_count(budget, longest if packed else int(draws.sources.max() + draws.targets.max()))
    if count > (num_examples := len(draws.draw_epoch(0)[0])):
        raise SettingsError(
            f"tokens_per_batch: {tokens}: too few examples ({num_examples}) for a step of {step_size} batches "
            "(gradient_accumulation_steps × processes)"
        )
    return StepSampler(
        draws.draw_epoch, lambda epoch: budget.make_batches(*draws.read_lengths(epoch), count, epoch), count, step_size
    )
