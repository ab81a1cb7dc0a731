"""Estimate the time of a run from its beginning, which was timed.

    estimate_run_time(times, num_steps=100, num_evaluations=1, num_checkpoints=1, preparing=0.0, share=1.0).high

Steps differ in length, so their mean is known up to a margin: two standard errors of the timed steps' mean.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt
from statistics import fmean, stdev

TIMES_FILE = "times.json"


@dataclass
class Times:
    """When the parts of a run's beginning ended, in seconds since the epoch.

    Args:
        started: the process.
        loaded: everything before training.
        evaluated: the evaluation before the first step; None: nothing is held out.
        end: the process, after the last timed step and its checkpoint.
        error: why the run failed.
    """

    started: float
    loaded: float = 0.0
    evaluated: float | None = None
    steps: list[float] = field(default_factory=list)
    end: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class RunTime:
    """The estimated seconds of a run (`low` to `high`), and the measured seconds that they follow from.

    Args:
        preparing: to read and tokenize the data; 0 for token caches.
        start: until the first step has ended, without the evaluation. The first step is slower than the rest.
        timed_steps: the number of timed steps, without the first.
        step, margin: the mean of their times, and by how much the mean of all steps may differ.
        evaluations, checkpoints: their numbers in the run.
    """

    low: float
    high: float
    preparing: float
    start: float
    timed_steps: int
    step: float
    margin: float
    evaluation: float
    evaluations: int
    checkpoint: float
    checkpoints: int


def estimate_run_time(
    times: Times, num_steps: int, num_evaluations: int, num_checkpoints: int, preparing: float, share: float
) -> RunTime:
    """Estimate the time of a run.

    Args:
        preparing: seconds to prepare all data.
        share: of the held-out examples that were evaluated. The losses of all examples take longer; generating
            predictions for a fixed number of examples doesn't.
    """
    steps = [end - start for start, end in pairwise(times.steps)]
    step, margin = fmean(steps), 2 * stdev(steps) / sqrt(len(steps))
    evaluation = 0.0 if times.evaluated is None else times.evaluated - times.loaded
    num_evaluations = 0 if times.evaluated is None else num_evaluations
    start, checkpoint = times.steps[0] - times.started - evaluation, times.end - times.steps[-1]
    always = preparing + start + num_checkpoints * checkpoint
    low = always + (num_steps - 1) * max(step - margin, min(steps)) + num_evaluations * evaluation
    high = always + (num_steps - 1) * min(step + margin, max(steps)) + num_evaluations * evaluation / share
    high += max(0.0, start - step)  # the report's predictions at the end take at most as long as those at the start
    parts = (evaluation, num_evaluations, checkpoint, num_checkpoints)
    return RunTime(low, high, preparing, start, len(steps), step, margin, *parts)


def count_occasions(strategy: str, interval: int | None, num_steps: int, steps_per_epoch: int) -> int:
    """Count the evaluations or checkpoints of a run with this strategy, including the last step."""
    if strategy == "steps" and interval is not None:
        return -(-num_steps // interval)
    return -(-num_steps // steps_per_epoch) if strategy == "epoch" else 1
