"""How time and memory grow: measurements of work in forks of one process, and the exponents of their curves."""

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

NOISE_SECONDS, NOISE_MB = 0.15, 12.0
NOISE_SHARE = 0.1  # of the smallest measurement
POLL_SECONDS = 0.005
LARGEST_EXPONENT, MIN_SIZES = 4.0, 3


class Used(NamedTuple):
    """What some work took.

    Args:
        seconds: user CPU time, with child processes.
        megabytes: peak of the anonymous memory, with child processes, beyond the memory before the work.
    """

    seconds: float
    megabytes: float


def measure(work: Callable[[], object], log: Path) -> Used:
    """Do the work in a fork of this process, which has the imports already, but no threads.

    Args:
        log: gets the output; if the work fails, this process ends with its last lines.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(writer)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            gc.freeze()  # a collection would copy the pages of the parent's objects
            os.read(reader, 1)  # until this process's memory has been read
            try:
                work()
            except BaseException:
                traceback.print_exc(file=file)
                file.flush()
                os._exit(1)
            os._exit(0)
    os.close(reader)
    before = peak = read_anonymous_memory(pid)
    os.close(writer)
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        peak = max(peak, read_anonymous_memory(pid))
        time.sleep(POLL_SECONDS)
    if ended[1]:
        sys.exit("\n".join(log.read_text(errors="replace").splitlines()[-20:]))
    return Used(ended[2].ru_utime, (peak - before) / 2**20)


def read_anonymous_memory(pid: int) -> int:
    """Read the anonymous memory (bytes) of a process and its descendants; mapped files, such as caches, don't count."""
    found = 0
    with contextlib.suppress(OSError, IndexError):  # the process has ended
        found = int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) << 10
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += read_anonymous_memory(int(child))
    return found


def fit_exponent(sizes: Sequence[int], values: Sequence[float], noise: float) -> float | None:
    """Fit the exponent k of a + b * size ** k to the smallest size and the ends of the last decade.

    The smallest size determines the fixed part a. A growth below the noise counts as the noise, and without a growth
    above it the exponent is 0. None: there are too few sizes.
    """
    if len(sizes) < MIN_SIZES:
        return None
    noise = max(noise, NOISE_SHARE * values[0])
    middle = next(place for place in range(1, len(sizes) - 1) if sizes[place] * 10 >= sizes[-1])
    if values[-1] - values[0] <= noise:
        return 0.0
    ratio = (values[-1] - values[0]) / max(values[middle] - values[0], noise)
    low, high = 0.0, LARGEST_EXPONENT
    while high - low > 1e-3:
        exponent = (low + high) / 2
        first, inner, last = (size**exponent for size in (sizes[0], sizes[middle], sizes[-1]))
        low, high = (exponent, high) if (last - first) / (inner - first) < ratio else (low, exponent)
    return round((low + high) / 2, 2)
