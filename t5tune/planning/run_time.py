"""Estimate the time of a run from its first steps, which were timed.

    beginning = Beginning(seconds_to_first_step=9.0, steps=(0.5, 0.7), evaluation=2.0, checkpoint=0.1)
    estimate_run_time(beginning, num_steps=100, num_evaluations=1, num_checkpoints=1).high

Steps differ in length, so their mean is known up to a margin: two standard errors of the timed steps' mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev


@dataclass(frozen=True)
class Beginning:
    """Measured seconds of a run's beginning.

    Args:
        seconds_to_first_step: from the start of the process to the end of the first step, without the evaluation. The
            first step is slower than the rest.
        steps: the time of each step after the first.
        evaluation: None: nothing is held out.
        checkpoint: to save a checkpoint and end the process.
    """

    seconds_to_first_step: float
    steps: Sequence[float]
    evaluation: float | None
    checkpoint: float


@dataclass(frozen=True)
class RunTime:
    """The estimated seconds of a run (`low` to `high`), and the measured seconds that they follow from.

    Args:
        preparing: to read and tokenize the data; 0 for token caches.
        start: until the first step has ended.
        timed_steps: the number of timed steps, without the first.
        step, margin: the mean of their times, and by how much the mean of all steps may differ.
    """

    low: float
    high: float
    timed_steps: int
    step: float
    margin: float
    preparing: float
    start: float
    evaluation: float
    evaluations: int
    checkpoint: float
    checkpoints: int


def estimate_run_time(
    beginning: Beginning, num_steps: int, num_evaluations: int, num_checkpoints: int, preparing: float, share: float
) -> RunTime:
    """Estimate the time of a run.

    Args:
        preparing: seconds to prepare all data.
        share: of the held-out examples that were evaluated. The losses of all examples take longer; generating
            predictions for a fixed number of examples doesn't.
    """
    times = beginning.steps
    step, margin = fmean(times), 2 * stdev(times) / sqrt(len(times))
    evaluation = beginning.evaluation or 0.0
    always = preparing + beginning.seconds_to_first_step + num_checkpoints * beginning.checkpoint
    # the report's predictions at the end take at most as long as those before the first step
    end = max(0.0, beginning.seconds_to_first_step - step)
    fast, slow = max(step - margin, min(times)), min(step + margin, max(times))
    return RunTime(
        low=round(always + (num_steps - 1) * fast + num_evaluations * evaluation, 3),
        high=round(always + (num_steps - 1) * slow + num_evaluations * evaluation / share + end, 3),
        timed_steps=len(times),
        step=round(step, 4),
        margin=round(margin, 4),
        preparing=round(preparing, 3),
        start=round(beginning.seconds_to_first_step, 3),
        evaluation=round(evaluation, 3),
        evaluations=num_evaluations if beginning.evaluation is not None else 0,
        checkpoint=round(beginning.checkpoint, 3),
        checkpoints=num_checkpoints,
    )


def count_occasions(strategy: str, interval: int | None, num_steps: int, steps_per_epoch: int) -> int:
    """Count the evaluations or checkpoints of a run with this strategy, of which one is after the last step."""
    if strategy == "steps" and interval is not None:
        return -(-num_steps // interval)
    return -(-num_steps // steps_per_epoch) if strategy == "epoch" else 1
