"""Helpers for starting subprocesses of t5tune, and threads."""

import atexit
import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import IO


def make_module_command(name: str, *arguments: str) -> list[str]:
    """Make the command that runs a module of t5tune with this Python interpreter.

    It uses `python -P -m`, because `python -m` alone imports modules from the current folder first: a user's
    `datasets/` or `profile.py` there would shadow the library of that name. In a source checkout of t5tune the current
    folder is needed, so there it is plain `python -m`.
    """
    is_here = os.path.samefile(Path(__file__).parents[2], os.curdir)
    return [sys.executable, *([] if is_here else ["-P"]), "-m", name, *arguments]


class ForkedProcess(ForkProcess):
    """A fork of this process, with methods of subprocess.Popen."""

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.pid is not None and self.is_alive():
            os.kill(self.pid, number)


def can_fork() -> bool:
    """Return whether torch works in a fork: Apple's libraries don't, nor does CUDA once this process has used it."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


def start_module(
    name: str, arguments: list[str], environment: Mapping[str, str], stdout: IO[str] | None, in_fork: bool
) -> subprocess.Popen[bytes] | ForkedProcess:
    """Start `make_module_command`'s command in a process that ends with this process.

    Args:
        stdout: None: this process's stdout.
        in_fork: if possible, run it in a fork of this process, which has imported the libraries. It doesn't have this
            process's threads, so torch must not have computed anything yet.
    """
    if not (in_fork and can_fork()):
        command = make_module_command(name, *arguments)
        return subprocess.Popen(command, env=environment, stdout=stdout, preexec_fn=die_with_parent)
    process = ForkedProcess(target=_run_module, args=(name, arguments, environment, stdout))
    process.start()
    return process


def _run_module(name: str, arguments: list[str], environment: Mapping[str, str], stdout: IO[str] | None) -> None:
    import torch

    die_with_parent()
    atexit._clear()  # they would remove the temporary folders of the process that forked
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # torch has already read it
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if stdout is not None:
        os.dup2(stdout.fileno(), 1)
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__")


def make_module_environment() -> dict[str, str]:
    """Make the environment of `make_module_command`'s process, which finds the same modules as this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def count_cores() -> int:
    """Count the cores that this process may use: fewer than the machine's with taskset, or in a job of SLURM."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however it ends. Does nothing on other systems."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
