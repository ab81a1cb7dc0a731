"""kill -9 at random moments, often during a save: each run resumes, and ends with the same bits as without a kill."""

import random
import signal
from pathlib import Path

import pytest

from t5tune.commands.train import train
from t5tune.runs.checkpoints import STAGING_PREFIX
from tests.support.processes.runs import (
    LONG,
    STEPS,
    ZERO3,
    is_running,
    list_complete_steps,
    list_descendants,
    make_settings,
    read_adapter,
    read_last_step,
    send_signal,
    start_run,
)

pytestmark = pytest.mark.slow

KILLS = {"one process": 50, "zero3": 20} if LONG else {"one process": 2}
OFTEN = ("--save-steps=1", "--save-total-limit=2")


@pytest.mark.parametrize("kind", KILLS)
def test_killed_runs_resume_to_the_same_bits(
    kind: str, inputs: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = request.getfixturevalue("uninterrupted" if kind == "one process" else "uninterrupted_zero3")
    more = (*OFTEN, *(() if kind == "one process" else ZERO3))
    rng = random.Random(7)
    inside = 0
    for number in range(KILLS[kind]):
        run = tmp_path / f"run-{number}"
        with start_run(*inputs, run, *more) as running:
            step = rng.randint(1, STEPS - 4)
            saving = number % 2 == 0

            def is_time(run: Path = run, step: int = step, saving: bool = saving) -> bool:
                return read_last_step(run) >= step and (not saving or any(run.glob(f"{STAGING_PREFIX}*")))

            running.wait_until(is_time)
            processes = [*list_descendants(running.process.pid), running.process.pid]
            send_signal(running.process.pid, signal.SIGKILL)
            inside += any(run.glob(f"{STAGING_PREFIX}*"))
            running.wait_until_gone(processes)
        assert list_complete_steps(run), "a checkpoint existed before the kill"
        if kind == "one process":
            train(make_settings(*inputs, run, save_steps=1, save_total_limit=2))
        else:
            with start_run(*inputs, run, *more) as running:
                assert running.wait() == 0, running.log.read_text()[-3000:]
        assert read_adapter(run) == expected
        assert not any(run.glob(f"{STAGING_PREFIX}*"))
        assert not any(map(is_running, processes))
    assert inside >= 0.3 * KILLS[kind]
