"""Notice ranks that hang, name them, and end this process.

    with watch_ranks(world, timeout=1800) as watch:
        watch.count_batch()     # before each micro-batch of training

If a rank is lost, gloo's collectives raise errors in the remaining ranks. NCCL's don't: the main thread waits for its
GPU until NCCL's watchdog aborts the process, and then a rank that only waited seems to have failed. So a thread of each
rank publishes two counters in the rendezvous store (its polls of the store, and the micro-batches that its main thread
has begun) and reads the counters of all ranks. A rank is lost if for `timeout` seconds

- it published nothing: its process is suspended, or its machine is gone; or
- it didn't begin a micro-batch that a different rank has begun: its main thread hangs.

Long work doesn't count as lost: while one rank prepares data, loads, evaluates or saves a checkpoint, no rank begins
a micro-batch.
"""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from torch.distributed import distributed_c10d

from t5tune.distributed.collectives import describe_silence
from t5tune.distributed.launcher import write_error
from t5tune.distributed.signals import write_stderr
from t5tune.distributed.world import RERUN_HINT, World
from t5tune.errors import RankLost

MAX_INTERVAL = 10.0  # seconds between two polls of the store
POLLS = 10  # at least this many polls per timeout


class RankWatch:
    """Watches the other ranks, if there are any.

    It counts its polls instead of seconds: if all ranks were suspended together, all continue together.
    """

    def __init__(self, world: World, timeout: float, hint: str = RERUN_HINT) -> None:
        self.interval = min(MAX_INTERVAL, timeout / POLLS)
        self.num_batches = 0
        self._world, self._hint = world, hint
        self._limit = math.ceil(timeout / self.interval)
        self._answered = threading.Event()
        self._counters = [(0, 0)] * world.size
        self._polls_without_sign = [0] * world.size
        self._polls_behind = [0] * world.size

    def count_batch(self) -> None:
        """Count a micro-batch that the main thread begins."""
        self.num_batches += 1

    def compare(self, counters: Sequence[tuple[int, int]]) -> str | None:
        """Compare the counters of all ranks (polls, micro-batches) with the previous poll's, and name lost ranks."""
        most = max(batches for _, batches in counters)
        for rank, (before, now) in enumerate(zip(self._counters, counters, strict=True)):
            is_behind = now[1] < most and now[1] == before[1]
            self._polls_without_sign[rank] = self._polls_without_sign[rank] + 1 if now[0] == before[0] else 0
            self._polls_behind[rank] = self._polls_behind[rank] + 1 if is_behind else 0
        self._counters = list(counters)
        if silent := self._list_over_limit(self._polls_without_sign):
            return describe_silence(silent)
        if not (behind := self._list_over_limit(self._polls_behind)):
            return None
        if self._polls_without_sign[behind[0]] > self._limit / 2:  # it was late when its machine was lost
            return describe_silence(behind[:1])
        return f"rank {behind[0]} hangs: the other ranks wait for it in a batch that it hasn't begun"

    def _list_over_limit(self, polls: list[int]) -> list[int]:
        return [rank for rank, count in enumerate(polls) if count >= self._limit and rank != self._world.rank]

    def poll(self, store: Any, stopped: threading.Event) -> None:
        """Exchange counters with all ranks at each interval, until `stopped` is set."""
        published = 0
        while not stopped.wait(self.interval):
            try:
                store.add(f"polls/{self._world.rank}", 1)
                batches = self.num_batches
                store.add(f"batches/{self._world.rank}", batches - published)
                published = batches
                # adding 0 reads a counter, and doesn't wait for one that doesn't exist yet
                counters = [
                    (store.add(f"polls/{rank}", 0), store.add(f"batches/{rank}", 0)) for rank in range(self._world.size)
                ]
            except Exception:  # the store raises several types; `wait_for_store` counts its missing answers
                continue
            self._answered.set()
            if (problem := self.compare(counters)) is not None and not stopped.is_set():
                self._exit(problem)

    def wait_for_store(self, stopped: threading.Event) -> None:
        """Watch the store itself: if its process, rank 0, is suspended, a call to the store never returns."""
        polls = 0
        while not stopped.wait(self.interval):
            polls = 0 if self._answered.is_set() else polls + 1
            self._answered.clear()
            if polls > self._limit and self._world.rank != 0:
                self._exit(describe_silence([0]))

    def _exit(self, problem: str) -> NoReturn:
        # the main thread waits for the GPU or a rank, outside of Python, so no exception would reach it
        error = RankLost(f"rank {self._world.rank}: {problem}", hint=self._hint)
        if self._world.is_run_set_up:
            write_error(error)
        else:
            write_stderr(f"error: {error}")
        os._exit(error.exit_code)


@contextmanager
def watch_ranks(world: World, timeout: float, hint: str = RERUN_HINT) -> Iterator[RankWatch]:
    """Watch the ranks of the process group in this block; see `RankWatch`."""
    watch = RankWatch(world, timeout, hint)
    if world.size == 1:
        yield watch
        return
    stopped = threading.Event()
    # a separate connection, since the calls of a connection wait for each other, and separate counters, since a later
    # run of the same processes may get the same store
    store: Any = distributed_c10d._get_default_store()
    store = store.clone()
    store = distributed_c10d.PrefixStore(f"t5tune/watch/{store.add(f't5tune/watches/{world.rank}', 1)}", store)
    threads = [
        threading.Thread(target=watch.poll, args=(store, stopped), daemon=True),
        threading.Thread(target=watch.wait_for_store, args=(stopped,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield watch
    finally:
        stopped.set()
