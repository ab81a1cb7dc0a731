"""A signal at any moment: a complete checkpoint, exit code 143, and the same bits after resuming."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from t5tune.commands.train import train
from t5tune.distributed.signals import FORWARDED_SIGNAL, SECONDS_BETWEEN_SIGNALS, handle_signals
from t5tune.errors import Stopped
from t5tune.evaluation.scoring import LOSSES_TASK
from t5tune.progress import Advanced, Event, Started
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import SIGNAL_WHILE_IMPORTING
from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import (
    LONG,
    STEPS,
    TIMEOUT,
    ZERO3,
    Running,
    list_complete_steps,
    list_descendants,
    make_arguments,
    make_settings,
    read_adapter,
    send_signal,
    start_run,
    stop_at,
)
from tests.support.processes.terminal import read_screen

pytestmark = pytest.mark.slow


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
MOMENTS = [(0, signal.SIGINT), (7, signal.SIGUSR1), (STEPS, signal.SIGTERM)]
if LONG:
    MOMENTS = [(step, number) for step in (0, 7, STEPS) for number in SIGNALS]


@pytest.mark.parametrize(("step", "number"), MOMENTS)
@pytest.mark.variants("24-15")
def test_a_signal_saves_the_step_and_resuming_gives_equal_bits(
    step: int, number: signal.Signals, inputs: list[Path], uninterrupted: bytes, tmp_path: Path
) -> None:
    settings = make_settings(*inputs, tmp_path / "run", save_steps=1000)
    event = Advanced("train", step - 1) if step else Started("train", STEPS, "steps")
    with pytest.raises(Stopped) as stopped:
        train(settings, stop_at(event, number))
    sender = "" if number == signal.SIGINT else f" by {number.name}"
    saved = f"saved in {tmp_path / 'run' / f'checkpoint-{step}'}"
    assert stopped.value.message == f"stopped{sender} after step {step} of {STEPS}; {saved}"
    assert stopped.value.exit_code == (130 if number == signal.SIGINT else 143)
    assert list_complete_steps(tmp_path / "run") == [step]
    train(settings)
    assert read_adapter(tmp_path / "run") == uninterrupted


@pytest.mark.long
def test_ctrl_c_saves_a_checkpoint_if_the_log_is_closed(inputs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--save-steps=100000", "--max-steps=100000")
    command = [sys.executable, "-m", "t5tune", *make_arguments(*inputs, run, *more)]
    read, write = os.pipe()
    with open(write, "wb") as pipe, Running(command, run, pipe) as running:
        pipe.close()
        running.wait_for_step(3)
        os.close(read)
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 130
    assert len(list_complete_steps(run)) == 1


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.variants("steps")
def test_a_signal_interrupts_an_evaluation_which_is_repeated_after_resuming(
    strategy: str, inputs: list[Path], tmp_path: Path
) -> None:
    more = {"eval_fraction": 0.3, "eval_strategy": strategy, "per_device_eval_batch_size": 2, "save_steps": 1000}
    more |= {"metric_for_best_model": "loss", "eval_steps": 8 if strategy == "steps" else None}
    settings = make_settings(*inputs, tmp_path / "uninterrupted", **more)
    expected = train(settings).eval["loss"]
    evaluated = read_evaluations(tmp_path / "uninterrupted")
    first = min(evaluated)
    settings = settings.model_copy(update={"output_dir": tmp_path / "stopped"})
    with pytest.raises(Stopped):  # the step is over, so the next check for a signal is in the evaluation
        train(settings, stop_at(Advanced("train", first)))
    assert read_evaluations(tmp_path / "stopped") == {}
    assert list_complete_steps(tmp_path / "stopped") == [first]
    assert train(settings).eval["loss"] == expected
    assert read_evaluations(tmp_path / "stopped") == evaluated
    assert read_adapter(tmp_path / "uninterrupted") == read_adapter(tmp_path / "stopped")


def test_a_signal_interrupts_the_evaluation_before_the_first_step(inputs: list[Path], tmp_path: Path) -> None:
    more = {"eval_fraction": 0.3, "max_steps": 3, "training_args": {"eval_on_start": True}}
    settings = make_settings(*inputs, tmp_path / "run", **more)

    def stop_in_evaluation(event: Event) -> None:
        if isinstance(event, Started) and event.task == LOSSES_TASK:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=f"after step 0 of 3; saved in {tmp_path}/run/checkpoint-0"):
        train(settings, stop_in_evaluation)
    assert list_complete_steps(tmp_path / "run") == [0]
    assert train(settings).resumed_from == tmp_path / "run" / "checkpoint-0"
    assert list(read_evaluations(tmp_path / "run")) == [0, 3]


def read_evaluations(run: Path) -> dict[int, float]:
    """Read the losses of the held-out examples by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def test_a_signal_while_preparing_leaves_no_partial_files(
    inputs: list[Path], uninterrupted: bytes, tmp_path: Path
) -> None:
    settings = make_settings(*inputs, tmp_path / "run")
    with pytest.raises(Stopped, match="before training began"):
        train(settings, stop_at(Started("prepare", None, "records")))
    assert not (tmp_path / "run").exists()
    train(settings)
    assert read_adapter(tmp_path / "run") == uninterrupted


def stop_in_prepare() -> None:
    """From here on, rank 0 gets a SIGTERM when it starts to prepare the data."""
    import t5tune.commands.train as module

    prepare_datasets = module.prepare_datasets

    def interrupted(plan: Any, report: Any) -> Any:
        return prepare_datasets(plan, stop_at(Started("prepare", None, "records")))

    module.prepare_datasets = interrupted


def test_a_signal_while_rank_0_prepares_stops_all_ranks(
    fork_server: ForkServer, inputs: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = make_arguments(*inputs, run, "--max-steps=2", "--report-samples=0")
    done = fork_server.run(command, 2, ["tests.reliability.test_stopping:stop_in_prepare()"])
    assert done.codes == [143, 143], done.log
    assert done.log.splitlines().count("stopped by SIGTERM before training began") == 1  # only rank 0 reports it
    assert "error:" not in done.log
    assert not run.exists()
    assert fork_server.run(command, 2).codes == [0, 0]


@pytest.mark.distributed
@pytest.mark.long
def test_a_signal_to_torchrun_while_preparing_leaves_no_files(untied_base: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "many.jsonl", tmp_path / "run"
    lines = [
        json.dumps({"source": f"how many are {number}?", "target": f"{number} lamps"}) for number in range(200_000)
    ]
    data.write_text("\n".join(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "t5tune"]
    command = [*torchrun, *make_arguments(untied_base, data, run, "--max-steps=2", "--report-samples=0")]
    with Running(command, run) as running:
        running.wait_until(lambda: any(run.glob(".data.new-*/*")))
        workers = running.find_workers()
        send_signal(running.process.pid, signal.SIGTERM)
        assert running.wait() != 0
        running.wait_until_gone(workers)
    assert "stopped by SIGTERM before training began" in running.log.read_text()
    assert not run.exists()
    with Running([*command, "--num-data=100"], run) as running:  # all of them take a minute
        assert running.wait() == 0, running.log.read_text()[-3000:]


@pytest.mark.long
def test_a_signal_to_one_rank_stops_all_ranks(
    fork_server: ForkServer, inputs: list[Path], uninterrupted_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with start_run(*inputs, run, *ZERO3, "--save-steps=1000") as running:
        running.wait_for_step(5)
        send_signal(running.find_workers()[1], signal.SIGUSR1)
        assert running.wait() == 143, running.log.read_text()
    (step,) = list_complete_steps(run)
    assert 5 <= step < STEPS
    assert f"checkpoint-{step}" in running.log.read_text()
    assert "Traceback" not in running.log.read_text()
    done = fork_server.run(make_arguments(*inputs, run, "--deepspeed=zero3"), 2)
    assert done.codes == [0, 0], done.log
    assert read_adapter(run) == uninterrupted_zero3


@pytest.mark.long
@pytest.mark.distributed
def test_ctrl_c_stops_two_ranks_with_one_report(inputs: list[Path], tmp_path: Path) -> None:
    """A terminal sends SIGINT to the launcher and to each rank."""
    run = tmp_path / "run"
    with start_run(*inputs, run, "--num-processes=2", "--save-steps=1000") as running:
        running.wait_for_step(3)
        for pid in (running.process.pid, *running.find_workers()):
            send_signal(pid, signal.SIGINT)
        assert running.wait() == 130, running.log.read_text()
    (step,) = list_complete_steps(run)
    assert 3 <= step < STEPS
    log = running.log.read_text()
    last = f"stopped after step {step} of {STEPS}; saved in {run}/checkpoint-{step}. Run the same command to continue."
    assert log.splitlines()[-1] == last
    assert log.count("press Ctrl-C again to quit immediately") == 1
    assert "error:" not in log
    assert "Traceback" not in log


def test_a_terminal_shows_evaluations_and_where_ctrl_c_stopped(inputs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--eval-fraction=0.3", "--eval-steps=2", "--save-steps=100000", "--max-steps=100000")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 80))
    command = [sys.executable, "-m", "t5tune", *make_arguments(*inputs, run, *more)]
    drawn, is_sent = b"", False
    with open(theirs, "wb") as terminal, Running(command, run, terminal, TERM="xterm") as running:
        terminal.close()
        with suppress(OSError):  # reading a closed terminal raises it
            while True:
                drawn += os.read(ours, 4096)
                if b"step 4  held-out" in drawn and not is_sent:
                    is_sent = True
                    running.process.send_signal(signal.SIGINT)
        assert running.wait() == 130
    os.close(ours)
    (step,) = list_complete_steps(run)
    lines = read_screen(drawn.decode(), 80)
    (evaluation,) = [line for line in lines if line.startswith("step 2  ")]
    assert re.fullmatch(r"step 2  held-out loss [\d.]+  perplexity [\d.,]+  \(best\)", evaluation)
    (bar,) = [line for line in lines if "━" in line]  # the bars of loading and of the evaluations are gone
    assert re.fullmatch(rf"  train ━+ {step}/100,000 steps \[\d+:\d\d elapsed\]( +loss .*)?", bar)
    assert lines.count("finishing this step and saving; press Ctrl-C again to quit immediately") == 1
    end = f"stopped after step {step} of 100,000; saved in {run}/checkpoint-{step}. Run the same command to continue."
    # the terminal wraps the path, which is longer than a line
    assert "".join(lines[lines.index(bar) + 1 :]).replace(" ", "") == end.replace(" ", "")
    assert drawn.rfind(b"\x1b[?25h") > drawn.rfind(b"\x1b[?25l")  # the cursor is back


def test_ctrl_c_does_not_stop_a_background_job() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handle_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def run_script(code: str, folder: Path) -> Iterator[Running]:
    """Run code in a process, and wait until it prints "ready"."""
    with Running([sys.executable, "-c", code], folder / "run") as running:
        running.wait_until(lambda: "ready" in running.log.read_text())
        yield running


def test_a_second_signal_exits_but_a_copy_does_not(tmp_path: Path) -> None:
    waiting = """
import time
from t5tune.distributed.signals import handle_signals
with handle_signals() as stop:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        print(stop.signal_name, flush=True)
"""
    with run_script(waiting, tmp_path) as running:
        send_signal(running.process.pid, signal.SIGTERM)
        running.wait_until(lambda: "SIGTERM" in running.log.read_text())
        send_signal(running.process.pid, signal.SIGTERM)
        two_requests_at = time.monotonic() + SECONDS_BETWEEN_SIGNALS
        running.wait_until(lambda: time.monotonic() > two_requests_at)
        send_signal(running.process.pid, FORWARDED_SIGNAL)
        size = running.log.stat().st_size
        running.wait_until(lambda: running.log.stat().st_size > size + 100)
        send_signal(running.process.pid, signal.SIGTERM)
        assert running.wait() == 143
    assert "second signal: exiting now" in running.log.read_text()


def test_a_second_signal_exits_while_the_main_thread_waits(tmp_path: Path) -> None:
    waiting = """
from datetime import timedelta
from torch.distributed import TCPStore
from t5tune.distributed.signals import handle_signals
store = TCPStore("localhost", 0, is_master=True)
with handle_signals():
    print("ready", flush=True)
    store.wait(["never"], timedelta(hours=1))  # as for a GPU or a rank that hangs: Python handles no signal meanwhile
"""
    with run_script(waiting, tmp_path) as running:
        end = time.monotonic() + TIMEOUT
        while running.process.poll() is None and time.monotonic() < end:
            send_signal(running.process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(0.2)
        assert running.process.poll() == 143
    assert running.log.read_text() == "ready\nsecond signal: exiting now\n"


IMPORTS = [("torch", "SIGINT"), ("torch._C", "SIGTERM")]
if LONG:
    LIBRARIES = ("t5tune.commands.train", "torch", "torch._C", "peft")
    IMPORTS = [(library, number) for library in LIBRARIES for number in ("SIGTERM", "SIGUSR1", "SIGINT")]


@pytest.mark.parametrize(("library", "number"), IMPORTS)
@pytest.mark.variants("torch-SIGINT")
def test_a_signal_while_libraries_are_imported_stops_training_afterwards(
    library: str, number: str, inputs: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_WHILE_IMPORTING)
    environment = {"PYTHONPATH": str(tmp_path), "SIGNAL_AT": library, "SIGNAL_NAME": number}
    with start_run(*inputs, tmp_path / "run", is_new=True, **environment) as running:
        assert running.wait() == (130 if number == "SIGINT" else 143), running.log.read_text()
    lines = [line for line in running.log.read_text().splitlines() if "Ctrl-C" not in line]
    assert lines[-1] == f"stopped{'' if number == 'SIGINT' else f' by {number}'} before training began", lines
    assert not any("Exception" in line or "Traceback" in line for line in lines), lines
    assert list_complete_steps(tmp_path / "run") == []


class SignalsWhenDeleted:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def catch_signal() -> None:
    with suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail("continued after the signal")


def ignore_signal() -> None:
    SignalsWhenDeleted()  # Python ignores exceptions in __del__


@pytest.mark.parametrize("library", [catch_signal, ignore_signal])
def test_no_library_can_swallow_a_signal(library: Callable[[], None]) -> None:
    with pytest.raises(Stopped, match="SIGTERM before training began"), handle_signals() as stop, stop.interruptible():
        library()


def test_a_process_that_ignores_the_interrupt_exits_after_a_timeout(tmp_path: Path) -> None:
    stubborn = """
from t5tune.distributed import signals
signals.SECONDS_TO_UNWIND = 0.2
with signals.handle_signals() as stop, stop.interruptible():
    try:
        print("ready", flush=True)
        while True:
            pass
    finally:
        while True:
            pass
"""
    with run_script(stubborn, tmp_path) as running:
        send_signal(running.process.pid, signal.SIGTERM)
        assert running.wait() == 143
    assert "stopped by SIGTERM before training began" in running.log.read_text()


SLURM = {
    "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift && exec "$@"',
    "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >>"$REQUESTS"',
}


def fake_slurm(folder: Path, **commands: str) -> dict[str, str]:
    """Write fake SLURM commands that run a task on this machine and record requests. Return a job's variables."""
    for name, text in {**SLURM, **commands}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here"}
    return variables | {"RANKS_PER_NODE": "1", "PATH": path, "REQUESTS": str(folder / "requests")}


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize(("script", "code"), [("srun", 143), ("torchrun", 1)])
def test_a_slurm_time_limit_saves_a_checkpoint_and_requeues(
    script: str, code: int, inputs: list[Path], tmp_path: Path
) -> None:
    options = [option for action in get_args_parser()._actions for option in action.option_strings]
    if script == "torchrun" and "--signals-to-handle" not in options:
        pytest.skip("this torch has no torchrun --signals-to-handle")
    _, *flags = make_arguments(*inputs, tmp_path / "run", "--save-steps=100000", "--max-steps=100000")
    command = ["bash", str(REPOSITORY / "examples" / "slurm" / f"{script}.sbatch"), *flags]
    with Running(command, tmp_path / "run", **fake_slurm(tmp_path)) as running:
        running.wait_for_step(3)
        processes = list_descendants(running.process.pid)
        try:
            send_signal(running.process.pid, signal.SIGUSR1)  # SLURM signals only the script, because of the prefix B:
            assert running.wait() == code, running.log.read_text()[-3000:]
            running.wait_until_gone(processes)
        finally:  # a script that a signal ends leaves its processes running
            for process in processes:
                send_signal(process, signal.SIGKILL)
    assert len(list_complete_steps(tmp_path / "run")) == 1
    assert (tmp_path / "requests").read_text() == f"requeue {os.getpid()}\n"


@pytest.mark.parametrize(("failure", "code"), [("exit 1", 1), ("kill -TERM $$", 143)])
@pytest.mark.parametrize("script", ["srun", "torchrun"])
def test_a_failed_slurm_job_is_not_requeued(script: str, failure: str, code: int, tmp_path: Path) -> None:
    """When a rank fails, srun ends the others with SIGTERM, and exits with the highest code."""
    command = ["bash", str(REPOSITORY / "examples" / "slurm" / f"{script}.sbatch")]
    environment = {**os.environ, **fake_slurm(tmp_path, srun=failure)}
    assert subprocess.run(command, env=environment, timeout=60).returncode == code
    assert not (tmp_path / "requests").exists()
