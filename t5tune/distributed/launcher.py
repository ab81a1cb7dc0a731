"""Start the worker processes of `--num-gpus` and `--num-processes`, and wait for them.

Workers are plain processes that read their rank from the environment, as torchrun's do. The launching process
forwards signals, ends all workers when one fails, raises the first error, and can start them again.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from t5tune import errors
from t5tune.distributed.signals import HANDED_ON, SECONDS_APART, SIGNALS, exit_code, signals
from t5tune.distributed.world import ERRORS_FOLDER, World
from t5tune.errors import RankLost, Stopped, T5TuneError
from t5tune.io.processes import die_with_parent, python_module
from t5tune.progress import Note, Report, silent

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_END = 2.0  # that ranks have to tell their own story, after the first has failed


def launch(
    settings_path: Path, count: int, arguments: list[str], max_restarts: int = 0, report: Report = silent
) -> None:
    """Run `t5tune train --config settings_path` in `count` processes on this machine, and wait for them.

    Raises:
        T5TuneError: what the first failing worker raised, or how it ended.
        Stopped: a signal asked to stop.
    """
    command = python_module("t5tune", "train", "--config", str(settings_path), *arguments)
    with _listening() as asked:
        for restart in range(max_restarts + 1):
            failure = _run(command, count, asked)
            if failure is None:
                return
            # what t5tune itself found wrong would be found again
            if restart == max_restarts or type(failure) not in {RankLost, T5TuneError}:
                raise failure
            report(Note(f"{failure.message}; starting all again ({restart + 1} of {max_restarts})", warning=True))


def write_error(error: Exception) -> None:
    """In a worker: leave the error where `launch` looks for it."""
    path = Path(os.environ[ERRORS_FOLDER], f"rank-{World.from_environment().rank}.json")
    if not isinstance(error, T5TuneError):
        error = T5TuneError(f"{type(error).__name__}: {' '.join(str(error).split())}", hint="--debug shows where")
    path.write_text(json.dumps({"kind": error.kind, "message": error.message, "hint": error.hint}), encoding="utf-8")


def follow_deepspeed() -> None:
    """Take the end of the `deepspeed` command for a request to stop: it doesn't hand its own signals on.

    It runs deepspeed.launcher.launch, which is this worker's parent, and which doesn't notice.
    """
    parent = os.getppid()
    command = _proc(parent, "cmdline")
    if command is None or b"deepspeed.launcher.launch" not in command.split(b"\0"):
        return
    pid, runner = os.getpid(), _parent_of(parent)

    def watch() -> None:
        while _parent_of(parent) == runner:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(pid, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _parent_of(pid: int) -> int | None:
    status = _proc(pid, "stat")
    return int(status.rpartition(b")")[2].split()[1]) if status else None


def _proc(pid: int, name: str) -> bytes | None:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return None


@dataclass
class _Asked:
    """The signals that came to the launching process."""

    first: signal.Signals | None = None
    came_at: float = 0.0
    again: bool = False

    def receive(self, number: int, _frame: object = None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.came_at = signal.Signals(number), now
        elif now - self.came_at > SECONDS_APART:
            self.again = True


@contextmanager
def _listening() -> Iterator[_Asked]:
    """Note signals. New processes are started with them blocked, until they can take them.

    Where one came this process is about to end, with the exit code that says so: one more changes nothing of it.
    """
    asked = _Asked()
    before = {number: signal.signal(number, asked.receive) for number in signals()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if asked.first else handler)


def _run(command: list[str], count: int, asked: _Asked) -> T5TuneError | None:
    """Run the workers to their end; the error that ended them, or None."""
    with tempfile.TemporaryDirectory(prefix="t5tune-errors-") as folder:
        workers = _start(command, count, folder)
        try:
            _watch(workers, asked)
            ended = [worker.poll() for worker in workers]
        finally:
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    worker.kill()  # a stopped process can't end in any other way
            for worker in workers:
                worker.wait()
        if not any(ended) and None not in ended:
            return None
        error = _first_error(Path(folder), ended, asked)
        if isinstance(error, Stopped) and asked.first is not None:
            error.exit_code = exit_code(asked.first.name)
        return error


def _start(command: list[str], count: int, folder: str) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        ERRORS_FOLDER: folder,
    }
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ, **common}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, HANDED_ON))
    try:
        return [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                preexec_fn=die_with_parent,
            )
            for rank in range(count)
        ]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _watch(workers: list[subprocess.Popen[bytes]], asked: _Asked) -> None:
    """Return when all have ended, or some time after one has failed; hand on what is asked meanwhile."""
    handed_on = False
    failed_at: float | None = None
    while None in (ended := [worker.poll() for worker in workers]):  # each is asked: a later one may have failed
        now = time.monotonic()
        if failed_at is None and any(ended):
            failed_at = now
        if (failed_at is not None and now - failed_at > SECONDS_TO_END) or asked.again:
            return
        if asked.first is not None and not handed_on:
            handed_on = True
            for worker in workers:
                worker.send_signal(HANDED_ON)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _first_error(folder: Path, ended: list[int | None], asked: _Asked) -> T5TuneError:
    """What went wrong first: what a rank found wrong, then how one was killed; that ranks missed others comes last."""
    paths = sorted(folder.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    written = [_read_error(path) for path in paths]
    own = [error for error in written if not isinstance(error, RankLost)]
    if own:
        return own[0]
    if asked.first is not None and asked.again:
        return Stopped(f"stopped at once by a second {asked.first.name}", hint="the last whole checkpoint stands")
    for rank, code in enumerate(ended):
        if code is not None and code < 0:
            hint = "where nobody did that, the machine may be short of memory" if code == -signal.SIGKILL else None
            return RankLost(f"rank {rank} was killed by {signal.Signals(-code).name}", hint=hint)
    if written:
        return written[0]
    rank, exit_code = next((rank, code) for rank, code in enumerate(ended) if code)
    error = T5TuneError(f"rank {rank} exited with {exit_code}", hint="its own output stands above; --debug shows more")
    error.exit_code = exit_code
    return error


def _read_error(path: Path) -> T5TuneError:
    values = json.loads(path.read_text(encoding="utf-8"))
    error: T5TuneError = getattr(errors, values["kind"])(values["message"], hint=values["hint"])
    return error
