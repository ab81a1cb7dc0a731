"""If a rank or a launcher dies or hangs, all processes end, and the run can resume."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5tune.distributed.world import parse_first_host
from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import (
    STEPS,
    ZERO3,
    Running,
    is_running,
    list_complete_steps,
    make_arguments,
    read_adapter,
    read_last_step,
    send_signal,
    start_run,
)

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_killed_ranks_and_launchers_leave_no_process(
    fork_server: ForkServer, inputs: list[Path], uninterrupted_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with start_run(*inputs, run, *ZERO3, "--max-restarts=1") as running:
        running.wait_until(lambda: 6 in list_complete_steps(run))
        first = running.find_workers()
        send_signal(first[1], signal.SIGKILL)
        running.wait_until(lambda: len(set(running.find_workers()) - set(first)) == 2 and read_last_step(run) > 12)
        second = running.find_workers()
        send_signal(second[0], signal.SIGKILL)
        assert running.wait() == 1
        assert not any(map(is_running, first + second))
    log = running.log.read_text()
    assert "rank 1 was killed by SIGKILL; restarting all ranks (1 of 1)" in log
    assert [line for line in log.splitlines() if line.startswith("error:")] == [
        line for line in log.splitlines() if "error: rank 0 was killed by SIGKILL" in line
    ]
    assert "Traceback" not in log
    with start_run(*inputs, run, *ZERO3) as running:
        running.wait_until(lambda: 18 in list_complete_steps(run))
        workers = running.find_workers()
        running.process.kill()
        running.wait_until_gone(workers)
    done = fork_server.run(make_arguments(*inputs, run, "--deepspeed=zero3"), 2)
    assert done.codes == [0, 0], done.log
    assert read_adapter(run) == uninterrupted_zero3


@pytest.mark.long
def test_a_second_signal_ends_a_run_with_a_hung_rank(inputs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start_run(*inputs, run, *ZERO3) as running:
        running.wait_until(lambda: 6 in list_complete_steps(run))
        workers = running.find_workers()
        # so that the other rank can't stop after its step, as the first signal requests
        send_signal(workers[1], signal.SIGSTOP)
        while running.process.poll() is None:
            send_signal(running.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(0.2)
        assert running.wait() == 143
        assert not any(map(is_running, workers))
    assert "second SIGTERM: exited immediately. The last complete checkpoint is kept." in running.log.read_text()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.long
def test_the_other_ranks_exit_in_time(rank: int, number: signal.Signals, inputs: list[Path], tmp_path: Path) -> None:
    timeout = 15
    # a hung rank takes 2 s to ask, 2 s for its own report, and the exit of the processes
    within = 10 if number == signal.SIGKILL else timeout + 8
    run = tmp_path / "run"
    with start_run(*inputs, run, *ZERO3, f"--process-group-timeout={timeout}") as running:
        running.wait_until(lambda: 6 in list_complete_steps(run))
        workers = running.find_workers()
        send_signal(workers[rank], number)
        began = time.monotonic()
        running.wait_until_gone(workers)
        assert time.monotonic() - began < within
        assert running.wait() == 1
    log = running.log.read_text()
    assert "Traceback" not in log
    if number == signal.SIGSTOP:
        assert f"error: rank {1 - rank}: rank {rank} doesn't answer" in log


@pytest.mark.long
def test_tasks_of_srun_connect_and_stop_together(
    fork_server: ForkServer, inputs: list[Path], uninterrupted_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(find_free_port() - 20000), "SLURM_STEP_ID": "0"}
    job |= {"SLURM_JOB_NODELIST": "localhost"}
    arguments = make_arguments(*inputs, run, "--deepspeed=zero3")
    command = [sys.executable, "-m", "t5tune", *arguments]
    tasks = [
        Running(command, tmp_path / f"task-{rank}", **job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(2)
    ]
    with tasks[0], tasks[1]:
        tasks[0].wait_until(lambda: read_last_step(run) > 3)
        send_signal(tasks[0].process.pid, signal.SIGTERM)
        assert [task.wait() for task in tasks] == [143, 143], tasks[0].log.read_text()
    done = fork_server.run(arguments, 2)
    assert done.codes == [0, 0], done.log
    assert read_adapter(run) == uninterrupted_zero3


def find_free_port() -> int:
    """Find a free port in the range to which SLURM job ids are mapped."""
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
@pytest.mark.long
def test_a_signal_under_other_launchers_saves_a_checkpoint(
    launcher: str, whom: str, inputs: list[Path], uninterrupted_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, *LAUNCHERS[launcher], *make_arguments(*inputs, run, "--deepspeed=zero3"),
    ]  # fmt: skip
    with Running(command, run) as running:
        running.wait_for_step(5)
        workers = running.find_workers()
        send_signal(running.process.pid if whom == "launcher" else workers[1], signal.SIGTERM)
        assert running.wait() != 0
        running.wait_until_gone(workers)
    (step, *_) = list_complete_steps(run)
    assert 5 <= step < STEPS
    with Running(command, run) as running:
        assert running.wait() == 0, running.log.read_text()[-3000:]
    assert read_adapter(run) == uninterrupted_zero3


@pytest.mark.long
def test_two_launchers_connect_through_a_rendezvous(
    inputs: list[Path], uninterrupted_zero3: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{find_free_port()}", "--rdzv-id=meet", "-m", "t5tune",
        *make_arguments(*inputs, run, "--deepspeed=zero3"),
    ]  # fmt: skip
    nodes = [Running(command, tmp_path / f"node-{number}") for number in range(2)]
    with nodes[0], nodes[1]:
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].log.read_text()[-3000:]
    assert read_adapter(run) == uninterrupted_zero3


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
def test_the_first_host_of_a_slurm_node_list_is_parsed(nodes: str, host: str) -> None:
    assert parse_first_host(nodes) == host
