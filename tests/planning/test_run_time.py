"""The time of a run, estimated from its timed beginning, and which steps are timed."""

import pytest

from t5tune.commands.train.timed_run import MAX_STEPS, MIN_STEPS, record
from t5tune.planning.run_time import Times, count_occasions, estimate_run_time
from t5tune.progress import Advanced, Evaluated, Started


def make_times(start: float, steps: list[float], evaluation: float | None, checkpoint: float) -> Times:
    """Make the times of a process that starts at 0, and evaluates before its first step."""
    first = start + (evaluation or 0.0)
    ends = [first + sum(steps[:number]) for number in range(len(steps) + 1)]
    evaluated = None if evaluation is None else 0.5 + evaluation
    return Times(0.0, 0.5, evaluated, ends, ends[-1] + checkpoint)


def test_equal_steps_are_multiplied() -> None:
    time = estimate_run_time(make_times(9.0, [0.5] * 4, 2.0, 0.25), 101, 3, 2, preparing=1.0, share=1.0)
    assert time.low == 1 + 9 + 100 * 0.5 + 3 * 2 + 2 * 0.25
    assert time.high == time.low + 8.5  # the predictions at the end take at most as long as those at the start
    assert (time.timed_steps, time.step, time.margin, time.evaluations) == (4, 0.5, 0, 3)


def test_steps_of_different_lengths_give_a_range() -> None:
    time = estimate_run_time(make_times(2.0, [1.0, 2.0, 3.0, 2.0], None, 0.0), 11, 3, 1, preparing=0.0, share=1.0)
    assert time.step == 2
    assert time.margin == pytest.approx(2 * (2 / 3) ** 0.5 / 2, abs=1e-4)
    assert time.low == pytest.approx(2 + 10 * (2 - time.margin), abs=0.01)
    assert time.high == pytest.approx(2 + 10 * (2 + time.margin), abs=0.01)
    assert time.evaluations == 0  # nothing is held out


def test_the_range_includes_the_fastest_and_the_slowest_step() -> None:
    time = estimate_run_time(make_times(0.0, [1.0, 9.0], None, 0.0), 2, 0, 1, preparing=0.0, share=1.0)
    assert (time.low, time.high) == (1, 9)


def test_evaluating_all_held_out_examples_takes_longer_than_a_share() -> None:
    time = estimate_run_time(make_times(1.0, [1.0, 1.0], 2.0, 0.0), 10, 3, 1, preparing=0.0, share=0.25)
    assert (time.low, time.high) == (1 + 9 + 3 * 2, 1 + 9 + 3 * 8)


@pytest.mark.parametrize(
    ("strategy", "interval", "count"),
    [("no", None, 1), ("steps", 10, 3), ("steps", 25, 1), ("steps", 12, 3), ("steps", 100, 1), ("epoch", None, 3)],
)
def test_the_last_step_is_evaluated_and_saved_once(strategy: str, interval: int | None, count: int) -> None:
    assert count_occasions(strategy, interval, num_steps=25, steps_per_epoch=10) == count


@pytest.mark.parametrize(("seconds_per_step", "steps"), [(0.01, MAX_STEPS), (5.0, MIN_STEPS)])
def test_a_timed_run_stops_after_enough_steps(
    seconds_per_step: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, signals = [100.0], []
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("os.kill", lambda process, number: signals.append(len(times.steps)))
    times = Times(98)
    record(Started("train", 500, "steps"), times)
    record(Advanced("train", 0), times)
    now[0] += 2
    record(Evaluated("train", 0, {"loss": 1.0}, is_best=False), times)
    for step in range(1, steps + 2):
        now[0] += seconds_per_step
        record(Advanced("train", step), times)
    assert (times.loaded, times.evaluated) == (100, 102)
    assert signals == [steps]
    assert len(times.steps) == steps + 1  # the run stops after the next step
