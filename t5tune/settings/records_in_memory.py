"""Records that are given in Python instead of as a file: a list of dicts, a DataFrame, an Arrow table, a Dataset.

    store_records([{"source": "2 + 2", "target": "4"}])   # Path("/tmp/t5tune-records-…/records-8a2c51b0d3f4.jsonl")

All code reads data from files, so that messages can name a line. The file's name has the hash of its content: the same
records give the same file, so a resumed run recognizes its data.

An Arrow table gives all objects the same keys, with null for missing values. If it has arguments of tool calls, its
file is called records-….table.jsonl, so that its reader can leave these nulls out and count them.
"""

import atexit
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from t5tune.io.atomic import explain_write_errors, lock_folder

FOLDER_PREFIX = "t5tune-records-"
HASH_CHARACTERS = 12
ROWS_AT_ONCE = 1000
EXPECTED = "expected a path, or records: a list of dicts, a DataFrame or a datasets.Dataset"
TABLE_MARK = ".table"
_NAME = rf"records-[0-9a-f]{{{HASH_CHARACTERS}}}(?:\{TABLE_MARK})?\.jsonl"
_STORED = re.compile(rf"{FOLDER_PREFIX}\w+/{_NAME}")
_RECORDS = re.compile(_NAME)
_STORED_TABLE = re.compile(rf"records-[0-9a-f]{{{HASH_CHARACTERS}}}\{TABLE_MARK}\.jsonl")


class CallerError(Exception):
    """The caller's generator raised an error, the cause. pydantic would blame the setting for its ValueError."""


def is_in_memory(data: object) -> bool:
    """Whether the data isn't a path, a list of paths or None. (An empty list is a list of paths.)"""
    if data is None or isinstance(data, str | os.PathLike):
        return False
    return not (isinstance(data, list | tuple) and all(isinstance(item, str | os.PathLike) for item in data))


def store_records(data: Any) -> Path:
    """Write the records to a JSON Lines file that lasts as long as this process.

    Raises:
        ValueError: the data is something else.
        CallerError: the iterator that yields the records failed.
        WriteError: the file can't be written.
    """
    rows, has_filled_keys = _open_rows(data)
    folder = _find_folder()
    written = folder / f"{uuid.uuid4().hex}.jsonl"
    digest = hashlib.sha256()
    try:
        with explain_write_errors(written), open(written, "wb") as file:
            for number, record in enumerate(_iterate_records(data, rows)):
                line = _write_line(record, number)
                digest.update(line)
                file.write(line)
        mark = TABLE_MARK if has_filled_keys else ""
        return written.replace(folder / f"records-{digest.hexdigest()[:HASH_CHARACTERS]}{mark}.jsonl")
    finally:
        written.unlink(missing_ok=True)


def is_stored(path: Path) -> bool:
    """Whether `store_records` wrote this file, in any process; it may no longer exist."""
    return _STORED.fullmatch("/".join(path.parts[-2:])) is not None


def is_stored_table(path: Path) -> bool:
    """Whether `store_records` wrote this file, or its copy in a run, with filled-in nulls in tool calls."""
    return _STORED_TABLE.fullmatch(path.name) is not None


def find_kept_path(path: str, folder: Path) -> Path | None:
    """Return the path in `folder` of the records that `store_records` wrote to `path`; None for other files.

    If the run was moved, `path` may also be their old path in it.
    """
    given = Path(path)
    kept = folder / given.name
    if kept.is_file() and not given.is_file() and is_records_name(given.name):
        return kept
    return kept if is_stored(given) and given.is_file() else None


def is_records_name(file: str) -> bool:
    """Whether `store_records` gave a file its name, which has a hash of the content."""
    return _RECORDS.fullmatch(file) is not None


def _find_folder() -> Path:
    while not (folder := _make_folder()).is_dir():  # a cleaner of temporary files has removed it
        _make_folder.cache_clear()
    return folder


@cache
def _make_folder() -> Path:
    """Make a temporary folder for this process, and remove the folders of killed processes."""
    for old in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with lock_folder(old) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(old, ignore_errors=True)
    folder, process = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX)), os.getpid()
    with suppress(OSError):  # another process is removing it as abandoned, or the file system has no locks
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)  # until this process and its forks have ended

    def remove() -> None:
        if os.getpid() == process:  # not in a fork that ends earlier
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def _iterate_records(data: Any, rows: Iterator[Any]) -> Iterator[Mapping[str, Any]]:
    number = -1
    for number, item in enumerate(_pass_errors(rows)):
        record = dataclasses.asdict(item) if dataclasses.is_dataclass(item) and not isinstance(item, type) else item
        record = record.model_dump() if hasattr(record, "model_dump") else record  # pydantic
        if not isinstance(record, Mapping):
            paths = "; put paths into a list, such as list(…)" if isinstance(item, str | os.PathLike) else ""
            raise ValueError(f"item {number} is of type {type(item).__name__}; {EXPECTED}{paths}")
        yield record
    if number < 0:
        advice = "; it yields records only once, and paths must be a list" if isinstance(data, Iterator) else ""
        raise ValueError(f"there are no records in it{advice}")


def _suggest_records(data: Mapping[Any, Any]) -> str:
    if hasattr(next(iter(data.values()), None), "column_names"):
        return f"choose one of its splits, such as data[{next(iter(data))!r}]"
    return "if it has columns, pass pandas.DataFrame(data); if it is a record, [data]"


def _pass_errors(rows: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from rows
    except (ValueError, AssertionError) as error:  # pydantic would catch these
        raise CallerError from error


def _open_rows(data: Any) -> tuple[Iterator[Any], bool]:
    """Return the rows, and whether an Arrow table filled in arguments of tool calls with nulls."""
    if isinstance(data, Mapping):
        raise ValueError(f"a {type(data).__name__}; {EXPECTED}; {_suggest_records(data)}")
    if not isinstance(data, Iterable) and not hasattr(data, "__arrow_c_stream__"):
        collect = "; call its collect() first" if hasattr(data, "collect") else ""
        raise ValueError(f"of type {type(data).__name__}; {EXPECTED}{collect}")
    is_pandas = type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "columns")
    if not is_pandas and not hasattr(data, "__arrow_c_stream__"):
        features = getattr(data, "features", None)  # of a datasets.Dataset
        schema = getattr(features, "arrow_schema", None)
        return (iter(data), False) if schema is None else (_name_classes(data, features), _has_call_arguments(schema))
    if is_pandas:
        _check_column_names([*data.columns])
        parts = (data.iloc[start : start + ROWS_AT_ONCE] for start in range(0, len(data), ROWS_AT_ONCE))
        # a missing value is NaN, NaT or NA, which only columns of objects can replace
        tables = (part.astype(object).where(part.notna(), None).to_dict("records") for part in parts)
        return (row for table in tables for row in table), False
    import pyarrow  # which takes time to import

    try:
        batches = pyarrow.RecordBatchReader.from_stream(data)  # pyarrow, polars, DuckDB, …
    except pyarrow.ArrowException:  # a column without a name, such as a Series
        raise ValueError(f"of type {type(data).__name__}; {EXPECTED}") from None
    _check_column_names(batches.schema.names)
    slices = (batch.slice(start, ROWS_AT_ONCE) for batch in batches for start in range(0, len(batch), ROWS_AT_ONCE))
    return (row for part in slices for row in part.to_pylist()), _has_call_arguments(batches.schema)


def _name_classes(rows: Iterable[Any], features: Any) -> Iterator[Any]:
    """Replace the numbers of a ClassLabel, or of a list of them, by their names; negative numbers mean no label."""
    found = {key: getattr(feature, "feature", feature) for key, feature in features.items()}
    names = {key: feature.names for key, feature in found.items() if hasattr(feature, "int2str")}

    def name(number: Any, of_column: list[str]) -> Any:
        number = number.tolist() if hasattr(number, "tolist") else number
        if isinstance(number, list):
            return [name(item, of_column) for item in number]
        return None if number is None or number < 0 else of_column[number]

    for row in rows:
        yield row | {key: name(row[key], of_column) for key, of_column in names.items()} if names else row


def _has_call_arguments(schema: Any) -> bool:
    return any("arguments: struct<" in str(kind) for kind in schema.types)


def _check_column_names(names: list[Any]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"duplicate column name: {', '.join(map(str, names))}")


def _write_line(record: Mapping[str, Any], number: int) -> bytes:
    try:
        text = json.dumps(_replace_nan(record), ensure_ascii=False, allow_nan=False, default=_convert)
    except TypeError as error:  # a key that isn't text
        raise ValueError(f"{error}; {EXPECTED}") from None
    except RecursionError:
        raise ValueError(f"item {number} contains itself, or is nested too deeply") from None
    return text.encode(errors="surrogatepass") + b"\n"


def _convert(value: Any) -> Any:
    """Convert NumPy's numbers and arrays. Any other value becomes an object, which isn't accepted as text."""
    return _replace_nan(value.tolist()) if hasattr(value, "tolist") else {type(value).__name__: str(value)}


def _replace_nan(value: Any) -> Any:
    """Replace NaN, which libraries use for a missing value and JSON doesn't have, with None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _replace_nan(item) for key, item in value.items()}
    return [_replace_nan(item) for item in value] if isinstance(value, list | tuple) else value
