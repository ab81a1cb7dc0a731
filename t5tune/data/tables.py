"""CSV, TSV and Parquet files -> raw records, a row each."""

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from t5tune.data.files import BOM, read_chunks
from t5tune.data.records import Place, Raw, Rejected
from t5tune.errors import DataError, DependencyError

ROWS = 128  # of a Parquet file at a time


def read_csv(path: Path, delimiter: str | None, max_bytes: int) -> Iterator[Raw | Rejected]:
    """CSV: a head of column names, then rows.

    Args:
        delimiter: None: the comma, semicolon or tab that the head holds most of.
        max_bytes: the longest cell, and the longest line.

    Raises:
        DataError: it is no CSV, or a cell or line is too long.
    """
    lines = _Lines(path, max_bytes)
    csv.field_size_limit(max_bytes)
    head_line = next(lines, None)
    if head_line is None:
        return
    delimiter = delimiter or max(",;\t", key=head_line.count)
    reader = csv.reader(chain([head_line], lines), delimiter=delimiter, strict=True)
    try:
        head = next(reader)
        if len(set(head)) < len(head):
            raise DataError(f"{path}:1: a column name twice: {', '.join(head)}")
        index = -1
        while True:
            place = Place(str(path), reader.line_num + 1, index + 1, lines.offset)
            cells = next(reader, None)
            if cells is None:
                return
            if not cells:
                continue
            index += 1
            if len(cells) != len(head):
                yield Rejected(place, "bad_row", f"{len(cells)} cells under {len(head)} columns", cells)
            elif any(_is_undecodable(cell) for cell in cells):
                yield Rejected(place, "invalid_utf8", "a cell with bytes that are no UTF-8", cells)
            else:
                yield Raw(place, dict(zip(head, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def read_parquet(path: Path) -> Iterator[Raw]:
    """The rows of a Parquet file.

    Raises:
        DataError: it is broken.
        DependencyError: pyarrow can't be imported.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DependencyError(f"{path}: Parquet can't be read here: {error}", hint="pip install pyarrow") from error
    index = 0
    try:
        with parquet.ParquetFile(path, memory_map=True, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    yield Raw(Place(str(path), index + 1, index, 0), row)
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: row {index}: broken Parquet: {reason}", hint="get the file again") from error


class _Lines:
    """A file's lines as text, their ends kept; bytes that are no UTF-8 become lone surrogates."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.offset = 0
        self._path = path
        self._max_bytes = max_bytes
        self._chunks = read_chunks(path)
        self._lines: Iterator[bytes] = iter(())
        self._rest = b""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        while (line := next(self._lines, None)) is None:
            chunk = next(self._chunks, b"")
            if not chunk:
                line, self._rest = self._rest, b""
                break
            if len(self._rest) > self._max_bytes:
                raise DataError(f"{self._path}: byte {self.offset}: a line longer than {self._max_bytes} bytes")
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            self._lines = iter([part + b"\n" for part in whole])
        if not line:
            raise StopIteration
        if self.offset == 0:
            self.offset = len(line)
            return line.removeprefix(BOM).decode(errors="surrogateescape")
        self.offset += len(line)
        return line.decode(errors="surrogateescape")


def _is_undecodable(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)
