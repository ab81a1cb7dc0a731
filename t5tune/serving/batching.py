"""Decide which replies are generated next, and which together: requests take turns.

    schedule = Schedule(max_batch_tokens=16384, max_waiting=256)
    schedule.add([generation, …])                   # the replies of one request
    batch = schedule.begin(schedule.choose_next())
    inner = schedule.take_smaller(batch)            # between two turns of the batch; None if no smaller request waits
    schedule.end(batch)

A request for many replies doesn't hold up small requests:

1. The next batch takes one reply from each waiting request, then a second from each, and so on while they fit. Then
   these requests go to the end of the queue, so the request that waited longest is always first.
2. A batch runs to its end, because no engine can add a reply to a batch. But after each turn of SECONDS_PER_TURN, a
   smaller request can interrupt it: a request for fewer tokens than some request of the batch may still get. Smaller
   requests are generated in a batch inside the interrupted batch, which then gets a turn at least as long as the
   interruption. So a large request takes at most twice as long.

All replies of a batch have the same engine, and similar lengths where possible: the longest determines the time.
"""

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from weakref import WeakKeyDictionary

from t5tune.errors import T5TuneError
from t5tune.serving.generation import Engine, Generation

SECONDS_PER_TURN = 0.1
MAX_LEVEL = 2  # a batch can be interrupted, and so can the batch inside it


class QueueFull(T5TuneError):
    """The queue has no room for the replies of a request."""


@dataclass(eq=False)
class Request:
    """All replies of one HTTP request. `waiting`: the replies that are in no batch yet."""

    replies: Sequence[Generation]
    waiting: list[Generation]

    @property
    def engine(self) -> Engine:
        return self.replies[0].engine

    @property
    def rest(self) -> int:
        """Tokens still to generate, at most."""
        return sum(reply.rest for reply in self.replies)


@dataclass(eq=False)
class Batch:
    """Replies that are generated together, in turns.

    Args:
        requests: the owners of the replies.
        outer: the batch that this batch interrupts.
        leaves_room: False after a reply didn't fit into memory next to this batch; then nothing interrupts it.
    """

    replies: list[Generation]
    requests: list[Request]
    outer: "Batch | None"
    leaves_room: bool = True
    _turn_ends: float = field(default_factory=lambda: time.monotonic() + SECONDS_PER_TURN)

    @property
    def engine(self) -> Engine:
        return self.replies[0].engine

    @property
    def level(self) -> int:
        """How many batches it interrupts."""
        return 0 if self.outer is None else self.outer.level + 1

    @property
    def is_turn_over(self) -> bool:
        return time.monotonic() >= self._turn_ends

    def start_turn(self, seconds_interrupted: float) -> None:
        self._turn_ends = time.monotonic() + max(SECONDS_PER_TURN, seconds_interrupted)


class Schedule:
    """The waiting requests and the running batches. Callers hold a lock.

    Args:
        max_batch_tokens: limit on the number of replies times their largest size; a larger reply gets its own batch.
            Each level of interruption halves the limit.
        max_waiting: limit on the replies in the queue.
    """

    def __init__(self, max_batch_tokens: int, max_waiting: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        # engine -> a lower limit, after a batch didn't fit into memory
        self._limits: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()
        self._max_waiting = max_waiting
        self._waiting: list[Request] = []  # in the order of their turns
        self._running: list[Batch] = []  # including interrupted batches

    @property
    def num_waiting(self) -> int:
        return sum(len(request.waiting) for request in self._waiting[:])

    @property
    def num_running(self) -> int:
        return sum(reply.ended is None for batch in self._running[:] for reply in batch.replies)

    def list_unfinished(self) -> list[Generation]:
        waiting = [reply for request in self._waiting for reply in request.waiting]
        return waiting + [reply for batch in self._running for reply in batch.replies if reply.ended is None]

    def add(self, replies: Sequence[Generation]) -> None:
        """Queue all replies of a request, or raise QueueFull."""
        if self.num_waiting + len(replies) > self._max_waiting:
            raise QueueFull(f"{self.num_waiting} replies are already waiting")
        self._waiting.append(Request(replies, list(replies)))

    def remove_canceled(self) -> None:
        for request in self._waiting:
            request.waiting = [reply for reply in request.waiting if not reply.is_canceled]
        self._waiting = [request for request in self._waiting if request.waiting]

    def choose_next(self) -> list[Generation]:
        """Choose the replies of the next batch; empty if all engines with waiting requests are busy."""
        ready = self._list_ready()
        return choose_batch([request.waiting for request in ready], self._get_limit(ready[0].engine)) if ready else []

    def is_full(self, replies: Sequence[Generation]) -> bool:
        """Whether one more reply of this size would exceed the limit of a batch."""
        return compute_cost(replies, num_more=1) > self._get_limit(replies[0].engine)

    def take_smaller(self, outer: Batch) -> Batch | None:
        """Begin a batch of requests smaller than the largest request in `outer`; None if no such request waits."""
        if outer.level == MAX_LEVEL or not outer.leaves_room:
            return None
        rest = max(request.rest for request in outer.requests)
        smaller = [request for request in self._list_ready(outer) if request.rest < rest]
        if not smaller:
            return None
        limit = self._get_limit(smaller[0].engine) >> (outer.level + 1)
        return self.begin(choose_batch([request.waiting for request in smaller], limit), outer)

    def begin(self, replies: list[Generation], outer: Batch | None = None) -> Batch:
        """Take replies out of the queue. The rest of their requests moves to its end."""
        taken = set(replies)
        served = [request for request in self._waiting if not taken.isdisjoint(request.waiting)]
        for request in served:
            request.waiting = [reply for reply in request.waiting if reply not in taken]
        self._waiting = [request for request in self._waiting if request not in served]
        self._waiting += [request for request in served if request.waiting]
        batch = Batch(replies, served, outer)
        self._running.append(batch)
        return batch

    def end(self, batch: Batch) -> None:
        self._running.remove(batch)

    def reduce_limit(self, batch: Batch, replies: Sequence[Generation]) -> None:
        """Make later batches of an engine smaller, because these replies of a batch didn't fit into memory."""
        cost, outer = compute_cost(replies), batch.outer
        while outer is not None:  # interrupted batches keep their memory
            cost, outer = cost + compute_cost(outer.replies), outer.outer
        self._limits[batch.engine] = min(self._get_limit(batch.engine), cost // 2)

    def postpone(self, batch: Batch, reply: Generation) -> None:
        """Put a reply back at the head of the queue until the interrupted batches end and free their memory."""
        request = next(request for request in batch.requests if reply in request.replies)
        request.waiting.insert(0, reply)
        self._waiting = [request, *(other for other in self._waiting if other is not request)]
        outer = batch.outer
        while outer is not None:
            outer.leaves_room, outer = False, outer.outer

    def _list_ready(self, outer: Batch | None = None) -> list[Request]:
        """List the requests whose engine can compute a batch now, or is the engine of the interrupted batch."""
        # an engine computes an interrupting batch in the place of its interrupted batch
        busy = Counter(
            id(batch.engine) for batch in self._running if batch.outer is None or batch.outer.engine is not batch.engine
        )
        return [
            request
            for request in self._waiting
            if busy[id(request.engine)] < request.engine.max_batches
            or (outer is not None and request.engine is outer.engine)
        ]

    def _get_limit(self, engine: Engine) -> int:
        return self._limits.get(engine, self._max_batch_tokens)


def choose_batch(requests: Sequence[Sequence[Generation]], max_tokens: int) -> list[Generation]:
    """Choose the first request's first reply, then one reply of each request, then a second of each, … while they fit.

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
            if (len(batch) + 1) * max(largest, reply.size) <= max_tokens:
                batch.append(reply)
                largest = max(largest, reply.size)
    return batch


def compute_cost(replies: Sequence[Generation], num_more: int = 0) -> int:
    """Compute a batch's size in tokens, padding included; `num_more` counts further replies that aren't larger."""
    return (len(replies) + num_more) * max(reply.size for reply in replies)


def _get_group(generation: Generation) -> Hashable:
    return id(generation.engine), generation.engine.get_group(generation.options)
