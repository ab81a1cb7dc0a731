"""Helpers for starting subprocesses of t5tune, and threads."""

import ctypes
import os
import signal
import sys
from pathlib import Path


def make_module_command(name: str, *arguments: str) -> list[str]:
    """Make the command that runs a module of t5tune with this Python interpreter.

    It uses `python -P -m`, because `python -m` alone imports modules from the current folder first: a user's
    `datasets/` or `profile.py` there would shadow the library of that name. In a source checkout of t5tune the current
    folder is needed, so there it is plain `python -m`.
    """
    is_here = os.path.samefile(Path(__file__).parents[2], os.curdir)
    return [sys.executable, *([] if is_here else ["-P"]), "-m", name, *arguments]


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
