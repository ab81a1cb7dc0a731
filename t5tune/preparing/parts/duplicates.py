"""Find conversations with the same texts as an earlier one, among more keys than fit in memory.

    with DuplicateFinder(folder, num_records) as finder:
        finder.add(keys, positions)    # of 16 bytes each, in the order of the records
        finder.search()
        finder.find_firsts(0, 1000)    # for each of these records the position of the first one, or -1

The keys are divided into buckets, each of which is sorted in memory.
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

BUCKET_RECORDS = 1 << 20  # about this many are sorted at once, which takes 60 MB
MAX_BUCKETS = 256  # each is an open file
_ENTRY_DTYPE = np.dtype([("key", "<u8", (2,)), ("position", "<u8")])


class DuplicateFinder:
    """Finds the first record of each key, in files that it deletes.

    Args:
        folder: where it may write, 32 bytes per record.
    """

    def __init__(self, folder: Path, num_records: int) -> None:
        num_buckets = min(MAX_BUCKETS, 1 + num_records // BUCKET_RECORDS)
        self._buckets: list[BinaryIO] = [open(folder / f".keys-{i}", "w+b") for i in range(num_buckets)]  # noqa: SIM115
        # the position of the first record with the same key, plus 1, for each later one; the file is sparse
        self._firsts: BinaryIO = open(folder / ".firsts", "w+b")  # noqa: SIM115
        self._firsts.truncate(8 * num_records)
        for file in (*self._buckets, self._firsts):
            Path(file.name).unlink()  # it exists until it is closed

    def __enter__(self) -> "DuplicateFinder":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (*self._buckets, self._firsts):
            file.close()

    def add(self, keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> None:
        """Add the keys of some records, which come after those that were added before."""
        entries = np.empty(len(keys), _ENTRY_DTYPE)
        entries["key"], entries["position"] = keys, positions
        numbers = keys[:, 0] % np.uint64(len(self._buckets))
        order = np.argsort(numbers, kind="stable")
        entries, bounds = entries[order], np.searchsorted(numbers[order], np.arange(len(self._buckets) + 1))
        for number, file in enumerate(self._buckets):
            file.write(entries[bounds[number] : bounds[number + 1]].tobytes())

    def search(self) -> None:
        """Find the duplicates among all records that were added."""
        for file in self._buckets:
            file.seek(0)
            entries = np.fromfile(file, _ENTRY_DTYPE)
            file.truncate(0)
            if len(entries):
                self._search_bucket(entries)

    def _search_bucket(self, entries: npt.NDArray[Any]) -> None:
        high, low = entries["key"].T
        order = np.lexsort((low, high))  # stable, so that the first of each key is its earliest
        high, low, positions = high[order], low[order], entries["position"][order].astype(np.int64)
        is_first = np.ones(len(entries), bool)
        is_first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        firsts = positions[np.flatnonzero(is_first)][np.cumsum(is_first) - 1]
        if not is_first.all():
            table = np.memmap(self._firsts, np.int64, "r+")
            table[positions[~is_first]] = firsts[~is_first] + 1
            table.flush()

    def find_firsts(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return for `count` records from `start` the position of the first one with the same key; -1 if it is that."""
        self._firsts.seek(8 * start)
        return np.fromfile(self._firsts, np.int64, count) - 1
