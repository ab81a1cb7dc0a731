"""A process that encodes batches of records for the one that started it, all of it as pickles.

A recipe comes in first, then batches.
"""

import os
import pickle
import sys
from typing import BinaryIO

from t5tune.data.pipeline import Outcome, Pipeline
from t5tune.errors import T5TuneError, TrainingError


def work(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer each batch with its outcomes, or with the exception that it met, until there are no more."""
    pipeline: Pipeline | None = None
    recipe = pickle.load(requests)
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        answer: list[Outcome] | T5TuneError
        try:
            pipeline = pipeline or Pipeline(recipe)
            answer = pipeline(batch)
        except T5TuneError as error:
            answer = error
        except Exception as error:
            answer = TrainingError(f"a worker that encodes records failed: {type(error).__name__}: {error}")
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:  # nobody waits for it any more
            os._exit(1)


if __name__ == "__main__":
    work(sys.stdin.buffer, sys.stdout.buffer)
