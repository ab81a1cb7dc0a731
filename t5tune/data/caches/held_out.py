"""Choose the conversations that a cache holds out for evaluation: few change sides when data is added.

The smallest hashes of key and split_seed win. Where texts have labels, each label's texts are divided, so that no label
with two or more texts is missing on a side.
"""

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.data.caches.batching import Integers
from t5tune.data.caches.cache import Cache
from t5tune.data.labels import read_values
from t5tune.data.tokens.span_corruption import mix_bits
from t5tune.errors import DataError
from t5tune.formatting import format_count
from t5tune.label_metrics import MAX_LABELS, MIN_EXAMPLES

Keys = npt.NDArray[np.uint64]
NO_CLASS = -1
MOVES_PER_CLASS = 10


def find_held_out_keys(cache: Cache, held_out: float, split_seed: int) -> Keys:
    """Choose the fraction `held_out` of the conversations, and return their keys.

    If prepare split the cache, this chooses among all of its conversations, as prepare did, so the held-out
    conversations don't depend on the number of training examples.

    Raises:
        DataError: no conversation is left to train on.
    """
    if cache.manifest["eval_fraction"]:
        cache = cache.whole
    unique, rows = np.unique(cache.read_keys(), return_inverse=True)
    count = max(1, round(held_out * len(unique)))
    if count >= len(unique):
        kind = "conversation" if cache.corruption is None and cache.label_task is None else "text"
        problem = f"eval_fraction: {held_out} of {format_count(len(unique), kind)} leaves no {kind}s to train on"
        raise DataError(problem, hint=f"give more {kind}s, or a separate file as eval_data_path")
    order = np.argsort(mix_bits(unique ^ mix_bits(np.array(split_seed, np.uint64))))
    pairs = _list_classes(cache)
    if pairs is not None:
        ranks = np.argsort(order)  # of each key
        examples, classes = pairs
        is_held_out = _divide_classes(ranks[rows[examples]], classes, held_out)
        if is_held_out.any():
            return unique[order[is_held_out]]
    return unique[order[:count]]


def _list_classes(cache: Cache) -> tuple[Integers, Integers] | None:
    """List pairs of an example and a class that it has; an example without a class has NO_CLASS. None: no classes."""
    found = _number_targets(cache) if cache.label_task is None else _read_classes(cache)
    if found is None:
        return None
    sizes = [max(1, len(classes)) for classes in found]
    examples = np.repeat(np.arange(len(found)), sizes)
    return examples, np.concatenate([classes if len(classes) else [NO_CLASS] for classes in found])


def _read_classes(cache: Cache) -> list[Integers] | None:
    assert cache.label_task is not None
    if cache.label_task.objective == "regress":
        return None
    # numbered by the cache, not by the model, whose labels may have a different order
    values = map(read_values, cache.iterate_targets())
    return [np.unique(each[~np.isnan(each)].astype(np.int64)) for each in values]


def _number_targets(cache: Cache) -> list[Integers] | None:
    """Number the different targets, if they are few and repeated, as labels are; otherwise None."""
    if cache.corruption is not None or cache.has_preferences:
        return None
    numbers: dict[bytes, int] = {}
    found = []
    for target in cache.iterate_targets():
        number = numbers.setdefault(target.tobytes(), len(numbers))
        if number == MAX_LABELS:
            return None
        found.append(np.array([number]))
    return found if len(found) >= MIN_EXAMPLES * len(numbers) else None


def _divide_classes(ranks: Integers, classes: Integers, fraction: float) -> npt.NDArray[np.bool_]:
    """Hold out a fraction of the ranks of each class, the lowest first, and return which ranks those are.

    Where ranks have several classes, the rarest class comes first. Then ranks change sides until each class with two or
    more has one on each side, and a class with one has it in training; or until that seems impossible.

    Args:
        ranks: from 0, each at least once; classes: of the rank at the same place.
    """
    ranks, classes = np.unique(np.stack([ranks, classes], 1), axis=0).T
    _, numbers, counts = np.unique(classes, return_inverse=True, return_counts=True)
    members = np.split(ranks[np.argsort(numbers, kind="stable")], np.cumsum(counts)[:-1])
    is_held_out = np.zeros(ranks[-1] + 1, np.bool_)
    is_decided = np.zeros_like(is_held_out)
    for number in np.argsort(counts, kind="stable"):
        of_class = members[number]
        wanted = min(max(1, round(fraction * len(of_class))), len(of_class) - 1)
        missing = max(0, wanted - np.count_nonzero(is_held_out[of_class]))
        is_held_out[of_class[~is_decided[of_class]][:missing]] = True
        is_decided[of_class] = True
    if len(ranks) > len(is_held_out):
        _repair(is_held_out, members, counts, np.split(numbers, np.flatnonzero(np.diff(ranks)) + 1))
    return is_held_out


def _repair(
    is_held_out: npt.NDArray[np.bool_], members: list[Integers], counts: Integers, classes: list[Integers]
) -> None:
    """Move ranks of classes that are missing on a side, at each step the rank that spoils the fewest classes.

    Args:
        members: the ranks of each class; classes: the numbers of each rank's classes.
    """

    def is_missing(number: Any, held_out: Any) -> Any:
        return (held_out == counts[number]) | ((held_out == 0) & (counts[number] > 1))

    def count_after(rank: int) -> Integers:
        own = classes[rank]
        return held_out[own] + (-1 if is_held_out[rank] else 1)

    held_out = np.array([np.count_nonzero(is_held_out[of_class]) for of_class in members])
    queue = deque(np.flatnonzero(is_missing(np.arange(len(counts)), held_out)).tolist())
    for _ in range(MOVES_PER_CLASS * len(counts)):
        if not queue:
            return
        number = queue.popleft()
        if not is_missing(number, held_out[number]):
            continue
        best = min(
            members[number].tolist(), key=lambda rank: np.count_nonzero(is_missing(classes[rank], count_after(rank)))
        )
        held_out[classes[best]] = count_after(best)
        is_held_out[best] ^= True
        queue.extend(each for each in classes[best].tolist() if is_missing(each, held_out[each]))
