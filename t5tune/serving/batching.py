"""Which replies are generated next, and together: requests take turns.

    schedule = Schedule(max_batch_tokens=16384, max_waiting=256)
    schedule.add([generation, …])                   # the replies of one request
    batch = schedule.begin(schedule.choose_next())
    inner = schedule.take_smaller(batch)            # between two turns of the batch; None if no smaller request waits
    schedule.end(batch)

The many replies of one request don't hold up the other requests:

1. The next batch has one reply of each request that waits, then a second one of each, while they fit. A request that
   got a place goes to the end of the queue, so the first one in the queue is always the one that has waited longest.
2. A batch runs to its end, because no engine can add a reply to it. But after each turn of SECONDS_PER_TURN, it is
   interrupted if there is a smaller request: one that asks for fewer tokens than a request of the batch may still get.
   Smaller requests are generated in a batch inside the interrupted one, which then gets a turn at least as long as the
   interruption. So a large request takes at most twice as long.

All replies of a batch have the same engine, and prefer neighbors of similar length: the longest determines the time.
"""

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from t5tune.errors import T5TuneError
from t5tune.serving.generation import Engine, Generation

SECONDS_PER_TURN = 0.1
MAX_LEVEL = 2  # a batch may be interrupted, and the batch inside it, too


class QueueFull(T5TuneError):
    """More replies wait than may."""


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
    """Replies that are generated together, in turns.

    Args:
        requests: whose replies they are.
        outer: the batch that this one interrupts.
        leaves_room: whether it may be interrupted; not if a reply didn't fit into memory next to it.
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
    def is_in_same_engine(self) -> bool:
        """Whether it interrupts a batch of its engine, which computes it instead."""
        return self.outer is not None and self.outer.engine is self.engine

    @property
    def is_turn_over(self) -> bool:
        return time.monotonic() >= self._turn_ends

    def start_turn(self, seconds_interrupted: float) -> None:
        self._turn_ends = time.monotonic() + max(SECONDS_PER_TURN, seconds_interrupted)


class Schedule:
    """The requests that wait, and the batches that are computed. Callers hold a lock.

    Args:
        max_batch_tokens: number of replies times the largest size among them; a larger reply is alone. A batch inside
            another one is at most half as large.
        max_waiting: how many replies may wait.
    """

    def __init__(self, max_batch_tokens: int, max_waiting: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._limits: dict[int, int] = {}  # id of an engine -> max_batch_tokens, where a batch didn't fit into memory
        self._max_waiting = max_waiting
        self._waiting: list[Request] = []  # in the order of their turns
        self._running: list[Batch] = []  # with the interrupted ones

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
        """Queue the replies of a request: all of them, or none.

        Raises:
            QueueFull: they would be more than may wait.
        """
        if self.num_waiting + len(replies) > self._max_waiting:
            raise QueueFull(f"{self.num_waiting} replies are waiting already")
        self._waiting.append(Request(replies, list(replies)))

    def remove_canceled(self) -> None:
        for request in self._waiting:
            request.waiting = [reply for reply in request.waiting if not reply.is_canceled]
        self._waiting = [request for request in self._waiting if request.waiting]

    def choose_next(self) -> list[Generation]:
        """Choose the replies of the next batch; none if no request waits whose engine can compute another batch."""
        ready = self._list_ready()
        return choose_batch([request.waiting for request in ready], self._get_limit(ready[0].engine)) if ready else []

    def is_full(self, replies: Sequence[Generation]) -> bool:
        """Whether no other reply of a similar size would fit into a batch."""
        return compute_cost(replies, num_more=1) > self._get_limit(replies[0].engine)

    def take_smaller(self, outer: Batch) -> Batch | None:
        """Begin a batch of requests that are smaller than the largest one in a batch; None if no such request waits."""
        if outer.level == MAX_LEVEL or not outer.leaves_room:
            return None
        rest = max(request.rest for request in outer.requests)
        smaller = [request for request in self._list_ready(outer) if request.rest < rest]
        if not smaller:
            return None
        limit = self._get_limit(smaller[0].engine) >> (outer.level + 1)
        return self.begin(choose_batch([request.waiting for request in smaller], limit), outer)

    def begin(self, replies: list[Generation], outer: Batch | None = None) -> Batch:
        """Take replies out of the queue. Their requests had their turn, and go to its end with the rest of theirs."""
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
        """Let the batches of an engine be smaller, since these replies of a batch didn't fit into memory."""
        cost, outer = compute_cost(replies), batch.outer
        while outer is not None:  # its memory isn't free
            cost, outer = cost + compute_cost(outer.replies), outer.outer
        self._limits[id(batch.engine)] = min(self._get_limit(batch.engine), cost // 2)

    def postpone(self, batch: Batch, reply: Generation) -> None:
        """Put a reply back to the head of the queue until the batches that its batch interrupts have ended."""
        request = next(request for request in batch.requests if reply in request.replies)
        request.waiting.insert(0, reply)
        self._waiting = [request, *(other for other in self._waiting if other is not request)]
        outer = batch.outer
        while outer is not None:
            outer.leaves_room, outer = False, outer.outer

    def _list_ready(self, outer: Batch | None = None) -> list[Request]:
        """List the requests whose engine can compute a batch now, or in the place of the interrupted one."""
        busy = Counter(id(batch.engine) for batch in self._running if not batch.is_in_same_engine)
        return [
            request
            for request in self._waiting
            if busy[id(request.engine)] < request.engine.max_batches
            or (outer is not None and request.engine is outer.engine)
        ]

    def _get_limit(self, engine: Engine) -> int:
        return self._limits.get(id(engine), self._max_batch_tokens)


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
            if (len(batch) + 1) * max(largest, reply.size) <= max_tokens:
                batch.append(reply)
                largest = max(largest, reply.size)
    return batch


def compute_cost(replies: Sequence[Generation], num_more: int = 0) -> int:
    """Compute the size of a batch in tokens: shorter prompts are padded, and their replies wait for the longest.

    Args:
        num_more: replies in addition that aren't larger.
    """
    return (len(replies) + num_more) * max(reply.size for reply in replies)


def _get_group(generation: Generation) -> Hashable:
    return id(generation.engine), generation.engine.get_group(generation.options)
