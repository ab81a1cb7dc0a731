"""Work that the ranks divide among themselves: each takes the next piece when it is done with one.

    queue = WorkQueue(len(batches))
    while (number := queue.take()) is not None:
        work_on(batches[number])
        queue.count_done(1)
    queue.wait_for_all_ranks()

No rank waits for a slower one, except at the end. The queue is a counter in the rendezvous store.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from t5tune.distributed.collectives import get_rank_and_size, is_distributed, wait_until


class WorkQueue:
    """The numbers from 0 to `size` - 1, each of which is taken once, in order. Every rank makes one.

    Args:
        size: the same on every rank.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        rank, self._num_ranks = get_rank_and_size()
        self._store: Any = dist.HashStore()  # type: ignore[attr-defined]
        if is_distributed():
            store = distributed_c10d._get_default_store()
            # queues are counted in the store, because a later run of the same processes may get the same store
            number = store.add(f"t5tune/queues/{rank}", 1)
            self._store = distributed_c10d.PrefixStore(f"t5tune/queue/{number}", store)

    def take(self) -> int | None:
        """Take the next number; None if there is none left."""
        number = int(self._store.add("taken", 1)) - 1
        return number if number < self.size else None

    def close(self) -> None:
        """Leave what isn't taken yet to no rank."""
        self._store.add("taken", self.size)

    def count_done(self, amount: int) -> None:
        """Add to what is done, in any unit."""
        self._store.add("done", amount)

    def sum_done(self) -> int:
        """Return what all ranks have done so far."""
        return int(self._store.add("done", 0))

    def wait_for_all_ranks(self, look: Callable[[], None]) -> None:
        """Wait until every rank has come here, which may take longer than a collective may wait.

        Args:
            look: called now and then while waiting.
        """
        self._store.add("arrived", 1)

        def have_all_arrived() -> bool:
            look()
            return int(self._store.add("arrived", 0)) >= self._num_ranks

        wait_until(have_all_arrived)
