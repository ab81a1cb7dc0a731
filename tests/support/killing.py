"""Kill this process at a moment that a test chooses."""

import os
import signal
import sys
from typing import Any


def kill_at(event: str, name: str) -> None:
    """From here on, the first audit event of this kind whose arguments contain the name ends this process."""

    def watch(happened: str, arguments: tuple[Any, ...]) -> None:
        if happened == event and name in str(arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kill_after(folder: str, number: int) -> None:
    """From here on, this process is killed when it opens, renames, creates or removes its Nth file of the folder."""
    touched = 0

    def watch(happened: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if happened.startswith(("open", "os.", "shutil.")) and folder in str(arguments):
            touched += 1
            if touched == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
