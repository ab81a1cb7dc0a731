"""The order in which an epoch takes its examples, its batches, and how much of them is padding.

All of it follows from lengths, seed and epoch alone, so a resumed run goes on exactly where it was.
"""

import heapq

import numpy as np
import numpy.typing as npt

STEPS_PER_WINDOW = 64
BATCHES_PER_WINDOW = 512
DRAWS = 16
# a token's attention to this many others costs about what all the rest of a layer costs for it
ATTENTION_EVEN = 4096

Integers = npt.NDArray[np.int64]


def epoch_order(lengths: Integers, step_size: int, seed: int, epoch: int) -> Integers:
    """Shuffled, then sorted by length in windows of some steps, then the steps shuffled.

    A step's examples are of about the same length, so little of it is padding, on every rank.

    Args:
        lengths: of each example, in tokens.
        step_size: examples per optimizer step, over accumulation and ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = STEPS_PER_WINDOW * step_size
    parts = [order[start : start + window] for start in range(0, len(order), window)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    # whole steps change places; an odd rest stays last, or it would shift all behind it
    whole = len(order) // step_size * step_size
    steps = rng.permutation(order[:whole].reshape(-1, step_size))
    return np.concatenate([steps.ravel(), order[whole:]])


def padding_share(sources: Integers, targets: Integers, order: Integers, batch_size: int) -> float:
    """The share of padding among the tokens of batches that are cut from `order`, 0 to 1."""
    useful = int(sources.sum() + targets.sum())
    padded = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        padded += len(batch) * int(sources[batch].max() + targets[batch].max())
    return 1 - useful / padded


def num_batches(sources: Integers, targets: Integers, tokens: int, packed: bool, step_size: int, seed: int) -> int:
    """Micro-batches of every epoch of `budget_batches`: whole steps of `step_size`, the same number in each epoch."""
    drawn = len(_fill(sources, targets, tokens, packed, np.random.default_rng(seed)))
    return -(-drawn // step_size) * step_size


def budget_batches(
    sources: Integers, targets: Integers, tokens: int, packed: bool, step_size: int, count: int, seed: int, epoch: int
) -> list[Integers]:
    """An epoch's micro-batches of at most `tokens` source and target tokens, with every example once.

    Packed examples are drawn at random. Padded ones are sorted by source and target in shuffled windows first, and
    their padding counts. The micro-batches of a step cost about the same, and the steps are shuffled. As long as
    `tokens` and `step_size` stay, a step holds the same examples on any number of ranks.

    Args:
        tokens: no less than the longest example's.
        step_size: micro-batches per optimizer step, over accumulation and ranks.
        count: of `num_batches`, and no more than there are examples.
    """
    for draw in range(DRAWS):
        rng = np.random.default_rng([seed, epoch, draw])
        batches = _fill(sources, targets, tokens, packed, rng)
        if len(batches) <= count:
            break
    else:  # the order that `count` was found with
        batches = _fill(sources, targets, tokens, packed, np.random.default_rng(seed))
    batches = _split(batches, count)
    costs = [_cost(sources[batch], targets[batch], packed) for batch in batches]
    steps = np.argsort(costs, kind="stable").reshape(-1, step_size)
    return [batches[index] for index in rng.permutation(steps).ravel()]


def _fill(sources: Integers, targets: Integers, tokens: int, packed: bool, rng: np.random.Generator) -> list[Integers]:
    """Batches that are full: the next example would not fit."""
    order = rng.permutation(len(sources))
    if packed:
        ends = np.cumsum((sources + targets)[order])
        starts = [0]
        while starts[-1] < len(order):
            before = ends[starts[-1] - 1] if starts[-1] else 0
            starts.append(int(np.searchsorted(ends, before + tokens, "right")))
    else:
        width = -(-BATCHES_PER_WINDOW * tokens * len(order) // int((sources + targets).sum()))
        windows = [order[start : start + width] for start in range(0, len(order), width)]
        order = np.concatenate([_alike(window, sources, targets, tokens) for window in windows])
        starts, longest_source, longest_target = [0], 0, 0
        for place, (source, target) in enumerate(zip(sources[order].tolist(), targets[order].tolist(), strict=True)):
            longest_source, longest_target = max(longest_source, source), max(longest_target, target)
            if (place + 1 - starts[-1]) * (longest_source + longest_target) > tokens:
                starts.append(place)
                longest_source, longest_target = source, target
        starts.append(len(order))
    return [order[start:end] for start, end in zip(starts, starts[1:], strict=False)]


def _alike(window: Integers, sources: Integers, targets: Integers, tokens: int) -> Integers:
    """The window sorted by source, then by target within groups of some batches, to and fro."""
    window = window[np.argsort(sources[window], kind="stable")]
    batch_of = np.cumsum((sources + targets)[window]) // tokens
    group_of = batch_of // max(1, round(batch_of[-1] ** 0.5))
    signed = np.where(group_of % 2, -targets[window], targets[window])
    return window[np.lexsort((signed, group_of))]


def _split(batches: list[Integers], count: int) -> list[Integers]:
    """Halve the batches of most examples until there are `count`."""
    heap = [(-len(batch), place, batch) for place, batch in enumerate(batches)]
    heapq.heapify(heap)
    for place in range(len(batches), count):
        _, _, batch = heapq.heappop(heap)
        middle = (len(batch) + 1) // 2
        for number, part in enumerate((batch[:middle], batch[middle:])):
            heapq.heappush(heap, (-len(part), place * 2 + number + len(batches), part))
    return [batch for _, _, batch in sorted(heap, key=lambda item: item[1])]


def _cost(sources: Integers, targets: Integers, packed: bool) -> float:
    """What a batch costs to compute, in tokens whose attention is free."""
    if not packed:
        sources, targets = np.full_like(sources, sources.max()), np.full_like(targets, targets.max())
    attention = sources * sources + targets * (targets + sources)
    return float((sources + targets).sum() + attention.sum() / ATTENTION_EVEN)
