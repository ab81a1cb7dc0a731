"""Work that the ranks divide among themselves: each takes the next piece when it is done with one.

    queue = WorkQueue(len(batches))
    while (number := queue.take()) is not None:
        work_on(batches[number])
        queue.count_done(1)
    queue.wait_for_all_ranks(look)

No rank waits for a slower one, except at the end. The queue is a counter in the rendezvous store.

A rank that hangs in a piece, or is killed there, is in no collective that would fail for the others. They notice that
nothing has been taken or done for as long as a collective may wait, although that rank hasn't come to the end.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from t5tune.distributed.collectives import MAX_PAUSE, get_rank_and_size, is_distributed, wait_until
from t5tune.distributed.world import RERUN_HINT
from t5tune.errors import RankLost


class WorkQueue:
    """The numbers from 0 to `size` - 1, each of which is taken once, in order. Every rank makes one.

    Args:
        size: the same on every rank.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._rank, self._num_ranks = get_rank_and_size()
        self._store: Any = dist.HashStore()  # type: ignore[attr-defined]
        if is_distributed():
            store = distributed_c10d._get_default_store()
            # queues are counted in the store, because a later run of the same processes may get the same store
            number = store.add(f"t5tune/queues/{self._rank}", 1)
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

        Raises:
            RankLost: for as long as a collective may wait, the ranks that aren't here have taken and done nothing.
        """
        self._store.set(f"arrived/{self._rank}", "yes")
        # counted in looks, not in seconds: if all ranks were suspended together, all continue together
        limit = math.ceil(self._store.timeout.total_seconds() / MAX_PAUSE)
        progress, looks = (0, 0), 0

        def have_all_arrived() -> bool:
            nonlocal progress, looks
            look()
            if not (late := self._find_late_ranks()):
                return True
            before, progress = progress, (self._store.add("taken", 0), self._store.add("done", 0))
            looks = looks + 1 if progress == before else 0
            if looks >= limit:
                raise self._make_error(late)
            return False

        wait_until(have_all_arrived)

    def _find_late_ranks(self) -> list[int]:
        """Find the ranks that have taken a piece and not come to the end yet."""
        return [rank for rank in range(self._num_ranks) if not self._store.check([f"arrived/{rank}"])]

    def _make_error(self, late: list[int]) -> RankLost:
        if self._rank == 0:
            time.sleep(4 * MAX_PAUSE)  # the store ends with rank 0, and the other ranks find the same there
        names = f"rank {late[0]} hangs or is" if len(late) == 1 else f"ranks {', '.join(map(str, late))} hang or are"
        seconds = round(self._store.timeout.total_seconds())
        return RankLost(
            f"rank {self._rank}: {names} gone: the others wait, and no batch was finished for {seconds} seconds",
            hint=f"{RERUN_HINT}; if a batch takes longer than that, set a larger process_group_timeout",
        )
