"""The queue of requests, and the threads that generate their replies in batches.

    batcher = Batcher(max_batch_tokens=16384, max_delay=0.005, max_waiting=256)
    batcher.submit([generation, …])    # the replies of one request
    batcher.close()                    # ends when all replies have

Requests take turns, so that the many replies of one request don't hold up the other requests:

1. The next batch has one reply of each request that waits, then a second one of each, while they fit. A request that
   got a place goes to the end of the queue, so the first one in the queue is always the one that has waited longest.
2. A batch runs to its end, because no engine can add a reply to it. But after each turn of SECONDS_PER_TURN, it is
   interrupted if there is a smaller request: one that asks for fewer tokens than a request of the batch may still get.
   Smaller requests are generated in a batch inside the interrupted one, which then gets a turn at least as long as the
   interruption. So a large request takes at most twice as long.

All replies of a batch have the same engine, and prefer neighbors of similar length: the longest determines the time.
The first request of a batch waits a few milliseconds for others to join it.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from t5tune.errors import OutOfMemory, T5TuneError
from t5tune.io.reasons import describe_error
from t5tune.model.device import is_device_lost, is_out_of_memory
from t5tune.serving.generation import Engine, Generation

SECONDS_PER_TURN = 0.1
MAX_LEVEL = 2  # a batch may be interrupted, and the batch inside it, too


class QueueFull(T5TuneError):
    """More replies wait than may."""


class DeviceLost(T5TuneError):
    """The GPU has failed, and computes nothing more for this process."""


@dataclass(eq=False)
class Request:
    """The replies that a client asked for at once.

    Args:
        waiting: the replies that are in no batch yet.
    """

    replies: Sequence[Generation]
    waiting: list[Generation]

    @property
    def engine(self) -> Engine:
        return self.replies[0].engine

    @property
    def rest(self) -> int:
        """Tokens that its replies may still get."""
        return sum(reply.rest for reply in self.replies)


@dataclass(eq=False)
class Batch:
    """Replies that are generated together.

    Args:
        requests: whose replies they are.
        outer: the batch that this one interrupts.
        turn_ends: when it may be interrupted, as `time.monotonic` counts.
    """

    replies: list[Generation]
    requests: list[Request]
    outer: "Batch | None"
    turn_ends: float

    @property
    def engine(self) -> Engine:
        return self.replies[0].engine

    @property
    def level(self) -> int:
        """How many batches it interrupts."""
        return 0 if self.outer is None else self.outer.level + 1

    @property
    def is_in_same_engine(self) -> bool:
        """Whether it interrupts a batch of its engine, which computes it instead."""
        return self.outer is not None and self.outer.engine is self.engine

    @property
    def cost(self) -> int:
        """Its size in tokens, and of all batches that it interrupts, which keep their memory."""
        cost = compute_cost(len(self.replies), max(reply.size for reply in self.replies))
        return cost + (0 if self.outer is None else self.outer.cost)


class Batcher:
    """Generates replies in threads of its own.

    Args:
        max_batch_tokens: number of replies times the largest size among them; a larger reply is alone. A batch inside
            another one is at most half as large.
        max_delay: how long the first reply of a batch waits for others, in seconds.
        max_waiting: how many replies may wait.
        num_threads: how many batches are computed at the same time, if their engines can do that.
        on_batch: called with the replies of each batch before it is computed.
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
        self._waiting: list[Request] = []  # in the order of their turns
        self._running: list[Batch] = []  # with the interrupted ones
        self._changed = threading.Condition()
        self._is_closed = False
        self._failure: DeviceLost | None = None
        self._threads = [threading.Thread(target=self._run, name="batches", daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        return sum(len(request.waiting) for request in self._waiting[:])

    @property
    def num_running(self) -> int:
        return sum(reply.ended is None for batch in self._running[:] for reply in batch.replies)

    @property
    def failure(self) -> str | None:
        """Why no reply can be generated any more; None if that is possible."""
        if self._failure is not None:
            return str(self._failure)
        if not all(thread.is_alive() for thread in self._threads):
            return "the thread that computes replies has ended; restart the server"
        return None

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue the replies of a request: all of them, or none.

        Raises:
            QueueFull: they would be more than may wait.
            DeviceLost: the GPU has failed.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self.num_waiting + len(generations) > self.max_waiting:
                raise QueueFull(f"{self.num_waiting} replies are waiting already")
            self._waiting.append(Request(generations, list(generations)))
            self._changed.notify_all()

    def cancel(self, generations: Sequence[Generation]) -> None:
        """Give up on replies: those that wait leave the queue, those that are computed end with their next token."""
        with self._changed:
            for generation in generations:
                generation.is_canceled = True
            for request in self._waiting:
                request.waiting = [reply for reply in request.waiting if not reply.is_canceled]
            self._waiting = [request for request in self._waiting if request.waiting]
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
        self.cancel(self._list_unfinished())
        for thread in self._threads:
            thread.join()

    def _list_unfinished(self) -> list[Generation]:
        with self._changed:
            waiting = [reply for request in self._waiting for reply in request.waiting]
            return waiting + [reply for batch in self._running for reply in batch.replies if reply.ended is None]

    # Scheduling: which replies are generated next

    def _run(self) -> None:
        while batch := self._take_next():
            self._compute(batch)

    def _take_next(self) -> Batch | None:
        """Wait for requests and take the next batch of their replies; None when the queue is closed."""
        with self._changed:
            while True:
                if ready := self._list_ready():
                    limit = self._get_limit(ready[0].engine)
                    replies = choose_batch([request.waiting for request in ready], limit)
                    wait = replies[0].submitted_at + self._max_delay - time.monotonic()
                    largest = max(reply.size for reply in replies)
                    if wait <= 0 or self._is_closed or compute_cost(len(replies) + 1, largest) > limit:
                        return self._begin(replies)
                    self._changed.wait(wait)
                elif self._is_closed and not self._waiting:
                    return None
                else:
                    self._changed.wait()

    def _take_smaller(self, outer: Batch) -> Batch | None:
        """Take a batch of requests that are smaller than the largest one in a batch; None if no such request waits."""
        if outer.level == MAX_LEVEL:
            return None
        with self._changed:
            rest = max(request.rest for request in outer.requests)
            smaller = [request for request in self._list_ready(outer) if request.rest < rest]
            if not smaller:
                return None
            limit = self._get_limit(smaller[0].engine) >> (outer.level + 1)
            return self._begin(choose_batch([request.waiting for request in smaller], limit), outer)

    def _list_ready(self, outer: Batch | None = None) -> list[Request]:
        """List the requests whose engine can compute a batch now, or in the place of the interrupted one."""
        busy = Counter(id(batch.engine) for batch in self._running if not batch.is_in_same_engine)
        return [
            request
            for request in self._waiting
            if busy[id(request.engine)] < request.engine.max_batches
            or (outer is not None and request.engine is outer.engine)
        ]

    def _begin(self, replies: list[Generation], outer: Batch | None = None) -> Batch:
        """Take replies out of the queue. Their requests had their turn, and go to its end with the rest of theirs."""
        taken = set(replies)
        served = [request for request in self._waiting if not taken.isdisjoint(request.waiting)]
        for request in served:
            request.waiting = [reply for reply in request.waiting if reply not in taken]
        self._waiting = [request for request in self._waiting if request not in served]
        self._waiting += [request for request in served if request.waiting]
        batch = Batch(replies, served, outer, turn_ends=time.monotonic() + SECONDS_PER_TURN)
        self._running.append(batch)
        return batch

    def _get_limit(self, engine: Engine) -> int:
        """Return the maximum size of the batches of an engine, which is smaller if one didn't fit into memory."""
        return self._limits.get(id(engine), self._max_batch_tokens)

    # Computing

    def _compute(self, batch: Batch) -> None:
        self._on_batch(batch.replies)
        self._generate(batch, batch.replies)
        with self._changed:
            self._running.remove(batch)
            self._changed.notify_all()

    def _generate(self, batch: Batch, replies: Sequence[Generation]) -> None:
        """Generate replies, and if that fails, their halves, so that only what can't be computed ends with an error."""

        def add(row: int, token: int) -> bool:
            self._let_smaller_go_first(batch)
            return replies[row].add(token)

        for reply in replies:
            reply.start()
        try:
            batch.engine.generate(replies, add)
            # of replies that haven't ended nevertheless
            failure: T5TuneError | None = T5TuneError("the reply couldn't be computed: the engine gave none")
        except Exception as error:
            if is_device_lost(error):
                failure = self._give_up(error)
            elif len(replies) == 1:
                failure = _explain(error, replies[0])
            else:
                failure = None
                if is_out_of_memory(error):  # later batches aren't larger than what doesn't fit
                    with self._changed:
                        self._limits[id(batch.engine)] = min(self._get_limit(batch.engine), batch.cost // 2)
        # after the `except` block: the error refers to the frames that hold the memory
        unfinished = [reply for reply in replies if reply.ended is None and not reply.is_canceled]
        if failure is not None:
            for reply in unfinished:
                reply.end(failure)
            return
        for reply in unfinished:
            if reply.follows and reply.ids and not reply.is_repeatable:
                reply.end(T5TuneError("the reply couldn't be computed: its batch failed"))
        rest = [reply for reply in unfinished if reply.ended is None]
        middle = (len(rest) + 1) // 2
        for half in (rest[:middle], rest[middle:]):
            if half:
                self._generate(batch, half)

    def _let_smaller_go_first(self, batch: Batch) -> None:
        """Between two turns of a batch, generate smaller requests, in the midst of the engine's work."""
        started = time.monotonic()
        if started < batch.turn_ends:
            return
        if smaller := self._take_smaller(batch):
            self._compute(smaller)
        ended = time.monotonic()
        batch.turn_ends = ended + max(SECONDS_PER_TURN, ended - started)

    def _give_up(self, error: Exception) -> DeviceLost:
        """End all replies, since every later call to the GPU would fail, too."""
        failure = DeviceLost(f"the GPU has failed: {describe_error(error)}", hint="restart the server")
        with self._changed:
            self._failure = failure
            for reply in self._list_unfinished():
                reply.end(failure)
            self._waiting = []
        return failure


def choose_batch(requests: Sequence[Sequence[Generation]], max_tokens: int) -> list[Generation]:
    """Choose the first request's first reply, and then one of each request, a second one of each, … while they fit.

    Args:
        requests: the waiting replies of each request, in the order of their turns.
    """
    first = requests[0][0]
    group = _get_group(first)
    matching = [[reply for reply in replies if _get_group(reply) == group] for replies in requests]
    batch, largest = [first], first.size
    for turn in zip_longest(*matching):
        replies = [reply for reply in turn if reply is not None and reply is not first]
        for reply in sorted(replies, key=lambda reply: abs(reply.size - first.size)):
            if compute_cost(len(batch) + 1, max(largest, reply.size)) <= max_tokens:
                batch.append(reply)
                largest = max(largest, reply.size)
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
