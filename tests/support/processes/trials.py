"""The processes in which a server tries constraints, and a constraint that they never finish."""

import os
from contextlib import suppress

import psutil

ENDLESS = {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}  # llguidance takes all time and memory


def list_trials(pid: int | None = None) -> list[psutil.Process]:
    """List the processes below a server's process: first the process that forks trials, then the trials."""
    found = []
    for process in psutil.Process(pid or os.getpid()).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if "t5tune.constraints.trials" in process.cmdline() else []
    return found
