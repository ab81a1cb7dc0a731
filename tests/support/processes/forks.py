"""Run t5tune in forks of a process that has imported everything, which saves seconds per run.

    fork_server = get_fork_server()
    done = fork_server.run(arguments, ranks=2)                          # `t5tune` with these arguments
    done.codes, done.log
    done = fork_server.run(arguments, calls=["tests.support.ranks.faults:overflow_at(5)"])

    process = fork_server.start(["-m", "t5tune", *arguments], log, log, os.environ)         # or ["-c", code]
    process.send_signal(signal.SIGTERM)
    process.wait()

A script that starts `t5tune` by itself gets a fork too, with `fork_server.scripts` first on its PATH.

If there is a C compiler, the forks run with faults.c preloaded, which makes the Nth open, write, fsync, rename, link,
truncate or mkdir below a folder fail with a given system error:

    done = fork_server.run(arguments, folder=run)                       # done.operations: on files, in order
    done = fork_server.run(arguments, folder=run, operation_number=17, mode=ONCE, error=errno.EIO)
"""

import atexit
import ctypes
import functools
import json
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes.fork_client import ask

NEVER, ONCE, FROM_THEN_ON, SHORT = range(4)


class Control(ctypes.Structure):
    """`struct control` of faults.c."""

    _fields_ = [
        ("count", ctypes.c_long),
        ("at", ctypes.c_long),
        ("mode", ctypes.c_int),
        ("error", ctypes.c_int),
        ("folder", ctypes.c_char * 4096),
        ("trace", ctypes.c_char * 4096),
    ]


@dataclass(frozen=True)
class FileOperation:
    """An operation on a file: "open", "write", "fsync", "rename", "link", "truncate" or "mkdir"."""

    kind: str
    path: str


@dataclass(frozen=True)
class RunOutput:
    """The ranks' exit codes, their output (`log` is stderr), and their operations on files, in order."""

    codes: list[int]
    stdout: str
    log: str
    operations: list[FileOperation]


class ForkedProcess:
    """A process that the server has started, with what tests need of subprocess.Popen."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self.pid = self._read_number()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None if the process hasn't ended."""
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process ends. Return its exit code, which is negative for a signal."""
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = self._read_number()
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read_number(self) -> int:
        text = b""
        while not text.endswith(b"\n"):
            read = self._server.recv(1)
            assert read, "the fork server has ended"
            text += read
        return int(text)


class ForkServer:
    """Client of the server process, which has imported everything and forks the runs (fork_server.py).

    Args:
        folder: where to put the compiled library, the logs and the traces.

    Attributes:
        scripts: a folder with the command `t5tune`, and a `python` for `python -m t5tune`, which run in forks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        block = folder / "control"
        block.write_bytes(bytes(ctypes.sizeof(Control)))
        with open(block, "r+b") as file:
            self._control = Control.from_buffer(mmap.mmap(file.fileno(), 0))
        # torch reads the level when it is imported, so a fork's own has no effect; t5tune sets it before
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        library = _compile_library(folder)
        self.can_inject_faults = library is not None
        if library is not None:
            environment |= {"LD_PRELOAD": str(library), "FAULTS": str(block)}
        self._address = str(folder / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes.fork_server", self._address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
            env=environment,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self.scripts = folder / "bin"
        self.scripts.mkdir()
        client = Path(__file__).with_name("fork_client.py")
        for name, skipped in (("t5tune", ""), ("python", "shift 2; ")):
            script = f'#!/bin/sh\n{skipped}exec {sys.executable} -IS {client} {self._address} "$@"\n'
            (self.scripts / name).write_text(script)
            (self.scripts / name).chmod(0o755)

    def run(
        self,
        arguments: list[str],
        ranks: int = 1,
        calls: Sequence[str] = (),
        folder: Path | None = None,
        operation_number: int = 0,
        mode: int = NEVER,
        error: int = 0,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: bytes = b"",
    ) -> RunOutput:
        """Run `t5tune` with these arguments, and wait until it ends.

        Args:
            calls: "module:function(arguments)": functions to call in every rank before it starts.
            folder: the folder whose files count.
            operation_number: which operation on them fails, from 1.
            mode: how it fails: NEVER, ONCE, FROM_THEN_ON (this one and all later ones) or SHORT (writes only half).
            error: the errno of the failure.
            environment: all variables; None: the server's.
            cwd: the current folder; None: the server's.
        """
        trace, stdout, log, typed = (self.folder / name for name in ("trace", "stdout", "log", "stdin"))
        for path in (trace, stdout, log):
            path.write_bytes(b"")
        typed.write_bytes(stdin)
        control = self._control
        control.count, control.at, control.mode, control.error = 0, operation_number, mode, error
        control.trace = os.fsencode(trace)
        control.folder = os.fsencode(folder) if folder else b""
        request = {
            "arguments": arguments,
            "ranks": ranks,
            "calls": list(calls),
            "streams": [str(typed), str(stdout), str(log)],
            "environment": None if environment is None else dict(environment),
            "cwd": None if cwd is None else str(cwd),
        }
        codes = ask(self._address, request)
        control.folder = b""
        lines = sorted((line.split(" ", 2) for line in trace.read_text().splitlines()), key=lambda line: int(line[0]))
        texts = [path.read_text(errors="replace") for path in (stdout, log)]
        return RunOutput(codes, *texts, [FileOperation(kind, path) for _, kind, path in lines])

    def start(
        self, command: list[str], stdout: Path | int, stderr: Path | int, environment: Mapping[str, str]
    ) -> ForkedProcess:
        """Start `python -m t5tune …` or `python -c code` in the current folder.

        Args:
            command: what follows `python`.
            stdout: a file to which the output is appended, or the number of an open one.
            stderr: likewise.
        """
        return self._start(command, [os.devnull, stdout, stderr], environment, terminal=False)

    def start_on_terminal(self, command: list[str], terminal: int, environment: Mapping[str, str]) -> ForkedProcess:
        """Start it in a session of its own, which this terminal controls."""
        return self._start(command, [terminal] * 3, environment, terminal=True)

    def _start(
        self, command: list[str], streams: Sequence[Path | str | int], environment: Mapping[str, str], terminal: bool
    ) -> ForkedProcess:
        request = {
            "command": command,
            "streams": [f"/proc/{os.getpid()}/fd/{file}" if isinstance(file, int) else str(file) for file in streams],
            "environment": dict(environment),
            "cwd": os.getcwd(),
            "terminal": terminal,
        }
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._address)
        server.sendall(json.dumps(request).encode() + b"\n")
        return ForkedProcess(server)

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


@functools.cache
def get_fork_server() -> ForkServer:
    """Return this process's server, and start it if there is none yet."""
    fork_server = ForkServer(Path(tempfile.mkdtemp()))
    atexit.register(fork_server.close)
    return fork_server


def _compile_library(folder: Path) -> Path | None:
    """Compile faults.c to a library; None if this isn't Linux or there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library, source = folder / "faults.so", Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return library
