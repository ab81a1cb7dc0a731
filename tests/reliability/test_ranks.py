"""Ranks that die or hang, and launchers that do: all end, none is left, and the work goes on."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5tune.distributed.world import first_host
from tests.support.runs import (
    LONG,
    STEPS,
    ZERO3,
    Running,
    adapter,
    arguments,
    is_running,
    kill,
    last_step,
    start,
    whole_steps,
)


def test_killed_ranks_and_launchers_leave_nobody_and_the_work_goes_on_to_the_same_bits(
    untied_base: Path, conversations: Path, straight_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with start(untied_base, conversations, run, *ZERO3, "--max-restarts=1") as running:
        running.until(lambda: 6 in whole_steps(run))
        first = running.workers()
        kill(first[1], signal.SIGKILL)
        running.until(lambda: len(set(running.workers()) - set(first)) == 2 and last_step(run) > 12)
        second = running.workers()
        kill(second[0], signal.SIGKILL)
        assert running.end() == 1
        assert not any(map(is_running, first + second))
    told = running.log.read_text()
    assert "rank 1 was killed by SIGKILL; starting all again (1 of 1)" in told
    assert [line for line in told.splitlines() if line.startswith("error:")] == [
        line for line in told.splitlines() if "error: rank 0 was killed by SIGKILL" in line
    ]
    assert "Traceback" not in told
    with start(untied_base, conversations, run, *ZERO3) as running:
        running.until(lambda: 18 in whole_steps(run))
        workers = running.workers()
        running.process.kill()
        running.until_gone(workers)
    with start(untied_base, conversations, run, *ZERO3) as running:
        assert running.end() == 0, running.log.read_text()
    assert adapter(run) == straight_zero3


@pytest.mark.parametrize("hung", [0, 1])  # where the ranks meet, and elsewhere
def test_a_hung_rank_is_named(hung: int, untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start(untied_base, conversations, run, *ZERO3, "--process-group-timeout=8") as running:
        running.until(lambda: 6 in whole_steps(run))
        workers = running.workers()
        kill(workers[hung], signal.SIGSTOP)
        assert running.end() == 1
        assert not any(map(is_running, workers))
    assert f"error: rank {1 - hung}: rank {hung} doesn't answer" in running.log.read_text()


def test_a_second_signal_ends_what_a_hung_rank_holds(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start(untied_base, conversations, run, *ZERO3) as running:
        running.until(lambda: 6 in whole_steps(run))
        workers = running.workers()
        kill(workers[1], signal.SIGSTOP)  # so that the rest can't do what the first signal asks for
        while running.process.poll() is None:
            kill(running.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(0.2)
        assert running.end() == 143
        assert not any(map(is_running, workers))
    assert "stopped at once by a second SIGTERM" in running.log.read_text()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.skipif(not LONG, reason="make reliability")
def test_the_other_ranks_leave_in_time(
    rank: int, number: signal.Signals, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    timeout = 15
    within = 10 if number == signal.SIGKILL else timeout + 5
    run = tmp_path / "run"
    with start(untied_base, conversations, run, *ZERO3, f"--process-group-timeout={timeout}") as running:
        running.until(lambda: 6 in whole_steps(run))
        workers = running.workers()
        kill(workers[rank], number)
        began = time.monotonic()
        running.until_gone(workers)
        assert time.monotonic() - began < within
        assert running.end() == 1
    assert "Traceback" not in running.log.read_text()


def test_tasks_of_srun_meet_and_stop_together(
    untied_base: Path, conversations: Path, straight_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(free_port() - 20000), "SLURM_STEP_ID": "0"}
    job |= {"SLURM_JOB_NODELIST": "localhost"}
    command = [sys.executable, "-m", "t5tune", *arguments(untied_base, conversations, run, "--deepspeed=zero3")]
    for asked in (True, False):
        tasks = [
            Running(command, tmp_path / f"task-{rank}", **job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
            for rank in range(2)
        ]
        with tasks[0], tasks[1]:
            if asked:
                tasks[0].until(lambda: last_step(run) > 3)
                kill(tasks[0].process.pid, signal.SIGTERM)
            assert [task.end() for task in tasks] == [143 if asked else 0] * 2, tasks[0].log.read_text()
    assert adapter(run) == straight_zero3


def free_port() -> int:
    """One in the range that jobs' numbers are turned into."""
    for port in range(20000 + os.getpid() % 15000, 40000):
        with socket.socket() as tried:
            try:
                tried.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "t5tune"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus=2", "--module", "t5tune"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("whom", ["launcher", "rank"])
@pytest.mark.skipif(not LONG, reason="make reliability")
def test_a_signal_under_other_launchers_seals_and_resumes(
    launcher: str, whom: str, untied_base: Path, conversations: Path, straight_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, *LAUNCHERS[launcher], *arguments(untied_base, conversations, run, "--deepspeed=zero3"),
    ]  # fmt: skip
    with Running(command, run) as running:
        running.until_step(5)
        workers = running.workers()
        kill(running.process.pid if whom == "launcher" else workers[1], signal.SIGTERM)
        assert running.end() != 0
        running.until_gone(workers)
    (step, *_) = whole_steps(run)
    assert 5 <= step < STEPS
    with Running(command, run) as running:
        assert running.end() == 0, running.log.read_text()[-3000:]
    assert adapter(run) == straight_zero3


@pytest.mark.skipif(not LONG, reason="make reliability")
def test_two_launchers_meet_by_rendezvous(
    untied_base: Path, conversations: Path, straight_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=meet", "-m", "t5tune",
        *arguments(untied_base, conversations, run, "--deepspeed=zero3"),
    ]  # fmt: skip
    nodes = [Running(command, tmp_path / f"node-{number}") for number in range(2)]
    with nodes[0], nodes[1]:
        assert [node.end() for node in nodes] == [0, 0], nodes[0].log.read_text()[-3000:]
    assert adapter(run) == straight_zero3


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu1", "gpu1"),
        ("a,b", "a"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("gpu[3,5]-ib,x", "gpu3-ib"),
        ("a1,gpu[2-3]", "a1"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
