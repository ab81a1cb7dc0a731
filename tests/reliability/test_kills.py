"""kill -9 at any moment, often inside of a save: each run resumes, to the bits of one that wasn't killed."""

import random
import signal
from pathlib import Path

import pytest

from t5tune.commands.train import train
from t5tune.training.checkpoint import STAGED
from tests.support.runs import (
    LONG,
    STEPS,
    ZERO3,
    adapter,
    below,
    is_running,
    kill,
    last_step,
    settings,
    start,
    whole_steps,
)

KILLS = {"one process": 50 if LONG else 3, "zero3": 20 if LONG else 1}
OFTEN = ("--save-steps=1", "--save-total-limit=2")


@pytest.mark.parametrize("kind", KILLS)
def test_killed_runs_resume_to_the_same_bits(
    kind: str, untied_base: Path, conversations: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = request.getfixturevalue("straight" if kind == "one process" else "straight_zero3")
    more = (*OFTEN, *(() if kind == "one process" else ZERO3))
    rng = random.Random(7)
    inside = 0
    for number in range(KILLS[kind]):
        run = tmp_path / f"run-{number}"
        with start(untied_base, conversations, run, *more) as running:
            step = rng.randint(1, STEPS - 4)
            saving = number % 2 == 0
            running.until(lambda: last_step(run) >= step and (not saving or any(run.glob(f"{STAGED}*"))))  # noqa: B023
            processes = [*below(running.process.pid), running.process.pid]
            kill(running.process.pid, signal.SIGKILL)
            inside += any(run.glob(f"{STAGED}*"))
            running.until_gone(processes)
        assert whole_steps(run), "there was a checkpoint before"
        if kind == "one process":
            train(settings(untied_base, conversations, run, save_steps=1, save_total_limit=2))
        else:
            with start(untied_base, conversations, run, *more) as running:
                assert running.end() == 0, running.log.read_text()[-3000:]
        assert adapter(run) == expected
        assert not any(run.glob(f"{STAGED}*"))
        assert not any(map(is_running, processes))
    assert inside >= 0.3 * KILLS[kind]
