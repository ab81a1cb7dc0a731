"""Notice ranks that hang, name them, and end this process.

    with watch_ranks(world, timeout=1800) as watch:
        watch.count_batch()     # before each micro-batch of training

If a rank is lost, gloo's collectives raise errors in the others. NCCL's don't: the main thread waits for its GPU until
NCCL's watchdog aborts the process, and then a rank that only waited looks like the one that failed. So a thread of each
rank publishes two counters in the rendezvous store, of its own looks into the store and of the micro-batches that the
main thread has begun, and reads those of the others. A rank is lost if for `timeout` seconds

- it has published nothing: its process is suspended, or its machine is gone; or
- it hasn't begun the micro-batch that another rank has begun: its main thread hangs.

Work that takes longer is neither of them. While one rank prepares data, loads, evaluates or saves a checkpoint, no
other rank begins another micro-batch.
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

MAX_INTERVAL = 10.0  # seconds between two looks into the store
LOOKS = 10  # at least so many of them in the timeout


class RankWatch:
    """Watches the other ranks. Without other ranks, it does nothing.

    It counts its own looks instead of seconds: if all ranks were suspended together, all continue together.

    Args:
        timeout: in seconds.
        hint: what to do when a rank is lost.
    """

    def __init__(self, world: World, timeout: float, hint: str = RERUN_HINT) -> None:
        self.interval = min(MAX_INTERVAL, timeout / LOOKS)
        self.num_batches = 0
        self._world, self._hint = world, hint
        self._limit = math.ceil(timeout / self.interval)
        self._answered = threading.Event()
        self._counters = [(0, 0)] * world.size
        self._looks_without_sign = [0] * world.size
        self._looks_behind = [0] * world.size

    def count_batch(self) -> None:
        """Count a micro-batch that the main thread begins."""
        self.num_batches += 1

    def compare(self, counters: Sequence[tuple[int, int]]) -> str | None:
        """Compare the counters of all ranks with those of the last look, and say which ranks are lost, if any are.

        Args:
            counters: for each rank, its looks and its micro-batches.
        """
        most = max(batches for _, batches in counters)
        for rank, (before, now) in enumerate(zip(self._counters, counters, strict=True)):
            is_behind = now[1] < most and now[1] == before[1]
            self._looks_without_sign[rank] = self._looks_without_sign[rank] + 1 if now[0] == before[0] else 0
            self._looks_behind[rank] = self._looks_behind[rank] + 1 if is_behind else 0
        self._counters = list(counters)
        if silent := self._list_over_limit(self._looks_without_sign):
            return describe_silence(silent)
        if not (behind := self._list_over_limit(self._looks_behind)):
            return None
        if self._looks_without_sign[behind[0]] > self._limit / 2:  # it was late when its machine got lost
            return describe_silence(behind[:1])
        return f"rank {behind[0]} hangs: the others wait for it in a batch that it hasn't begun"

    def _list_over_limit(self, looks: list[int]) -> list[int]:
        return [rank for rank, count in enumerate(looks) if count >= self._limit and rank != self._world.rank]

    def look(self, store: Any, stopped: threading.Event) -> None:
        """Exchange counters with the other ranks at each interval, until the watch is stopped."""
        published = 0
        while not stopped.wait(self.interval):
            try:
                store.add(f"looks/{self._world.rank}", 1)
                batches = self.num_batches
                store.add(f"batches/{self._world.rank}", batches - published)
                published = batches
                # adding 0 reads a counter, and doesn't wait for one that doesn't exist yet
                counters = [
                    (store.add(f"looks/{rank}", 0), store.add(f"batches/{rank}", 0)) for rank in range(self._world.size)
                ]
            except Exception:  # of several types; `wait_for_store` counts how often the store hasn't answered
                continue
            self._answered.set()
            if (problem := self.compare(counters)) is not None and not stopped.is_set():
                self._exit(problem)

    def wait_for_store(self, stopped: threading.Event) -> None:
        """Watch the store itself, which rank 0 has: if that process is suspended, a call of the store never returns."""
        looks = 0
        while not stopped.wait(self.interval):
            looks = 0 if self._answered.is_set() else looks + 1
            self._answered.clear()
            if looks > self._limit and self._world.rank != 0:
                self._exit(describe_silence([0]))

    def _exit(self, problem: str) -> NoReturn:
        # the main thread waits for the GPU or another rank, outside of Python, so no exception would reach it
        error = RankLost(f"rank {self._world.rank}: {problem}", hint=self._hint)
        if self._world.is_run_set_up:
            write_error(error)
        else:
            write_stderr(f"error: {error}")
        os._exit(error.exit_code)


@contextmanager
def watch_ranks(world: World, timeout: float, hint: str = RERUN_HINT) -> Iterator[RankWatch]:
    """Watch the other ranks of the process group in this block.

    Args:
        timeout: how many seconds a rank may be silent or late.
        hint: what to do when one is lost.
    """
    watch = RankWatch(world, timeout, hint)
    if world.size == 1:
        yield watch
        return
    stopped = threading.Event()
    # a connection of its own, since calls of one connection wait for each other; and counters of its own, since a later
    # run of the same processes may get the same store
    store: Any = distributed_c10d._get_default_store()
    store = store.clone()
    store = distributed_c10d.PrefixStore(f"t5tune/watch/{store.add(f't5tune/watches/{world.rank}', 1)}", store)
    threads = [
        threading.Thread(target=watch.look, args=(store, stopped), daemon=True),
        threading.Thread(target=watch.wait_for_store, args=(stopped,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield watch
    finally:
        stopped.set()
