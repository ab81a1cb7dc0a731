"""Runs to be disturbed: tiny, of many steps, and compared by the bits of their adapters."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from t5tune.settings import TrainSettings
from t5tune.training.checkpoint import checkpoints, verify

LONG = os.environ.get("LONG_TESTS") == "1"
PATIENCE = 150.0  # seconds, a guard against hanging alone
STEPS = 24
ZERO3 = ("--num-processes=2", "--deepspeed=zero3")


def settings(base: Path, data: Path, run: Path, **changes: Any) -> TrainSettings:
    values = {
        "model_name_or_path": str(base),
        "data_path": str(data),
        "output_dir": run,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 6,
        "use_cpu": True,
        "report_samples": 0,  # under ZeRO-3 they take longer than all the steps
    }
    return TrainSettings(**{**values, **changes})


def arguments(base: Path, data: Path, run: Path, *more: Any) -> list[str]:
    """The command line of the same run."""
    given = settings(base, data, run).model_dump(exclude_unset=True, mode="json")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "data_path"]
    return ["train", f"--data-path={data}", *flags, *map(str, more)]


class Running:
    """A command that is under way."""

    def __init__(self, command: list[str], run: Path, stderr: IO[bytes] | None = None, **environment: str) -> None:
        self.run = run
        log = run.with_name(f"{run.name}.log")
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=stderr or file, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
            )
        self.log = log

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until it is so; fail where the process ends before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"{self.process.returncode} before its time:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        self.until(lambda: last_step(self.run) >= step)

    def workers(self) -> list[int]:
        """The processes below this one that train, by rank."""
        found = {}
        for pid in below(self.process.pid):
            try:
                values = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            environment = dict(value.split(b"=", 1) for value in values if b"=" in value)
            if b"t5tune" in command and b"RANK" in environment:
                found.setdefault(int(environment[b"RANK"]), pid)
        return [found[rank] for rank in sorted(found)]

    def until_gone(self, processes: list[int]) -> None:
        """Wait until none of these is left, though this one has ended."""
        self.process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while any(map(is_running, processes)):
            assert time.monotonic() < end, "a process was left behind"
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        for pid in [*below(self.process.pid), self.process.pid]:
            kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def start(base: Path, data: Path, run: Path, *more: Any, **environment: str) -> Running:
    """`t5tune train` in a process of its own."""
    return Running([sys.executable, "-m", "t5tune", *arguments(base, data, run, *more)], run, **environment)


def below(pid: int) -> list[int]:
    """The processes that a process started, and that these started."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [far for child in children for far in below(child)]


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal, if there is anyone to get it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def is_running(pid: int) -> bool:
    """Whether a process is there and isn't merely waiting to be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def last_step(run: Path) -> int:
    """Of metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def whole_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that verify, the newest first."""
    return [int(path.name.partition("-")[2]) for path in checkpoints(run) if verify(path) is None]


def adapter(run: Path) -> bytes:
    """The bytes of a finished run's adapter."""
    assert (run / "result.json").is_file()
    return (run / "adapter_model.safetensors").read_bytes()
