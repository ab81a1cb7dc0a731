"""The queue of replies, and the threads that generate them in batches.

    batcher = Batcher(max_batch_tokens=16384, max_delay=0.005, max_waiting=256)
    batcher.submit([generation, …])
    batcher.close()         # ends when all replies have

A batch is of one engine, and of prompts and replies of similar length: what takes longest determines its time. The
reply that has waited longest is always in the next batch, so none waits forever. It waits a few milliseconds for others
to join it; while a batch is computed, the next one collects by itself.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from t5tune.errors import OutOfMemory, T5TuneError
from t5tune.io.reasons import describe_error
from t5tune.model.device import is_out_of_memory
from t5tune.serving.generation import Generation


class QueueFull(T5TuneError):
    """More replies wait than may."""


class Batcher:
    """Generates replies in threads of its own.

    Args:
        max_batch_tokens: number of replies times the largest size among them; a larger reply is alone.
        max_delay: how long the first reply of a batch waits for others, in seconds.
        max_waiting: how many replies may wait.
        num_threads: how many batches are computed at the same time, if their engines can do that.
        on_batch: called with each batch before it is computed.
    """

    def __init__(
        self,
        max_batch_tokens: int,
        max_delay: float,
        max_waiting: int,
        num_threads: int = 1,
        on_batch: Callable[[Sequence[Generation]], None] = lambda batch: None,
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._limits: dict[int, int] = {}  # id of an engine -> max_batch_tokens, where a batch didn't fit into memory
        self._max_delay = max_delay
        self.max_waiting = max_waiting
        self._on_batch = on_batch
        self._waiting: list[Generation] = []
        self._running: list[Sequence[Generation]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [threading.Thread(target=self._run, name="batches", daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(generation.ended is None for batch in self._running[:] for generation in batch)

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue the replies of a request: all of them, or none.

        Raises:
            QueueFull: they would be more than may wait.
        """
        with self._changed:
            if len(self._waiting) + len(generations) > self.max_waiting:
                raise QueueFull(f"{len(self._waiting)} replies are waiting already")
            self._waiting += generations
            self._changed.notify_all()

    def cancel(self, generations: Sequence[Generation]) -> None:
        """Give up on replies: those that wait leave the queue, those that are computed end with their next token."""
        with self._changed:
            for generation in generations:
                generation.is_canceled = True
            self._waiting = [generation for generation in self._waiting if not generation.is_canceled]
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Generate what waits, and end the threads.

        Args:
            timeout: seconds after which the replies that haven't ended are cut off.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        self.cancel([*self._waiting, *(generation for batch in self._running[:] for generation in batch)])
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while batch := self._take_batch():
            self._on_batch(batch)
            self._generate(batch)
            with self._changed:
                self._running = [running for running in self._running if running is not batch]
                self._changed.notify_all()

    def _take_batch(self) -> list[Generation]:
        """Wait for replies and take the next batch of them; an empty one when the queue is closed."""
        with self._changed:
            while True:
                ready = self._list_ready()
                batch = choose_batch(ready, self._get_limit(ready[0])) if ready else []
                if batch:
                    wait = batch[0].submitted_at + self._max_delay - time.monotonic()
                    if wait <= 0 or self._is_closed or self._is_full(batch):
                        break
                    self._changed.wait(wait)
                elif self._is_closed and not self._waiting:
                    return []
                else:
                    self._changed.wait()
            chosen = set(map(id, batch))
            self._waiting = [generation for generation in self._waiting if id(generation) not in chosen]
            self._running.append(batch)
            return batch

    def _list_ready(self) -> list[Generation]:
        """List the replies that wait and whose engine can compute another batch, in the order of their arrival."""
        busy = Counter(id(batch[0].engine) for batch in self._running)
        return [item for item in self._waiting if busy[id(item.engine)] < item.engine.max_batches]

    def _is_full(self, batch: Sequence[Generation]) -> bool:
        """Whether no other reply of a similar size would fit."""
        return compute_cost(len(batch) + 1, max(generation.size for generation in batch)) > self._get_limit(batch[0])

    def _get_limit(self, generation: Generation) -> int:
        """Return the maximum size of the batches of an engine, which is smaller if one didn't fit into memory."""
        return self._limits.get(id(generation.engine), self._max_batch_tokens)

    def _generate(self, batch: Sequence[Generation]) -> None:
        """Generate a batch, and if that fails, its halves, so that only what can't be computed ends with an error."""
        for generation in batch:
            generation.start()
        try:
            batch[0].engine.generate(batch)
            # of replies that haven't ended nevertheless
            failure: T5TuneError | None = T5TuneError("the reply couldn't be computed: the engine gave none")
        except Exception as error:
            if len(batch) == 1:
                failure = _explain(error, batch[0])
            else:
                failure = None
                if is_out_of_memory(error):  # later batches aren't larger than what doesn't fit
                    cost = compute_cost(len(batch), max(generation.size for generation in batch))
                    with self._changed:
                        self._limits[id(batch[0].engine)] = min(self._get_limit(batch[0]), cost // 2)
        # after the `except` block: the error refers to the frames that hold the memory
        unfinished = [generation for generation in batch if generation.ended is None and not generation.is_canceled]
        if failure is not None:
            for generation in unfinished:
                generation.end(failure)
            return
        for generation in unfinished:
            if generation.follows and generation.ids and not generation.is_repeatable:
                generation.end(T5TuneError("the reply couldn't be computed: its batch failed"))
        rest = [generation for generation in unfinished if generation.ended is None]
        middle = (len(rest) + 1) // 2
        for half in (rest[:middle], rest[middle:]):
            if half:
                self._generate(half)


def choose_batch(waiting: Sequence[Generation], max_tokens: int) -> list[Generation]:
    """Choose the reply that has waited longest, and those that suit it best, while the batch isn't too large."""
    if not waiting:
        return []
    oldest = waiting[0]
    group = _get_group(oldest)
    others = [generation for generation in waiting[1:] if _get_group(generation) == group]
    batch, largest = [oldest], oldest.size
    for generation in sorted(others, key=lambda other: abs(other.size - oldest.size)):
        if compute_cost(len(batch) + 1, max(largest, generation.size)) > max_tokens:
            break
        batch.append(generation)
        largest = max(largest, generation.size)
    return batch


def compute_cost(num_replies: int, largest_size: int) -> int:
    """Compute the size of a batch in tokens: shorter prompts are padded, and their replies wait for the longest."""
    return num_replies * largest_size


def _get_group(generation: Generation) -> Hashable:
    return id(generation.engine), generation.engine.get_group(generation.options)


def _explain(error: Exception, generation: Generation) -> T5TuneError:
    if isinstance(error, T5TuneError):
        return error
    if is_out_of_memory(error):
        lengths = f"{len(generation.source)} prompt and {generation.options.max_new_tokens} reply tokens"
        return OutOfMemory(f"out of memory: one reply with up to {lengths}", hint="ask for fewer max_tokens")
    return T5TuneError(f"the reply couldn't be computed: {type(error).__name__}: {describe_error(error)}")
