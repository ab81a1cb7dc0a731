"""A process that encodes batches of records for the one that started it, all of it as pickles.

A recipe comes in first, then batches.
"""

import os
import pickle
import signal
import sys
from typing import BinaryIO

from t5tune.data.pipeline import Outcome, Pipeline
from t5tune.errors import DataError


def work(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer each batch with its outcomes, or with what is wrong with the file, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it
    pipeline = Pipeline(pickle.load(requests))
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        answer: list[Outcome] | tuple[str, str | None]
        try:
            answer = pipeline(batch)
        except DataError as error:
            answer = (error.message, error.hint)
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:  # nobody waits for it any more
            os._exit(1)


if __name__ == "__main__":
    work(sys.stdin.buffer, sys.stdout.buffer)
