"""CSV, TSV and Parquet files -> raw records, a row each."""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from t5tune.data.files import BOM, read_chunks
from t5tune.data.records import Place, Raw, Rejected
from t5tune.errors import DataError, DependencyError
from t5tune.io.atomic import CHUNK

CELL_BYTES = 128  # that a cell takes beside its text
CSV_REASONS = {  # by what the csv module says
    "unexpected end of data": "the file ends within quotes",
    "expected after": "there is text after a closing quote",
    "field larger than field limit": "a cell is longer than max_record_bytes",
    "new-line character": "a carriage return within a cell that has no quotes",
}
ROWS = 16  # of a Parquet file at a time, and
ROWS_BYTES = 1 << 21  # about as many bytes of them
_ORDINARY = re.compile(rb'[^",;\t\r\n]+')


def read_csv(path: Path, delimiter: str | None, max_bytes: int, spool: Path | None) -> Iterator[Raw | Rejected]:
    """CSV: a head of column names, then rows.

    Args:
        delimiter: None: the comma, semicolon or tab that the head holds most of.
        max_bytes: longer rows are Rejected, and put into a file beside `spool`.

    Raises:
        DataError: it is no CSV, or its head is too long.
    """
    lines = _Lines(path, max_bytes, spool)
    csv.field_size_limit(max_bytes)
    head_line = next((line for line in lines if line.strip()), None)
    if head_line is None:
        return
    delimiter = delimiter or max(",;\t", key=head_line.count)
    reader = csv.reader(chain([head_line], lines), delimiter=delimiter, strict=True)
    try:
        head = next(reader)
        if lines.size > max_bytes:
            raise DataError(f"{path}:{lines.number}: a head longer than max_record_bytes {max_bytes}")
        if len(set(head)) < len(head):
            raise DataError(f"{path}:{lines.number}: a column name twice: {', '.join(head)}")
        index = 0
        while True:
            place = Place(str(path), lines.number + 1, index, lines.offset)
            lines.begin_row(index)
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            index += 1
            size = lines.size + CELL_BYTES * len(cells)
            if lines.is_long:
                yield Rejected(place, "too_long", f"longer than max_record_bytes {max_bytes}", lines.row_file)
            elif len(cells) != len(head):
                yield Rejected(place, "bad_row", f"{len(cells)} cells under {len(head)} columns", cells, size)
            else:
                yield Raw(place, dict(zip(head, cells, strict=True)), size)
    except csv.Error as error:
        reason = next((words for begin, words in CSV_REASONS.items() if begin in str(error)), str(error))
        raise DataError(f"{path}:{lines.number}: not valid CSV: {reason}") from error


def read_parquet(path: Path, max_bytes: int, spool: Path | None) -> Iterator[Raw | Rejected]:
    """The rows of a Parquet file.

    Args:
        max_bytes: longer rows are Rejected, and put into a file beside `spool` as JSON.

    Raises:
        DataError: it is broken.
        DependencyError: pyarrow can't be imported.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DependencyError(f"{path}: Parquet can't be read here: {error}", hint="pip install pyarrow") from error
    index = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: a column name twice: {', '.join(names)}")
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                # a text that many rows share stands in the file once, so the first row is looked at too
                batches = partial(file.iter_batches, row_groups=[group], use_threads=False)
                most = max(facts.total_byte_size // max(1, facts.num_rows), _first_bytes(batches(batch_size=1)))
                for batch in batches(batch_size=max(1, min(ROWS, ROWS_BYTES // max(1, most)))):
                    for row in _rows_of(batch, max_bytes):
                        place = Place(str(path), index + 1, index, 0)
                        index += 1
                        if isinstance(row, dict):
                            yield Raw(place, row, _size(row))
                            continue
                        long = spool.with_name(f"{spool.name}-{place.index}.long") if spool is not None else None
                        if long is not None:
                            _spill(row, long)
                        yield Rejected(place, "too_long", f"longer than max_record_bytes {max_bytes}", long)
    except DataError:
        raise
    except Exception as error:  # pyarrow raises its own exceptions, and Python's plain ones
        raise DataError(
            f"{path}: row {index}: broken Parquet: {_first_line(error)}", hint="get the file again"
        ) from error


def _first_line(error: Exception) -> str:
    """Pyarrow's reason without the lines that say where in its own code it arose."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _first_bytes(batches: Iterator[Any]) -> int:
    """What the first batch takes; it is held no longer."""
    return next((int(batch.nbytes) for batch in batches), 0)


def _rows_of(batch: Any, max_bytes: int) -> Iterator[Any]:
    """Each row as its values; what is longer than `max_bytes` as a batch of its own."""
    # one text that stands once in the file may fill many rows
    is_whole = batch.nbytes <= min(ROWS_BYTES, max_bytes)
    counts_itself = "dictionary<" not in str(batch.schema)  # else each row's bytes are those of all
    for part in [batch] if is_whole else (batch.slice(number, 1) for number in range(len(batch))):
        for number, row in enumerate([None] if counts_itself and part.nbytes > max_bytes else _plain_rows(part)):
            yield row if row is not None and _size(row) <= max_bytes else part.slice(number, 1)


def _spill(row: Any, path: Path) -> None:
    """Write a batch of one row as JSON, its texts piece by piece."""
    with open(path, "w", encoding="utf-8") as file:
        for number, name in enumerate(row.schema.names):
            file.write(f"{', ' if number else '{'}{json.dumps(name)}: ")
            cell = row[number][0]
            if not (cell.is_valid and str(cell.type) in {"string", "large_string"}):
                file.write(json.dumps(_cell(cell), default=str))
                continue
            decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
            data = memoryview(cell.as_buffer())
            file.write('"')
            for start in range(0, len(data), CHUNK):
                file.write(json.dumps(decoder.decode(data[start : start + CHUNK]))[1:-1])
            file.write('"')
        file.write("}")


def _plain_rows(batch: Any) -> list[dict[str, Any]]:
    try:
        return list(batch.to_pylist())
    except Exception:  # a time that Python can't hold, a struct with a name twice, …
        columns = {name: [_cell(scalar) for scalar in batch[name]] for name in batch.schema.names}
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _cell(scalar: Any) -> Any:
    """The scalar as a Python value, bytes that are no UTF-8 as lone surrogates; an object where there is none."""
    try:
        return scalar.as_py()
    except Exception:
        kind = str(scalar.type)
    if kind in {"string", "large_string"}:
        return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape")
    if kind.startswith(("list<", "large_list<")):
        return [_cell(item) for item in scalar]
    names = [field.name for field in scalar.type] if kind.startswith("struct<") else []
    return {name: _cell(scalar[name]) for name in names} if len(set(names)) == len(names) > 0 else [kind]


def _size(value: Any) -> int:
    """How many bytes of text a cell holds, or a row; about 8 for anything else."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


class _Lines:
    """A file's lines as text, their ends kept; bytes that are no UTF-8 become lone surrogates.

    What a row has beyond `max_bytes` is handed out in a bare form, which is cut into cells alike: its texts are put
    into a file.
    """

    def __init__(self, path: Path, max_bytes: int, spool: Path | None) -> None:
        self.offset = 0  # of the next line in the file
        self.number = 0  # of lines that were handed out
        self.size = 0  # of the row so far
        self.row_file: Path | None = None
        self._max_bytes = max_bytes
        self._path = path
        self._spool = spool
        self._chunks = read_chunks(path)
        self._line_end: bytes | None = None
        self._lines: Iterator[bytes] = iter(())
        self._rest = b""
        self._bare = b""  # what stands before the rest in its line
        self._row: list[bytes] = []

    @property
    def is_long(self) -> bool:
        """Whether the row is too long."""
        return self.size > self._max_bytes

    def begin_row(self, index: int) -> None:
        """Forget the row before."""
        self.size = 0
        self._row.clear()
        self.row_file = self._spool.with_name(f"{self._spool.name}-{index}.long") if self._spool is not None else None

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        while (line := next(self._lines, None)) is None:
            chunk = next(self._chunks, b"")
            if not chunk:
                line, self._rest = self._rest, b""
                break
            if self._line_end is None:
                self.offset = len(BOM) if chunk.startswith(BOM) else 0
                chunk = chunk[self.offset :]
                self._line_end = b"\r" if b"\r" in chunk.rstrip() and b"\n" not in chunk else b"\n"
            if self.size + len(self._rest) > self._max_bytes:
                self._bare += self._spill(self._rest)
                self._rest = b""
            *whole, self._rest = (self._rest + chunk).split(self._line_end)
            self._lines = iter([part + self._line_end for part in whole])
        if not line and not self._bare:
            raise StopIteration
        if self.size + len(line) > self._max_bytes:
            line, self._bare = self._bare + self._spill(line), b""
        else:
            self._take(line)
        self.number += 1
        return line.decode(errors="surrogateescape")

    def _take(self, line: bytes) -> None:
        self._row.append(line)
        self.size += len(line)
        self.offset += len(line)

    def _spill(self, data: bytes) -> bytes:
        """Put the row so far and the data into the row's file; the data's bare form."""
        self._take(data)
        if self.row_file is not None:
            with open(self.row_file, "ab") as file:
                file.writelines(self._row)
        self._row.clear()
        if len(self._bare) > self._max_bytes:
            raise DataError(f"{self._path}:{self.number + 1}: a line of more than {self._max_bytes} separators")
        return _ORDINARY.sub(b"x", data)
