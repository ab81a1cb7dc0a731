"""Encode raw records in several processes, in the order of the records.

    for record, encoded in encode_records(records, Pipeline(...), num_workers=4):
        ...

The result doesn't depend on the number of processes: batches are encoded independently and returned in order. A worker
process runs this module. It reads pickles from standard input, first a Pipeline and then batches of records, and writes
the results of each batch to standard output, also as a pickle.
"""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, BinaryIO

from t5tune.data.reading.raw_records import RawRecord
from t5tune.errors import DataError, T5TuneError, TrainingError
from t5tune.io.processes import make_module_command, make_module_environment
from t5tune.preparing.pipeline import EncodedRecord, Pipeline

BATCH_RECORDS = 256
BATCH_BYTES = 1 << 19
BYTES_PER_WORKER = 16 << 20  # of data; for less, starting another process takes longer than it saves


def encode_records(
    records: Iterable[RawRecord], pipeline: Pipeline, num_workers: int
) -> Generator[tuple[RawRecord, EncodedRecord], None, None]:
    """Yield each record with its result, in order.

    Raises:
        DataError: from the records' reader, or for an array element that is not valid JSON. It is raised only after
            all previous records were yielded.
    """
    batches = _group_into_batches(records)
    if num_workers == 1:
        for batch in batches:
            yield from _pair(batch, pipeline(batch))
        return
    yield from _encode_in_workers(batches, pipeline, num_workers)


def _encode_in_workers(
    batches: Iterator[list[RawRecord]], pipeline: Pipeline, num_workers: int
) -> Iterator[tuple[RawRecord, EncodedRecord]]:
    executor = ThreadPoolExecutor(num_workers)  # each thread only waits for a worker
    workers: list[Worker] = []
    idle: SimpleQueue[Worker] = SimpleQueue()

    def encode(batch: list[RawRecord]) -> list[EncodedRecord | DataError]:
        worker = idle.get()
        try:
            return worker(batch)
        finally:
            idle.put(worker)

    try:
        waiting: deque[tuple[list[RawRecord], Future[list[EncodedRecord | DataError]]]] = deque()
        problem: Exception | None = None
        while True:
            try:
                read = next(batches, None)
            except Exception as error:  # yield the records before the error first, as with a single process
                read, problem = None, error
            if read is not None:
                if idle.empty() and len(workers) < num_workers:
                    workers.append(Worker(pipeline))
                    idle.put(workers[-1])
                waiting.append((read, executor.submit(encode, read)))
            while waiting and (read is None or len(waiting) > 2 * num_workers):
                batch, results = waiting.popleft()
                yield from _pair(batch, results.result())
            if read is None:
                break
        if problem is not None:
            raise problem
    finally:
        for worker in workers:
            worker.close()
        executor.shutdown(cancel_futures=True)


class Worker:
    """A process that encodes batches. It ends when its input is closed, so also when this process dies.

    It runs `python -m t5tune.preparing.worker`, because multiprocessing would import the user's main script again.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        command = make_module_command("t5tune.preparing.worker")
        # a separate process group, so that Ctrl-C reaches only this process, which then kills the worker
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=make_module_environment(), process_group=0
        )
        self._send(pipeline)

    def __call__(self, batch: list[RawRecord]) -> list[EncodedRecord | DataError]:
        """Return the result of each record, like `Pipeline`."""
        assert self._process.stdout is not None
        try:
            self._send(batch)
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            raise TrainingError(f"a worker process that encodes records exited with code {code}") from None
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin)
        self._process.stdin.flush()


def _pair(
    batch: list[RawRecord], results: list[EncodedRecord | DataError]
) -> Iterator[tuple[RawRecord, EncodedRecord]]:
    """Yield each record with its result; if the last result is an error, raise it."""
    for record, result in zip(batch, results, strict=False):
        if isinstance(result, DataError):
            raise result
        yield record, result


def _group_into_batches(records: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    """Group records into batches; if reading fails, yield the records before the error first."""
    batch: list[RawRecord] = []
    size = 0
    try:
        for record in records:
            batch.append(record)
            size += record.size
            if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _serve_batches(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer each batch with its results, or with the exception that it raised, until the input ends."""
    pipeline: Pipeline | None = None
    while True:
        try:
            read = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):  # the parent process has ended, perhaps while it was writing
            return
        if pipeline is None:
            pipeline = read
            continue
        answer: list[EncodedRecord | DataError] | T5TuneError
        try:
            answer = pipeline(read)
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
    _serve_batches(sys.stdin.buffer, sys.stdout.buffer)
