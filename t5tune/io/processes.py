"""How t5tune starts processes of its own."""

import ctypes
import os
import signal
import sys
from pathlib import Path


def python_module(name: str, *arguments: str) -> list[str]:
    """The command that runs one of t5tune's modules in this Python.

    Not with `python -m` alone: it looks for modules in the current folder first, and a datasets/ or profile.py of the
    user's would stand in for a library's.
    """
    is_here = os.path.samefile(Path(__file__).parents[2], os.curdir)
    return [sys.executable, *([] if is_here else ["-P"]), "-m", name, *arguments]


def die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it ends, however that may happen."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
