"""Threads that generate replies in batches, as `batching.py` schedules them.

batcher = Batcher(Schedule(max_batch_tokens=16384, max_waiting=256), max_delay=0.005)
batcher.submit([generation, …])    # the replies of one request
batcher.close()                    # returns when all replies are complete
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from t5tune.errors import OutOfMemory, T5TuneError
from t5tune.io.reasons import describe_error
from t5tune.model.device import is_device_lost, is_out_of_memory
from t5tune.serving.batching import Batch, Schedule
from t5tune.serving.generation import Engine, Generation

MAX_DELAYS = 10  # a stream of requests, each within `max_delay`, delays a batch at most this many times as long


class DeviceLost(T5TuneError):
    """The GPU failed, and can't compute anything more in this process."""


@dataclass(eq=False)
class Batcher:
    """Generates replies in background threads.

    Args:
        max_delay: how long a batch waits for one more reply, in seconds; in all at most MAX_DELAYS times as long.
        num_threads: limit on the batches that are computed at the same time; `add_threads` raises it.
        on_batch: called with the replies of each batch before it is computed.
    """

    schedule: Schedule
    max_delay: float
    num_threads: int = 1
    on_batch: Callable[[Sequence[Generation]], None] = lambda batch: None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()  # its lock protects the schedule
        self._ended = WeakKeyDictionary[Engine, float]()  # when the engine's last batch ended
        self._is_closed = False
        self._failure: DeviceLost | None = None
        self._threads: list[threading.Thread] = []
        self.add_threads(self.num_threads)

    def add_threads(self, num_threads: int) -> None:
        """Start threads until there are `num_threads`."""
        while len(self._threads) < num_threads:
            thread = threading.Thread(target=self._run, name="batches", daemon=True)
            thread.start()  # first, because `failure` looks for a thread that isn't alive
            self._threads.append(thread)

    @property
    def failure(self) -> str | None:
        """Why no more replies can be generated; None if all is well."""
        if self._failure is not None:
            return str(self._failure)
        if not all(thread.is_alive() for thread in self._threads):
            return "the thread that computes replies has ended; restart the server"
        return None

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all replies of a request, or raise QueueFull, or DeviceLost if the GPU failed."""
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self.schedule.add(generations)
            self._changed.notify_all()

    def cancel(self, generations: Sequence[Generation]) -> None:
        """Cancel replies: waiting replies leave the queue, running replies end with their next token."""
        with self._changed:
            for generation in generations:
                generation.is_canceled = True
            self.schedule.remove_canceled()
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Generate the waiting replies, cancel the unfinished ones after `timeout` seconds, and end the threads."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        with self._changed:
            self.cancel(self.schedule.list_unfinished())
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while batch := self._wait_for_batch():
            self._compute(batch)
            del batch  # while it waits, this thread would keep the model of a batch after a reload

    def _wait_for_batch(self) -> Batch | None:
        """Wait for the next batch; None when the batcher is closed and the queue is empty."""
        with self._changed:
            while True:
                if replies := self.schedule.choose_next():
                    wait = self._compute_wait(replies)
                    if wait <= 0 or self._is_closed or self.schedule.is_full(replies):
                        return self.schedule.begin(replies)
                    self._changed.wait(wait)
                elif self._is_closed and self.schedule.num_waiting == 0:
                    return None
                else:
                    self._changed.wait()

    def _compute_wait(self, replies: Sequence[Generation]) -> float:
        """Compute for how many seconds the next batch still waits for more replies.

        After a batch, its clients send their next requests within a few milliseconds. They join the requests that came
        during the batch; otherwise, two halves of the clients would take turns.
        """
        ended = self._ended.get(replies[0].engine, 0.0)
        submitted = [max(reply.submitted_at, ended) for reply in replies]
        until = min(max(submitted) + self.max_delay, min(submitted) + MAX_DELAYS * self.max_delay)
        return until - time.monotonic()

    def _compute(self, batch: Batch) -> None:
        self.on_batch(batch.replies)
        self._generate(batch, batch.replies)
        with self._changed:
            self.schedule.end(batch)
            self._ended[batch.engine] = time.monotonic()
            self._changed.notify_all()

    def _generate(self, batch: Batch, replies: Sequence[Generation]) -> None:
        """Generate replies; if that fails, generate each half, so that only the faulty replies end with an error."""

        def add(row: int, token: int) -> bool:
            if batch.is_turn_over:
                self._let_smaller_go_first(batch)
            return replies[row].add(token)

        for reply in replies:
            reply.start()
        try:
            batch.engine.generate(replies, add)
            # for replies that still haven't ended
            failure: T5TuneError | None = T5TuneError("the reply couldn't be computed: the engine stopped early")
        except Exception as error:
            if is_device_lost(error):
                failure = self._give_up(error)
            elif len(replies) == 1 and not (batch.outer is not None and is_out_of_memory(error)):
                failure = _explain(error, replies[0])
            else:
                failure = None
                if is_out_of_memory(error):
                    with self._changed:
                        self.schedule.reduce_limit(batch, replies)
        # Only after the `except` block: until then, the error's frames keep the memory of the failed batch.
        unfinished = [reply for reply in replies if reply.ended is None and not reply.is_canceled]
        if failure is not None:
            for reply in unfinished:
                reply.end(failure)
            return
        for reply in unfinished:
            if reply.follows and reply.ids and not reply.is_repeatable:
                reply.end(T5TuneError("the reply couldn't be computed: its batch failed"))
        rest = [reply for reply in unfinished if reply.ended is None]
        if rest and len(replies) == 1:  # it may fit once the interrupted batches have freed their memory
            with self._changed:
                self.schedule.postpone(batch, rest[0])
            return
        middle = (len(rest) + 1) // 2
        for half in (rest[:middle], rest[middle:]):
            if half:
                self._generate(batch, half)

    def _let_smaller_go_first(self, batch: Batch) -> None:
        """Between two turns of a batch, generate smaller requests in its thread, while its engine waits in `add`."""
        started = time.monotonic()
        with self._changed:
            smaller = self.schedule.take_smaller(batch)
        if smaller is not None:
            self._compute(smaller)
        batch.start_turn(seconds_interrupted=time.monotonic() - started)

    def _give_up(self, error: Exception) -> DeviceLost:
        """End all replies, since every later call to the GPU would fail too."""
        failure = DeviceLost(f"the GPU has failed: {describe_error(error)}", hint="restart the server")
        with self._changed:
            self._failure = failure
            unfinished = self.schedule.list_unfinished()
            for reply in unfinished:
                reply.end(failure)
            self.cancel(unfinished)
        return failure


def _explain(error: Exception, generation: Generation) -> T5TuneError:
    if isinstance(error, T5TuneError):
        return error
    if is_out_of_memory(error):
        lengths = f"{len(generation.source)} prompt and {generation.options.max_new_tokens} reply tokens"
        # labels count as a reply of one token
        hint = "ask for fewer max_tokens" if generation.options.max_new_tokens > 1 else "send a shorter text"
        return OutOfMemory(f"out of memory: one reply with up to {lengths}", hint=hint)
    return T5TuneError(f"the reply couldn't be computed: {type(error).__name__}: {describe_error(error)}")
