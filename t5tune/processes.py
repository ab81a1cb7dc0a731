"""Processes that this one starts end with it."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it ends, however that may happen."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
