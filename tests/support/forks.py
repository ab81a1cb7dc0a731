"""Runs that are forked from a process which has imported everything: each saves the seconds that this takes.

    with Forks(tmp_path) as forks:
        done = forks.run(arguments, ranks=2)                                  # `t5tune` with these arguments
        done.codes, done.log
        done = forks.run(arguments, calls=["tests.support.overflowing:overflow_at(5)"])

Where a C compiler is at hand they run with faults.c preloaded, by which the Nth open, write, fsync, rename, link,
truncation or mkdir below a folder fails as the system would let it fail:

        done = forks.run(arguments, under=run)                                # done.things: what was done to files
        done = forks.run(arguments, under=run, at=17, mode=ONCE, error=errno.EIO)
"""

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
class Thing:
    """What was done to a file: "open", "write", "fsync", "rename", "link", "truncate" or "mkdir"."""

    kind: str
    path: str


@dataclass(frozen=True)
class Ended:
    """How the ranks of a run ended, what they wrote (`log`: to stderr), and what they did to files, in order."""

    codes: list[int]
    stdout: str
    log: str
    things: list[Thing]


class Forks:
    """The process that has imported everything.

    Args:
        folder: for the compiled library, the logs and the traces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        block = folder / "control"
        block.write_bytes(bytes(ctypes.sizeof(Control)))
        with open(block, "r+b") as file:
            self._control = Control.from_buffer(mmap.mmap(file.fileno(), 0))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        library = _compiled(folder)
        self.has_faults = library is not None
        if library is not None:
            environment |= {"LD_PRELOAD": str(library), "FAULTS": str(block)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment,
        )

    def run(
        self,
        arguments: list[str],
        ranks: int = 1,
        calls: Sequence[str] = (),
        under: Path | None = None,
        at: int = 0,
        mode: int = NEVER,
        error: int = 0,
    ) -> Ended:
        """`t5tune` with these arguments, to its end.

        Args:
            calls: "module:function(arguments)", each called in every rank before it begins.
            under: folder whose files count; the `at`th thing done to them meets its fate.
        """
        trace, stdout, log = (self.folder / name for name in ("trace", "stdout", "log"))
        for path in (trace, stdout, log):
            path.write_bytes(b"")
        control = self._control
        control.count, control.at, control.mode, control.error = 0, at, mode, error
        control.trace = os.fsencode(trace)
        control.folder = os.fsencode(under) if under else b""
        outputs = [str(stdout), str(log)]
        request = {"arguments": arguments, "ranks": ranks, "outputs": outputs, "calls": list(calls)}
        codes = self._ask(request)
        control.folder = b""
        lines = sorted((line.split(" ", 2) for line in trace.read_text().splitlines()), key=lambda line: int(line[0]))
        texts = [path.read_text(errors="replace") for path in (stdout, log)]
        return Ended(codes, *texts, [Thing(kind, path) for _, kind, path in lines])

    def _ask(self, request: dict[str, Any]) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return list(json.loads(self._process.stdout.readline()))

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


def _compiled(folder: Path) -> Path | None:
    """The library of faults.c; None: this is no Linux, or it has no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library, source = folder / "faults.so", Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return library
