"""The tables of a token cache: their rows, and whether they fit together.

A file's hash shows that it is undamaged, but not that its author meant well: a row may point beyond the ids, and an id
may have no row in the model's embedding.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from t5tune.data.caches.manifest import PREPARE_AGAIN, TABLES
from t5tune.data.labels import IDS_PER_VALUE, LabelTask, Values, read_values
from t5tune.data.tokens.tokenizer import SpecialIds
from t5tune.errors import DataError
from t5tune.file_names import CONVERSATIONS_FILE, EXAMPLES_FILE, TOKENS_FILE
from t5tune.settings.groups.record_format import ObjectiveKind

# the index of the first id in tokens.bin, and a hash that conversations with the same texts share
CONVERSATION_DTYPE = np.dtype([("start", "<u8"), ("key", "<u8")])
# the number of the conversation, and a Span, whose positions count tokens from the start of that conversation
EXAMPLE_DTYPE = np.dtype([
    ("conversation", "<u4"), ("turn", "<u4"), ("system_end", "<u4"), ("source_start", "<u4"), ("source_end", "<u4"),
    ("target_start", "<u4"), ("target_end", "<u4"), ("answer_end", "<u4"), ("source_is_whole", "?"),
    ("target_is_whole", "?"), ("rejected_start", "<u4"), ("rejected_end", "<u4"), ("rejected_answer_end", "<u4"),
    ("rejected_is_whole", "?"),
])  # fmt: skip
# positions that follow each other in the ids of a conversation
ORDERS = (
    ("system_end", "source_start", "source_end"),
    ("target_start", "target_end", "answer_end"),
    ("rejected_start", "rejected_end", "rejected_answer_end"),
)
ROWS_PER_CHUNK = 1 << 15  # a cache may be larger than the memory


class Tables(NamedTuple):
    """The files of a cache as arrays: the ids, and rows of CONVERSATION_DTYPE and of EXAMPLE_DTYPE."""

    tokens: npt.NDArray[Any]
    conversations: npt.NDArray[Any]
    examples: npt.NDArray[Any]


def map_tables(folder: Path, ids_dtype: str) -> Tables:
    """Memory-map the tables of a cache; DataError: a size isn't a whole number of rows."""
    dtypes = (np.dtype(ids_dtype), CONVERSATION_DTYPE, EXAMPLE_DTYPE)
    return Tables(*(_map_file(folder / name, dtype) for name, dtype in zip(TABLES, dtypes, strict=True)))


def _map_file(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    size = path.stat().st_size
    if size == 0:
        return np.zeros(0, dtype)
    if size % dtype.itemsize:
        raise DataError(f"{path}: {size:,} bytes aren't rows of {dtype.itemsize} bytes", hint=PREPARE_AGAIN)
    # slicing np.memmap is several times slower than slicing a plain array over the same pages
    return np.memmap(path, dtype, "r").view(np.ndarray)


def check_tables(
    folder: Path, tables: Tables, special: SpecialIds, num_ids: int, kind: ObjectiveKind, task: LabelTask | None
) -> None:
    """Check that rows point into the ids of their conversation, and that ids are in the tokenizer.

    Args:
        num_ids: size of the tokenizer's vocabulary.
        kind: of the examples.
        task: the labels of the examples, if they have labels.

    Raises:
        DataError: a table is wrong.
    """
    tokens, conversations, examples = tables
    starts = conversations["start"]
    for start, end in _divide(len(starts)):
        values = starts[start : end + 1]
        if values.max() > len(tokens) or (values[1:] < values[:-1]).any():
            problem = f"{folder / CONVERSATIONS_FILE}: a start isn't in {TOKENS_FILE}, or before an earlier one"
            raise DataError(problem, hint=PREPARE_AGAIN)
    for start, end in _divide(len(examples)):
        rows = examples[start:end]
        if rows["conversation"].max() >= len(starts):
            problem = f"{folder / EXAMPLES_FILE}: a row's conversation isn't in {CONVERSATIONS_FILE}"
            raise DataError(problem, hint=PREPARE_AGAIN)
        if not _have_valid_spans(rows, _measure_conversations(rows, starts, len(tokens)), special, kind, task):
            problem = f"{folder / EXAMPLES_FILE}: a row's span doesn't fit its conversation or the objective"
            raise DataError(problem, hint=PREPARE_AGAIN)
    # values follow the ids of a text with labels
    chunks = (tokens[start:end] for start, end in _divide(len(tokens))) if task is None else _iterate_ids(tables)
    if any(len(ids) and (ids.max() >= num_ids or ids.min() < 0) for ids in chunks):
        raise DataError(f"{folder / TOKENS_FILE}: an id isn't in the tokenizer", hint=PREPARE_AGAIN)
    if task is not None and not all(_are_labels(values, len(task.names)) for values in _iterate_values(tables)):
        raise DataError(f"{folder / TOKENS_FILE}: a label isn't among the labels of the cache", hint=PREPARE_AGAIN)


def _divide(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, ROWS_PER_CHUNK):
        yield start, min(start + ROWS_PER_CHUNK, count)


def _measure_conversations(rows: Any, starts: Any, num_tokens: int) -> npt.NDArray[np.int64]:
    """Return the number of ids in the conversation of each row."""
    numbers = rows["conversation"].astype(np.int64)
    is_last = numbers == len(starts) - 1
    ends = np.where(is_last, num_tokens, starts[np.where(is_last, numbers, numbers + 1)])
    lengths: npt.NDArray[np.int64] = (ends - starts[numbers]).astype(np.int64)
    return lengths


def _have_valid_spans(
    rows: Any, room: npt.NDArray[np.int64], special: SpecialIds, kind: ObjectiveKind, task: LabelTask | None
) -> bool:
    columns = {name: rows[name].astype(np.int64) for order in ORDERS for name in order}
    for order in ORDERS:
        places = [*(columns[name] for name in order), room]
        if any((place > after).any() for place, after in zip(places, places[1:], strict=False)):
            return False
    flags = [rows[name].view(np.uint8) for name in EXAMPLE_DTYPE.names or () if name.endswith("_is_whole")]
    if any((flag > 1).any() for flag in flags):
        return False
    if ((columns["rejected_start"] > 0) != (kind == "pairs")).any():
        return False
    window = columns["source_end"] - columns["source_start"]
    source = columns["system_end"] + window
    target = columns["target_end"] - columns["target_start"]
    if kind == "raw text":
        return bool((window >= 2).all())  # one token to mask, and one to keep
    if (source + special.source_size < 1).any():
        return False
    if task is None:
        return bool((target + flags[1] >= 1).all())
    if task.several:
        return bool((target % IDS_PER_VALUE == 0).all())
    return bool((target == IDS_PER_VALUE * (source if task.per_token else 1)).all())


def _iterate_ids(tables: Tables) -> Iterator[npt.NDArray[Any]]:
    """Yield the ids of each text that has labels, which follow them."""
    starts = tables.conversations["start"]
    for row in tables.examples:
        start = int(starts[row["conversation"]])
        yield tables.tokens[start : start + int(row["target_start"])]


def _iterate_values(tables: Tables) -> Iterator[Values]:
    starts = tables.conversations["start"]
    for row in tables.examples:
        start = int(starts[row["conversation"]])
        yield read_values(tables.tokens[start + int(row["target_start"]) : start + int(row["target_end"])])


def _are_labels(values: Values, num_classes: int) -> bool:
    """Whether values are class numbers, or finite numbers if there are no classes; NaN: not learned."""
    known = values[~np.isnan(values)]
    if not num_classes:
        return bool(np.isfinite(known).all())
    return bool(((known >= 0) & (known < num_classes) & (known == np.floor(known))).all())
