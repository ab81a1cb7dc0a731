"""Suggest `t5tune trim` for a base whose unused embedding rows take more than half of the memory."""

from collections.abc import Sequence

from t5tune.data.caches.cache import Cache
from t5tune.formatting import format_size
from t5tune.progress import Note, Report


def suggest_trimming(caches: Sequence[Cache], num_rows: int, row_bytes: int, total: int, report: Report) -> None:
    """Report the memory of the rows that the data doesn't use, if it is more than half of `total`, in bytes.

    Args:
        row_bytes: memory of all rows of embeddings and head.
    """
    if 2 * row_bytes <= total:
        return
    used = len({id for cache in caches for ids in cache.iterate_ids() for id in ids.tolist()})
    if 2 * (unused := row_bytes - row_bytes * used // num_rows) > total:
        rest = f"the rest take {format_size(unused)} of {format_size(total)}"
        report(Note(f"the data uses {used:,} of {num_rows:,} embedding rows, and {rest}; t5tune trim removes them"))
