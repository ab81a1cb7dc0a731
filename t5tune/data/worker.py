"""Worker process that encodes batches of records for its parent process.

It reads pickles from standard input, first a PipelineConfig and then batches, and writes the outcomes of each batch to
standard output, also as a pickle.
"""

import os
import pickle
import sys
from typing import BinaryIO

from t5tune.data.pipeline import Outcome, Pipeline
from t5tune.errors import T5TuneError, TrainingError


def serve_batches(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer each batch with its outcomes, or with the exception that it raised, until the input ends."""
    pipeline: Pipeline | None = None
    config = pickle.load(requests)
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        answer: list[Outcome] | T5TuneError
        try:
            pipeline = pipeline or Pipeline(config)
            answer = pipeline(batch)
        except T5TuneError as error:
            answer = error
        except Exception as error:
            answer = TrainingError(f"a worker process that encodes records failed: {type(error).__name__}: {error}")
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:  # the parent process has ended
            os._exit(1)


if __name__ == "__main__":
    serve_batches(sys.stdin.buffer, sys.stdout.buffer)
