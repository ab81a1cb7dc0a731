"""A signal at any moment: a sealed checkpoint, 143, and the same bits after resuming."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.train import train
from t5tune.distributed.signals import HANDED_ON, SECONDS_APART, listening
from t5tune.errors import Stopped
from t5tune.progress import Advanced, Event, Started
from tests.conftest import REPOSITORY
from tests.support.forks import Forks
from tests.support.runs import (
    LONG,
    STEPS,
    ZERO3,
    Running,
    adapter,
    arguments,
    below,
    kill,
    settings,
    start,
    whole_steps,
)


def stop_at(event: Event, number: int = signal.SIGTERM) -> Any:
    """A report that signals this process when the event comes."""

    def report(seen: Event) -> None:
        if seen == event:
            os.kill(os.getpid(), number)

    return report


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("step", [0, 7, STEPS])
def test_a_signal_seals_the_step_and_resumes_to_the_same_bits(
    step: int, number: signal.Signals, untied_base: Path, conversations: Path, straight: bytes, tmp_path: Path
) -> None:
    chosen = settings(untied_base, conversations, tmp_path / "run", save_steps=1000)
    event = Advanced("train", step - 1) if step else Started("train", STEPS, "steps")
    with pytest.raises(Stopped, match=f"{number.name}.*checkpoint-{step}") as stopped:
        train(chosen, stop_at(event, number))
    assert stopped.value.exit_code == (130 if number == signal.SIGINT else 143)
    assert whole_steps(tmp_path / "run") == [step]
    train(chosen)
    assert adapter(tmp_path / "run") == straight


def test_ctrl_c_seals_though_it_ends_what_read_the_log_too(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ("--save-steps=100000", "--max-steps=100000")
    command = [sys.executable, "-m", "t5tune", *arguments(untied_base, conversations, run, *more)]
    read, write = os.pipe()
    with open(write, "wb") as pipe, Running(command, run, pipe) as running:
        pipe.close()
        running.until_step(3)
        os.close(read)
        running.process.send_signal(signal.SIGINT)
        assert running.end() == 130
    assert len(whole_steps(run)) == 1


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_evaluation_ends_early_and_is_made_after_resuming(
    strategy: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    more = {"eval_fraction": 0.3, "eval_strategy": strategy, "per_device_eval_batch_size": 2, "save_steps": 1000}
    more |= {"metric_for_best_model": "loss", "eval_steps": 8 if strategy == "steps" else None}
    chosen = settings(untied_base, conversations, tmp_path / "straight", **more)
    expected = train(chosen).eval["loss"]
    evaluated = evaluations(tmp_path / "straight")
    first = min(evaluated)
    chosen = chosen.model_copy(update={"output_dir": tmp_path / "stopped"})
    with pytest.raises(Stopped):  # the step is over, and nobody asks again before the evaluation
        train(chosen, stop_at(Advanced("train", first)))
    assert evaluations(tmp_path / "stopped") == {}
    assert whole_steps(tmp_path / "stopped") == [first]
    assert train(chosen).eval["loss"] == expected
    assert evaluations(tmp_path / "stopped") == evaluated
    assert adapter(tmp_path / "straight") == adapter(tmp_path / "stopped")


def evaluations(run: Path) -> dict[int, float]:
    """Step -> loss of the held-out examples."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def test_a_signal_while_the_data_is_prepared_leaves_nothing_half_made(
    untied_base: Path, conversations: Path, straight: bytes, tmp_path: Path
) -> None:
    chosen = settings(untied_base, conversations, tmp_path / "run")
    with pytest.raises(Stopped, match="before training began"):
        train(chosen, stop_at(Started("prepare", None, "records")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.yaml"]
    train(chosen)
    assert adapter(tmp_path / "run") == straight


def stop_in_prepare() -> None:
    """From here on rank 0 gets a SIGTERM when it begins to prepare the data."""
    import t5tune.commands.train as module

    prepare = module.prepare

    def interrupted(settings: Any, report: Any, **options: Any) -> Any:
        return prepare(settings, stop_at(Started("prepare", None, "records")), **options)

    module.prepare = interrupted


def test_a_signal_while_rank_0_prepares_stops_all(
    forks: Forks, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(untied_base, conversations, run, "--max-steps=2", "--report-samples=0")
    done = forks.run(command, 2, ["tests.reliability.test_stopping:stop_in_prepare()"])
    assert done.codes == [143, 143], done.log
    told = [line for line in done.log.splitlines() if line.startswith("error: ")]
    assert len(told) == 2
    assert all("stopped by SIGTERM before training began" in line for line in told)
    assert [path.name for path in run.iterdir()] == ["settings.yaml"]
    assert forks.run(command, 2).codes == [0, 0]


@pytest.mark.skipif(not LONG, reason="make reliability")
def test_a_signal_to_torchrun_while_rank_0_prepares_leaves_nothing_half_made(untied_base: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "many.jsonl", tmp_path / "run"
    lines = [
        json.dumps({"source": f"how many are {number}?", "target": f"{number} lamps"}) for number in range(200_000)
    ]
    data.write_text("\n".join(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "t5tune"]
    command = [*torchrun, *arguments(untied_base, data, run, "--max-steps=2", "--report-samples=0")]
    with Running(command, run) as running:
        running.until(lambda: any(run.glob(".data.new-*/*")))
        workers = running.workers()
        kill(running.process.pid, signal.SIGTERM)
        assert running.end() != 0
        running.until_gone(workers)
    assert "stopped by SIGTERM before training began" in running.log.read_text()
    assert [path.name for path in run.iterdir()] == ["settings.yaml"]
    with Running(command, run) as running:
        assert running.end() == 0, running.log.read_text()[-3000:]


def test_a_signal_to_one_rank_stops_all_and_resumes_to_the_same_bits(
    untied_base: Path, conversations: Path, straight_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with start(untied_base, conversations, run, *ZERO3, "--save-steps=1000") as running:
        running.until_step(5)
        kill(running.workers()[1], signal.SIGUSR1)
        assert running.end() == 143, running.log.read_text()
    (step,) = whole_steps(run)
    assert 5 <= step < STEPS
    assert f"checkpoint-{step}" in running.log.read_text()
    assert "Traceback" not in running.log.read_text()
    with start(untied_base, conversations, run, *ZERO3) as running:
        assert running.end() == 0, running.log.read_text()
    assert adapter(run) == straight_zero3


def test_control_c_seals_the_work_of_two_ranks_and_is_told_once(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """A terminal sends it to the launcher and to each rank."""
    run = tmp_path / "run"
    with start(untied_base, conversations, run, "--num-processes=2", "--save-steps=1000") as running:
        running.until_step(3)
        for pid in (running.process.pid, *running.workers()):
            kill(pid, signal.SIGINT)
        assert running.end() == 130, running.log.read_text()
    (step,) = whole_steps(run)
    assert 3 <= step < STEPS
    told = running.log.read_text()
    assert f"error: stopped by SIGINT; all work stands in {run}/checkpoint-{step}" in told
    assert told.count("Ctrl-C once more stops at once") == 1
    assert "Traceback" not in told


def test_control_c_is_not_for_what_a_script_put_into_the_background() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.name is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_stops_at_once_and_one_that_comes_two_ways_does_not(tmp_path: Path) -> None:
    waiting = """
import time
from t5tune.distributed.signals import listening
with listening() as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        print(stop.name, flush=True)
"""
    with Running([sys.executable, "-c", waiting], tmp_path / "run") as running:
        running.until(lambda: "ready" in running.log.read_text())
        kill(running.process.pid, signal.SIGTERM)
        running.until(lambda: "SIGTERM" in running.log.read_text())
        kill(running.process.pid, signal.SIGTERM)
        again = time.monotonic() + SECONDS_APART
        running.until(lambda: time.monotonic() > again)
        kill(running.process.pid, HANDED_ON)
        told = running.log.stat().st_size
        running.until(lambda: running.log.stat().st_size > told + 100)
        kill(running.process.pid, signal.SIGTERM)
        assert running.end() == 143
    assert "a second signal: stopped at once" in running.log.read_text()


ASKED_WHILE_IMPORTING = """
import importlib.abc, os, signal, sys
class Asked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == os.environ["ASKED_AT"] and self in sys.meta_path:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), getattr(signal, os.environ["ASKED_BY"]))
sys.meta_path.insert(0, Asked())
"""


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize("library", ["t5tune.commands.train", "torch", "torch._C", "peft"])
def test_a_signal_while_libraries_are_imported_ends_it_when_they_are(
    library: str, number: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ASKED_WHILE_IMPORTING)
    environment = {"PYTHONPATH": str(tmp_path), "ASKED_AT": library, "ASKED_BY": number}
    with start(untied_base, conversations, tmp_path / "run", **environment) as running:
        assert running.end() == (130 if number == "SIGINT" else 143), running.log.read_text()
    lines = [line for line in running.log.read_text().splitlines() if "Ctrl-C" not in line]
    assert lines[-1].startswith(f"error: stopped by {number} before training began"), lines
    assert not any("Exception" in line or "Traceback" in line for line in lines), lines
    assert whole_steps(tmp_path / "run") == []


class EndedWithASignal:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def caught() -> None:
    with suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail("went on")


def dropped() -> None:
    EndedWithASignal()  # Python drops what is raised there


@pytest.mark.parametrize("library", [caught, dropped])
def test_no_library_swallows_a_signal(library: Callable[[], None]) -> None:
    with pytest.raises(Stopped, match="SIGTERM before training began"), listening() as stop, stop.at_once():
        library()


def test_what_does_not_end_when_it_is_cut_off_is_left(tmp_path: Path) -> None:
    stubborn = """
import t5tune.distributed.signals as stopping
stopping.SECONDS_TO_LEAVE = 0.2
with stopping.listening() as stop, stop.at_once():
    try:
        print("ready", flush=True)
        while True:
            pass
    finally:
        while True:
            pass
"""
    with Running([sys.executable, "-c", stubborn], tmp_path / "run") as running:
        running.until(lambda: "ready" in running.log.read_text())
        kill(running.process.pid, signal.SIGTERM)
        assert running.end() == 143
    assert "stopped by SIGTERM before training began" in running.log.read_text()


SLURM = {"srun": 'exec "$@"', "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >>"$ASKED"'}


@pytest.mark.parametrize(("script", "code"), [("srun", 143), ("torchrun", 1)])
def test_the_time_limit_of_a_slurm_job_seals_and_puts_it_back(
    script: str, code: int, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """What stands in for SLURM's commands runs a task where it is, and notes what the controller is asked."""
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    job = str(os.getpid())
    variables = {"SLURM_JOB_ID": job, "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", "RANKS_PER_NODE": "1"}
    variables |= {"PATH": path, "ASKED": str(tmp_path / "asked")}
    _, *flags = arguments(untied_base, conversations, tmp_path / "run", "--save-steps=100000", "--max-steps=100000")
    command = ["bash", str(REPOSITORY / "examples" / "slurm" / f"{script}.sbatch"), *flags]
    with Running(command, tmp_path / "run", **variables) as running:
        running.until_step(3)
        processes = below(running.process.pid)
        # SLURM signals the tasks, and where B: is asked for the script alone
        try:
            kill(running.process.pid if script == "torchrun" else processes[0], signal.SIGUSR1)
            assert running.end() == code, running.log.read_text()[-3000:]
            running.until_gone(processes)
        finally:  # a script that the signal ends leaves them
            for process in processes:
                kill(process, signal.SIGKILL)
    assert len(whole_steps(tmp_path / "run")) == 1
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
