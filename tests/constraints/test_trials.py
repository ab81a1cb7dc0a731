"""Constraints that llguidance would compile for minutes, or crash with, are tried in processes that can be killed."""

import asyncio
import errno
import gc
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress

import psutil
import pytest

from t5tune.constraints import Constraint
from t5tune.constraints.trials import SLOW, Trials, try_constraint
from t5tune.errors import SettingsError, T5TuneError
from tests.support.processes.trials import ENDLESS, list_trials

pytest.importorskip("llguidance")

PATIENCE = 60.0
CRASHING = "start: r0\n" + "".join(f"r{number}: r{number + 1}\n" for number in range(3000)) + 'r3000: "a"\n'


def make_schema(schema: object) -> Constraint:
    return Constraint("json_schema", json.dumps(schema), "json_schema")


async def wait_for_processes(count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while len(list_trials()) != count:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def run_trials() -> AsyncIterator[Trials]:
    with closing(Trials()) as trials:
        yield trials
    assert list_trials() == []


@pytest.mark.slow
def test_trials_end_at_the_limits_and_delay_no_other() -> None:
    async def run() -> None:
        async with run_trials() as trials:
            endless = [
                asyncio.ensure_future(trials.try_constraint(make_schema({**ENDLESS, "title": str(number % 3)})))
                for number in range(12)
            ]
            assert await trials.try_constraint(make_schema({"type": "string"}))
            with pytest.raises(SettingsError, match="^json_schema: not: can't be enforced; remove it$"):
                await trials.try_constraint(make_schema({"not": {}}))
            with pytest.raises(SettingsError, match="^grammar: too complex to compile"):
                await trials.try_constraint(Constraint("grammar", CRASHING, "grammar"))
            assert not any(trial.done() for trial in endless)
            await wait_for_processes(1 + SLOW.max_running)  # equal constraints share a trial
            for trial in endless:
                with pytest.raises(SettingsError, match="^json_schema: too complex to compile"):
                    await trial
            await wait_for_processes(1)
            with pytest.raises(SettingsError, match="^json_schema: too complex to compile"):
                await trials.try_constraint(make_schema({**ENDLESS, "title": "0"}))
            assert len(list_trials()) == 1  # the refusal was remembered

    asyncio.run(run())


@pytest.mark.slow
def test_a_killed_process_is_started_again() -> None:
    async def run() -> None:
        async with run_trials() as trials:
            assert await trials.try_constraint(make_schema({"type": "string"}))
            for process in list_trials():
                with suppress(psutil.NoSuchProcess):  # the finished trial ends by itself
                    process.kill()
                    process.wait()
            assert await trials.try_constraint(make_schema({"type": "array"}))

    asyncio.run(run())


def test_closing_ends_trials_that_are_running() -> None:
    async def run() -> None:
        async with run_trials() as trials:
            endless = asyncio.ensure_future(trials.try_constraint(make_schema(ENDLESS)))
            await wait_for_processes(2)
            trials.close()
            assert list_trials() == []
            endless.cancel()

    asyncio.run(run())


@pytest.mark.slow
def test_a_command_whose_trial_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(T5TuneError, match=r"^regex: can't be compiled now: .* unavailable; try again"):
        try_constraint(Constraint("regex", "a+", "regex"))
    gc.collect()  # a socket that it left open would be a warning, and so an error
