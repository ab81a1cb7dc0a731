"""Tiny runs of many steps, to be interrupted and compared by the bytes of their adapters."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from t5tune.distributed.launcher import find_free_port
from t5tune.io.atomic import hash_file
from t5tune.progress import Event
from t5tune.runs.checkpoints import list_checkpoints, verify
from tests.support import train_runs
from tests.support.processes.forks import ForkedProcess, get_fork_server

LONG = os.environ.get("LONG_TESTS") == "1"
TIMEOUT = 150.0  # seconds; only a guard against hanging
STEPS = 24
ZERO3 = ("--num-processes=2", "--deepspeed=zero3")


make_settings = functools.partial(
    train_runs.make_settings,
    max_steps=STEPS,
    per_device_train_batch_size=2,
    save_steps=6,
    report_samples=0,  # under ZeRO-3 the samples take longer than all steps together
)


def make_arguments(base: Path, data: Path, run: Path, *more: Any) -> list[str]:
    """Make the command line of the run of `make_settings`."""
    given = make_settings(base, data, run).model_dump(exclude_unset=True, mode="json")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "data_path"]
    return ["train", f"--data-path={data}", *flags, *map(str, more)]


class Running:
    """A running command, whose output goes to a log file next to the run folder.

    `python -m t5tune …` and `python -c …` run in a fork of a process that has imported everything, unless `is_new`.
    """

    def __init__(
        self,
        command: list[str],
        run: Path,
        stderr: IO[bytes] | None = None,
        is_new: bool = False,
        **environment: str,
    ) -> None:
        self.run = run
        log = run.with_name(f"{run.name}.log")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process: subprocess.Popen[bytes] | ForkedProcess
        with open(log, "ab") as file:
            if is_new or command[0] != sys.executable or (command[1] != "-c" and command[1:3] != ["-m", "t5tune"]):
                self.process = subprocess.Popen(command, stdout=file, stderr=stderr or file, env=variables)
            else:
                errors = stderr.fileno() if stderr else file.fileno()
                self.process = get_fork_server().start(command[1:], file.fileno(), errors, variables)
        self.log = log

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Wait until the condition is true; fail if the process ends first."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"{self.process.returncode} too early:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: read_last_step(self.run) >= step)

    def find_workers(self) -> list[int]:
        """Find the ids of the training processes among this one's descendants, in the order of ranks."""
        found = {}
        for pid in list_descendants(self.process.pid):
            try:
                values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            environment = dict(value.split(b"=", 1) for value in values if b"=" in value)
            if b"t5tune" in command and b"RANK" in environment:
                found.setdefault(int(environment[b"RANK"]), pid)
        return [found[rank] for rank in sorted(found)]

    def wait_until_gone(self, processes: list[int]) -> None:
        """Wait until this process and all of these have ended."""
        self.process.wait(TIMEOUT)
        end = time.monotonic() + TIMEOUT
        while any(map(is_running, processes)):
            assert time.monotonic() < end, "a process is still running"
            time.sleep(0.01)

    def wait(self) -> int:
        """Wait until the process ends. Return its exit code."""
        return self.process.wait(TIMEOUT)

    def kill(self) -> None:
        for pid in [*list_descendants(self.process.pid), self.process.pid]:
            send_signal(pid, signal.SIGKILL)
        self.process.wait(TIMEOUT)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def start_run(base: Path, data: Path, run: Path, *more: Any, is_new: bool = False, **environment: str) -> Running:
    """Start `t5tune train` in a process of its own."""
    command = [sys.executable, "-m", "t5tune", *make_arguments(base, data, run, *more)]
    return Running(command, run, is_new=is_new, **environment)


def start_two_ranks(code: str, folder: Path) -> list[Running]:
    """Start the code as ranks 0 and 1 of a launcher that isn't t5tune's. Their output is in their logs."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(find_free_port())}
    return [
        Running([sys.executable, "-c", code], folder / f"rank-{rank}", **common, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]


def read_lines(rank: Running) -> list[str]:
    """Read a rank's output, without the lines that gloo prints in torch 2.8."""
    return [line for line in rank.log.read_text().splitlines() if not line.startswith("[Gloo]")]


def list_descendants(pid: int) -> list[int]:
    """List the ids of a process's children, their children, and so on."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [descendant for child in children for descendant in list_descendants(child)]


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process if it still exists."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def is_running(pid: int) -> bool:
    """Whether a process exists and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def read_last_step(run: Path) -> int:
    """Read the last step in metrics.jsonl; 0 if there is none."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def list_complete_steps(run: Path) -> list[int]:
    """List the steps of the checkpoints that pass verification, newest first."""
    return [int(path.name.partition("-")[2]) for path in list_checkpoints(run) if verify(path) is None]


def read_adapter(run: Path) -> bytes:
    """Read the adapter of a finished run."""
    assert (run / "result.json").is_file()
    return (run / "adapter_model.safetensors").read_bytes()


def hash_files(folder: Path) -> dict[str, str]:
    """Hash all files of a folder: relative path -> hash."""
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def stop_at(event: Event, number: int = signal.SIGTERM) -> Any:
    """Make a report that sends this process a signal when it receives the event."""

    def report(seen: Event) -> None:
        if seen == event:
            os.kill(os.getpid(), number)

    return report
