"""The order of an epoch's examples, its batches, and how much of them is padding.

Everything is computed from lengths, seed and epoch alone, so a resumed run continues exactly where it stopped.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STEPS_PER_WINDOW = 64
BATCHES_PER_WINDOW = 512
MAX_DRAWS = 16
# at this many attended tokens, a token's attention costs about as much as the rest of the layer does for that token
ATTENTION_BREAK_EVEN = 4096

Integers = npt.NDArray[np.int64]


def epoch_order(lengths: Integers, step_size: int, seed: int, epoch: int) -> Integers:
    """Shuffle the examples, sort them by length within windows of STEPS_PER_WINDOW steps, then shuffle the steps.

    The examples of a step have similar lengths, so every rank computes on little padding.

    Args:
        step_size: examples per optimizer step, over all accumulation steps and ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = STEPS_PER_WINDOW * step_size
    for start in range(0, len(order), window):  # in place: a copy would take 80 MB for ten million examples
        part = order[start : start + window]
        part[:] = part[np.argsort(lengths[part], kind="stable")]
    # only complete steps are shuffled: an incomplete last step anywhere else would shift all steps after it
    whole = len(order) // step_size * step_size
    order[:whole] = rng.permutation(order[:whole].reshape(-1, step_size)).ravel()
    return order


def make_count_batches(lengths: Integers, batch_size: int, step_size: int, seed: int, epoch: int) -> Iterator[Integers]:
    """Cut `epoch_order` into an epoch's micro-batches of all ranks, step by step and rank by rank.

    The last step has the remaining examples, divided into the same number of micro-batches as in every step, so that
    a step's examples don't depend on the division. If examples run short, its last micro-batches are empty.

    Args:
        lengths: tokens of each example; zeros don't group examples by length.
        step_size: micro-batches per optimizer step, over all accumulation steps and ranks.
    """
    examples = batch_size * step_size
    order = epoch_order(lengths, examples, seed, epoch)
    whole = len(order) // examples * examples
    yield from order[:whole].reshape(-1, batch_size)
    yield from np.array_split(order[whole:], step_size) if whole < len(order) else ()


def compute_padding_share(sources: Integers, targets: Integers, order: Integers, batch_size: int) -> float:
    """Compute the share of padding, 0 to 1, in batches that are cut from `order`."""
    useful = int(sources.sum() + targets.sum())
    padded = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded += len(batch) * int(sources[batch].max() + targets[batch].max())
    return 1 - useful / padded


@dataclass(frozen=True)
class TokenBudget:
    """A maximum number of source and target tokens per micro-batch, at least the length of the longest example.

    Args:
        packed: whether batches have no padding; otherwise their padding counts toward `tokens`.
        step_size: micro-batches per optimizer step, over all accumulation steps and ranks.
    """

    tokens: int
    packed: bool
    step_size: int
    seed: int

    def count_batches(self, sources: Integers, targets: Integers) -> int:
        """Count the micro-batches that `make_batches` makes in every epoch: a multiple of `step_size`."""
        drawn = len(_fill_batches(sources, targets, self.tokens, self.packed, np.random.default_rng(self.seed)))
        return -(-drawn // self.step_size) * self.step_size

    def bound_batches(self, num_examples: int, num_tokens: int, longest: int) -> int:
        """Bound the number of micro-batches of any examples, not yet rounded to whole steps.

        Args:
            longest: tokens of the longest example; with padding, of the longest source and the longest target.
        """
        if not self.packed:
            return -(-num_examples // max(1, self.tokens // longest))
        # a batch has more than `tokens` together with the next batch, and also with the longest example
        pairs, rest = divmod(num_tokens, self.tokens + 1)
        return min(2 * pairs + bool(rest), (num_tokens - 1) // (self.tokens + 1 - longest) + 1)

    def make_batches(self, sources: Integers, targets: Integers, count: int, epoch: int) -> list[Integers]:
        """Make an epoch's micro-batches, with every example once.

        Packed examples are shuffled. Padded examples are first sorted by source and target length within shuffled
        windows. The micro-batches of a step cost about the same, and the steps are shuffled. With the same `tokens` and
        `step_size`, a step has the same examples on any number of ranks.

        Args:
            count: the result of `count_batches`; at most the number of examples.
        """
        for draw in range(MAX_DRAWS):  # other orders may need more batches than `count`
            rng = np.random.default_rng([self.seed, epoch, draw])
            batches = _fill_batches(sources, targets, self.tokens, self.packed, rng)
            if len(batches) <= count:
                break
        else:  # `count` was computed from this order, so it always fits
            batches = _fill_batches(sources, targets, self.tokens, self.packed, np.random.default_rng(self.seed))
        batches = _split_largest(batches, count)
        costs = [estimate_cost(sources[batch], targets[batch], self.packed) for batch in batches]
        steps = np.argsort(costs, kind="stable").reshape(-1, self.step_size)
        return [batches[index] for index in rng.permutation(steps).ravel()]


def estimate_cost(sources: Integers, targets: Integers, packed: bool) -> float:
    """Estimate the compute of a batch, in units of one token's cost without attention."""
    if not packed:
        sources, targets = np.full_like(sources, sources.max()), np.full_like(targets, targets.max())
    attention = sources * sources + targets * (targets + sources)
    return float((sources + targets).sum() + attention.sum() / ATTENTION_BREAK_EVEN)


def _fill_batches(
    sources: Integers, targets: Integers, tokens: int, packed: bool, rng: np.random.Generator
) -> list[Integers]:
    order = rng.permutation(len(sources))
    if packed:
        starts = _find_packed_starts((sources + targets)[order], tokens)
    else:
        width = -(-BATCHES_PER_WINDOW * tokens * len(order) // int((sources + targets).sum()))
        windows = [order[start : start + width] for start in range(0, len(order), width)]
        order = np.concatenate([_sort_by_length(window, sources, targets, tokens) for window in windows])
        starts = _find_padded_starts(sources[order], targets[order], tokens)
    return [order[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def _find_packed_starts(lengths: Integers, tokens: int) -> list[int]:
    ends = np.cumsum(lengths)
    starts = [0]
    while starts[-1] < len(lengths):
        before = ends[starts[-1] - 1] if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, before + tokens, "right")))
    return starts


def _find_padded_starts(sources: Integers, targets: Integers, tokens: int) -> list[int]:
    starts, longest_source, longest_target = [0], 0, 0
    for position, (source, target) in enumerate(zip(sources.tolist(), targets.tolist(), strict=True)):
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if (position + 1 - starts[-1]) * (longest_source + longest_target) > tokens:
            starts.append(position)
            longest_source, longest_target = source, target
    return [*starts, len(sources)]


def _sort_by_length(window: Integers, sources: Integers, targets: Integers, tokens: int) -> Integers:
    """Sort a window by source length, then by target length within groups of several batches.

    Target lengths alternate between ascending and descending, so that neighboring groups meet at similar lengths.
    """
    window = window[np.argsort(sources[window], kind="stable")]
    batch_of = np.cumsum((sources + targets)[window]) // tokens
    group_of = batch_of // max(1, round(batch_of[-1] ** 0.5))
    signed = np.where(group_of % 2, -targets[window], targets[window])
    return window[np.lexsort((signed, group_of))]


def _split_largest(batches: list[Integers], count: int) -> list[Integers]:
    heap = [(-len(batch), position, batch) for position, batch in enumerate(batches)]
    heapq.heapify(heap)
    for position in range(len(batches), count):
        _, _, batch = heapq.heappop(heap)
        middle = (len(batch) + 1) // 2
        for number, part in enumerate((batch[:middle], batch[middle:])):
            heapq.heappush(heap, (-len(part), position * 2 + number + len(batches), part))
    return [batch for _, _, batch in sorted(heap, key=lambda item: item[1])]
