"""The memory that glibc keeps after it was freed."""

import ctypes
import sys


def return_freed_heap() -> None:
    """Return memory that was freed, and that glibc keeps for later, to Linux; see malloc_trim(3).

    With other C libraries this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
