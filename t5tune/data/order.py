"""The order in which an epoch takes its examples, and how much of its batches is padding."""

import numpy as np
import numpy.typing as npt

STEPS_PER_WINDOW = 64

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
