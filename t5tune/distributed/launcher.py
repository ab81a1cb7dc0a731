"""Start the worker processes of `--num-gpus` and `--num-processes`, and wait for them.

Workers are plain processes that read their rank from environment variables, as under torchrun. The launching process
forwards signals, ends all workers when one fails, raises the first error, and can restart the workers.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil

from t5tune import errors
from t5tune.distributed.signals import (
    FORWARDED_SIGNAL,
    KEPT_CHECKPOINT,
    SECONDS_BETWEEN_SIGNALS,
    STOP_SIGNALS,
    choose_signals,
    get_exit_code,
)
from t5tune.distributed.world import ERRORS_FOLDER_VARIABLE, RERUN_HINT, RESUME_HINT, World
from t5tune.errors import RankLost, SettingsError, Stopped, T5TuneError
from t5tune.io.atomic import write_json
from t5tune.io.processes import ForkedProcess, count_cores, start_module
from t5tune.io.reasons import join_lines
from t5tune.progress import Note, Report, silent
from t5tune.settings.loading import VARIABLE_PREFIX

POLL_SECONDS = 0.1
SECONDS_TO_STOP = 60.0  # for the remaining ranks, after the first rank has stopped on request
SECONDS_TO_REPORT = 2.0  # for the remaining ranks to report their errors, after the first rank has failed

Worker = subprocess.Popen[bytes] | ForkedProcess


def launch(
    arguments: list[str],
    count: int,
    max_restarts: int = 0,
    report: Report = silent,
    stdout: IO[str] | None = None,
    module: str = "t5tune",
    in_fork: bool = False,
) -> None:
    """Run `t5tune` with these arguments in `count` processes on this machine, and wait for them.

    Args:
        stdout: where workers print results; None: this process's stdout.
        module: to run in place of `t5tune`.
        in_fork: see `start_module`.

    Raises:
        T5TuneError: the error of the worker that failed first, or how it ended.
        Stopped: a signal asked to stop.
    """
    start = partial(start_module, module, arguments, stdout=stdout, in_fork=in_fork)
    saves_checkpoints = arguments[0] == "train"
    with _record_signals() as received:
        for restart in range(max_restarts + 1):
            failure = _run(start, count, received, saves_checkpoints)
            if failure is None:
                return
            # t5tune would detect the errors of other types again
            if restart == max_restarts or type(failure) not in {RankLost, T5TuneError}:
                raise failure
            report(Note(f"{failure.message}; restarting all ranks ({restart + 1} of {max_restarts})", warning=True))


def write_error(error: Exception) -> None:
    """Write a worker's error to the file that `launch` reads."""
    path = Path(os.environ[ERRORS_FOLDER_VARIABLE], f"rank-{World.from_environment().rank}.json")
    if not isinstance(error, T5TuneError):
        error = T5TuneError(f"{type(error).__name__}: {join_lines(error)}", hint="--debug shows where")
    problems: list[str] = [error.message]
    options: dict[str, Any] = {"hint": error.hint}
    if isinstance(error, SettingsError):
        problems = list(error.problems)
        options |= {"heading": error.heading, "choices": error.choices}
    # atomically, since the launching process may read it while it kills this worker
    write_json(path, {"kind": error.kind, "problems": problems, "options": options})


def stop_with_deepspeed_launcher() -> None:
    """Stop this worker when the `deepspeed` command ends, because the command doesn't forward signals.

    The command runs deepspeed.launcher.launch, the parent of this worker, which doesn't notice the command's end.
    """

    def stop_without_command(launcher: psutil.Process, command: int) -> None:
        with suppress(psutil.NoSuchProcess):
            while launcher.ppid() == command:
                time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    with suppress(psutil.Error):  # another user's process, or it has ended
        launcher = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" in launcher.cmdline():
            threading.Thread(target=stop_without_command, args=(launcher, launcher.ppid()), daemon=True).start()


@dataclass
class _ReceivedSignals:
    first: signal.Signals | None = None
    came_at: float = 0.0
    is_second: bool = False

    def receive(self, number: int, _frame: object = None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.came_at = signal.Signals(number), now
        elif now - self.came_at > SECONDS_BETWEEN_SIGNALS:
            self.is_second = True


@contextmanager
def _record_signals() -> Iterator[_ReceivedSignals]:
    """Record signals in this block. After a signal this process exits with its code, so later signals are ignored."""
    received = _ReceivedSignals()
    before = {number: signal.signal(number, received.receive) for number in choose_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if received.first else handler)


def _run(
    start: Callable[[dict[str, str]], Worker], count: int, received: _ReceivedSignals, saves_checkpoints: bool
) -> T5TuneError | None:
    """Run the workers until they end. Return the error that ended them, or None."""
    with tempfile.TemporaryDirectory(prefix="t5tune-errors-") as folder:
        workers = _start(start, count, folder)
        try:
            _watch(workers, received)
            ended = [worker.poll() for worker in workers]
        finally:
            for worker in workers:
                with suppress(ProcessLookupError):
                    worker.kill()  # only SIGKILL ends a process that SIGSTOP has suspended
            for worker in workers:
                worker.wait()
        if not any(ended) and None not in ended:
            return None
        error = _find_first_error(Path(folder), ended, received, saves_checkpoints)
        if isinstance(error, Stopped) and received.first is not None:
            error.exit_code = get_exit_code(received.first.name)
        return error


def _start(start: Callable[[dict[str, str]], Worker], count: int, folder: str) -> list[Worker]:
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(find_free_port()),
        ERRORS_FOLDER_VARIABLE: folder,
    }
    # the saved settings include these variables, and the flags that override them
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLE_PREFIX)}
    environment = {"OMP_NUM_THREADS": str(max(1, count_cores() // count)), **inherited, **common}
    # workers start with the signals blocked, until they have installed their handlers
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, FORWARDED_SIGNAL))
    try:
        return [start({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def find_free_port() -> int:
    """Find a TCP port of this machine that no process listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def _watch(workers: list[Worker], received: _ReceivedSignals) -> None:
    """Wait until all workers have ended, or for a short time after a failure. Forward a request to stop."""
    is_forwarded = False
    failed_at: float | None = None
    while None in (ended := [worker.poll() for worker in workers]):  # polls every worker: a later one may have failed
        now = time.monotonic()
        if failed_at is None and any(ended):
            failed_at = now
        # a stop on request isn't a failure, and rank 0 may have more to do, such as closing trackers
        stopped = () if received.first is None else (Stopped.exit_code, get_exit_code(received.first.name))
        seconds = SECONDS_TO_STOP if all(code in (None, 0, *stopped) for code in ended) else SECONDS_TO_REPORT
        if (failed_at is not None and now - failed_at > seconds) or received.is_second:
            return
        if received.first is not None and not is_forwarded:
            is_forwarded = True
            for worker in workers:
                worker.send_signal(FORWARDED_SIGNAL)
        time.sleep(POLL_SECONDS)


def _find_first_error(
    folder: Path, ended: list[int | None], received: _ReceivedSignals, saves_checkpoints: bool
) -> T5TuneError:
    """Find the cause of a failure: first an error that a rank detected, then a kill, and only then a lost rank.

    When a rank fails, the remaining ranks lose the connection to it, and their errors say no more.
    """
    paths = sorted(folder.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
    written = [_read_error(path) for path in paths]
    if causes := [error for error in written if not isinstance(error, RankLost)]:
        return causes[0]
    if received.first is not None and received.is_second:
        what = f"second {received.first.name}: exited immediately"
        return Stopped(what, hint=KEPT_CHECKPOINT if saves_checkpoints else None)
    left = ", ".join(str(rank) for rank, code in enumerate(ended) if code is None)
    if -signal.SIGABRT in ended and left:
        aborted = f"rank {ended.index(-signal.SIGABRT)} was killed by SIGABRT, which NCCL sends if another rank hangs"
        return RankLost(f"{aborted}; still running: rank {left}", hint=RESUME_HINT if saves_checkpoints else RERUN_HINT)
    for rank, code in enumerate(ended):
        if code is not None and code < 0:
            hint = "unless someone killed it, the machine may have run out of memory"
            name = signal.Signals(-code).name
            return RankLost(f"rank {rank} was killed by {name}", hint=hint if name == "SIGKILL" else None)
    if written:
        return written[0]
    rank, exit_code = next((rank, code) for rank, code in enumerate(ended) if code)
    error = T5TuneError(f"rank {rank} exited with {exit_code}", hint="see its output above; --debug shows more")
    error.exit_code = exit_code
    return error


def _read_error(path: Path) -> T5TuneError:
    values = json.loads(path.read_text(encoding="utf-8"))
    error: T5TuneError = getattr(errors, values["kind"])(*values["problems"], **values["options"])
    return error
