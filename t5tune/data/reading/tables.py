"""Read the rows of CSV, TSV and Parquet files, and of workbooks, as raw records."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any

from t5tune.data.reading.files import BOM, find_data_suffix, read_chunks
from t5tune.data.reading.formats import list_read_keys
from t5tune.data.reading.labeled_records import (
    find_columns,
    list_label_columns,
    name_classes,
    read_class_names,
)
from t5tune.data.reading.raw_records import MAX_KEPT_BYTES, RawRecord, make_too_long_record
from t5tune.data.reading.rejections import RecordLocation, Rejection, RejectionError
from t5tune.data.reading.text_encoding import decode_record
from t5tune.data.reading.workbooks import read_cells
from t5tune.errors import DataError, DependencyError
from t5tune.formatting import format_count, shorten
from t5tune.io.reasons import join_first
from t5tune.settings.groups.record_format import ReadingSettings

CELL_OVERHEAD_BYTES = 128  # memory of a cell in addition to its text
CSV_REASONS = {  # part of the csv module's message: our message
    "unexpected end of data": "the file ends inside quotes",
    "expected after": "there is text after a closing quote",
    "field larger than field limit": "a cell is longer than max_record_bytes",
    "new-line character": "a carriage return in an unquoted cell",
}
ROWS_PER_BATCH = 16  # maximum number of rows that are read from a Parquet file at once
BYTES_PER_BATCH = 1 << 21  # about the maximum size of a batch
TEXT_TYPES = {"string", "large_string"}  # of Arrow
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # their names in messages
DETECTED_DELIMITERS = ",;\t"  # without a line that names the delimiter
SAMPLE_LINES = 100  # maximum number of lines to detect the delimiter by
SAMPLE_BYTES = 1 << 20  # about the maximum size of these lines
MIN_WORDS = 3  # a header's cell with this many words may be data
_DELIMITER_LINE = re.compile(r'"?sep=([,;\t|])"?[\r\n]*', re.IGNORECASE)  # Excel's first line
_CELL_TEXT = re.compile(rb'[^",;\t|\r\n]+')
_Row = tuple[int, int, int, bytes, list[str]]  # its line and offset, its size and beginning as bytes, and its cells


def read_csv(path: Path, delimiter: str | None, reading: ReadingSettings) -> Iterator[RawRecord]:
    """Read a CSV file: a header with the column names, then rows. A first line `sep=;` names the delimiter.

    Without a header, the first columns are named `source` and `target`, or as the objective needs. Rows longer than
    max_record_bytes are rejected. Without `delimiter` or a line that names it, it is detected.
    """
    lines = _LineReader(path, reading)
    texts = iter(lines)
    csv.field_size_limit(reading.max_record_bytes)
    header_line = next(dropwhile(str.isspace, texts), None)
    if header_line is not None and (named := _DELIMITER_LINE.fullmatch(header_line)):
        delimiter = named[1]
        lines.begin_row()
        header_line = next(dropwhile(str.isspace, texts), None)
    if header_line is None:
        return
    sample = _read_sample(path, reading)
    delimiter = delimiter or _detect_delimiter(path, sample)
    rows = _iterate_csv(lines, csv.reader(chain([header_line], texts), delimiter=delimiter, strict=True))
    divided = f", divided at {DELIMITERS[delimiter]}"
    try:
        yield from _name_cells(path, rows, _divide_lines(sample, delimiter)[0], reading, divided)
    except csv.Error as error:
        reason = next((ours for theirs, ours in CSV_REASONS.items() if theirs in str(error)), str(error))
        raise DataError(f"{path}:{lines.number}: not valid CSV: {reason}{divided}") from error


def read_workbook(path: Path, reading: ReadingSettings) -> Iterator[RawRecord]:
    """Read a sheet of a workbook like a CSV file; the line of a record is the number of its row."""
    numbered = ((number, "\t".join(cells).encode(), cells) for number, cells in enumerate(read_cells(path), start=1))
    rows = ((number, 0, len(text), text, cells) for number, text, cells in numbered if any(cells))
    first = [*islice(rows, SAMPLE_LINES)]
    yield from _name_cells(path, chain(first, rows), [cells for *_, cells in first], reading)


def read_line_pairs(files: list[Path], reading: ReadingSettings) -> Iterator[RawRecord]:
    """Read each line of two text files as a source and its target; DataError: they have different numbers of lines."""
    counts = [sum(1 for _ in _iterate_lines(_LineReader(path, reading))) for path in files]
    if counts[0] != counts[1]:
        problem = f"pair_lines: {files[0]} has {format_count(counts[0], 'line')}, but {files[1]} has {counts[1]:,}"
        raise DataError(problem, hint="add the missing lines; a pair with an empty line is left out")
    sources, targets = (_LineReader(path, reading) for path in files)
    for index, (source, target) in enumerate(zip(_iterate_lines(sources), _iterate_lines(targets), strict=True)):
        location = RecordLocation(str(files[0]), sources.number, index, sources.offset - sources.size)
        pair, size = {"source": source, "target": target}, sources.size + targets.size
        yield _make_record(location, pair, size, sources.beginning, reading)


def _iterate_lines(lines: "_LineReader") -> Iterator[str]:
    for line in lines:
        yield line.rstrip("\r\n")
        lines.begin_row()


def _make_record(
    location: RecordLocation, cells: dict[str, str], size: int, beginning: bytes, reading: ReadingSettings
) -> RawRecord:
    if size > reading.max_record_bytes:
        return make_too_long_record(location, beginning, size, reading.max_record_bytes)
    return RawRecord(location, cells, size + CELL_OVERHEAD_BYTES * len(cells))


def _iterate_csv(lines: "_LineReader", reader: Iterator[list[str]]) -> Iterator[_Row]:
    line, offset = lines.number, lines.offset - lines.size  # of the header, whose first line was read already
    for cells in reader:
        if cells:
            yield line, offset, lines.size, lines.beginning, cells
        line, offset = lines.number + 1, lines.offset
        lines.begin_row()


def _name_cells(
    path: Path, rows: Iterator[_Row], sample: list[list[str]], reading: ReadingSettings, divided: str = ""
) -> Iterator[RawRecord]:
    """Make records of rows; the first row may be the header. `divided` explains a wrong number of cells."""
    if (first := next(rows, None)) is None:
        return
    line, _, size, _, header = first
    if reading.header and size > reading.max_record_bytes:
        raise DataError(f"{path}:{line}: the header is longer than max_record_bytes {reading.max_record_bytes}")
    if not reading.header:
        header, rows = _name_columns(len(header), reading), chain([first], rows)
    is_doubtful = reading.header and _looks_like_data(header, sample)
    names = [name if name.strip() else f"unnamed {number}" for number, name in enumerate(header, start=1)]
    _check_column_names(names, reading, f"{path}:{line}", "; if the first line is data, add --no-header")
    for index, (line, offset, size, beginning, cells) in enumerate(rows):
        # a spreadsheet may have empty columns without a name
        named = {name: cell for name, cell, given in zip(names, cells, header, strict=False) if cell or given}
        record = _make_record(RecordLocation(str(path), line, index, offset), named, size, beginning, reading)
        if record.parsed is None and len(cells) != len(header):
            given = "header" if reading.header else "first row"
            problem = f"{format_count(len(cells), 'cell')} in a row, {len(header)} in the {given}{divided}"
            record = replace(record, data=cells, parsed=Rejection("bad_row", problem))
        yield replace(record, has_doubtful_header=True) if is_doubtful else record


def _name_columns(count: int, reading: ReadingSettings) -> list[str]:
    names = ["prompt", "chosen", "rejected"] if reading.kind == "pairs" else ["source", "target"]
    known = ["text"] if reading.kind == "raw text" else names
    return [*known, *(f"column {number}" for number in range(len(known) + 1, count + 1))][:count]


def _looks_like_data(header: list[str], rows: list[list[str]]) -> bool:
    # a name that is also a value of its column, or a text about as long as the column's other texts
    columns = zip(*(row for row in rows if len(row) == len(header) and row != header), strict=True)
    return any(
        (name.strip() and name in cells)
        or (len(name.split()) >= MIN_WORDS and 2 * len(name) >= sorted(map(len, cells))[len(cells) // 2])
        for name, cells in zip(header, columns, strict=False)
    )


def _read_sample(path: Path, reading: ReadingSettings) -> list[str]:
    # from the header on, without blank lines before it
    lines = _LineReader(path, reading)
    sample: list[str] = []
    for line in dropwhile(str.isspace, lines):
        if sample or not _DELIMITER_LINE.fullmatch(line):
            sample.append(line)
        if len(sample) == SAMPLE_LINES or lines.size > SAMPLE_BYTES:
            break
    return sample


def _detect_delimiter(path: Path, sample: list[str]) -> str:
    """Find the delimiter that divides the most rows into the header's number of cells, at least two.

    If no delimiter does, return the delimiter with the most cells in the header.
    """
    num_cells, shares = dict.fromkeys(DETECTED_DELIMITERS, 0), dict.fromkeys(DETECTED_DELIMITERS, 0.0)
    for delimiter in DETECTED_DELIMITERS:
        rows, num_broken = _divide_lines(sample, delimiter)
        num_cells[delimiter] = len(rows[0]) if rows else 0
        if num_cells[delimiter] > 1:
            num_equal = sum(len(row) == num_cells[delimiter] for row in rows[1:])
            shares[delimiter] = num_equal / max(1, len(rows) - 1 + num_broken)
    best = [delimiter for delimiter, share in shares.items() if share == max(shares.values())]
    if shares[best[0]] == 0:
        return max(best, key=lambda delimiter: (num_cells[delimiter], sample[0].count(delimiter)))
    if "\t" in best:  # texts hardly contain tabs
        return "\t"
    if len(best) > 1:
        names = " and ".join(DELIMITERS[delimiter] for delimiter in best)
        problem = f"{path}: unclear delimiter: {names} divide its rows equally well"
        choices = " or ".join(f"sep={delimiter}" for delimiter in best)
        raise DataError(problem, hint=f"name the right one in a line above the header: {choices}")
    return best[0]


def _divide_lines(lines: list[str], delimiter: str) -> tuple[list[list[str]], int]:
    """Divide lines into rows of cells. Return the nonblank rows up to a broken row, and 1 if a row is broken."""
    rows: list[list[str]] = []
    num_broken = 0
    try:
        for row in csv.reader(lines, delimiter=delimiter, strict=True):
            rows.append(row)
    except csv.Error as error:
        num_broken = int("unexpected end of data" not in str(error))  # the lines may end inside a row
    return [*filter(None, rows)], num_broken


def count_rows(path: Path) -> int:
    """Count the rows of a Parquet file; 0 if it is broken, which reading it reports."""
    with suppress(ImportError, OSError, ValueError):
        from pyarrow import parquet

        return int(parquet.read_metadata(path).num_rows)
    return 0


def find_class_names(files: list[Path], reading: ReadingSettings) -> tuple[str, ...]:
    """Find the names of the labels, in their order, if Parquet's metadata has them and all files have the same."""
    found = set()
    for path in files:
        names: list[str] = []
        with suppress(ImportError, OSError, ValueError, RejectionError):  # reading the file reports it
            from pyarrow import parquet

            if find_data_suffix(path, is_text=True) == ".parquet":
                with open(path, "rb") as opened:  # pyarrow accepts no path that isn't UTF-8
                    schema = parquet.read_schema(opened)
                names = read_class_names(schema).get(find_columns(schema.names, reading)[1], [])
        found.add(tuple(names))
    return found.pop() if len(found) == 1 else ()


def read_parquet(path: Path, reading: ReadingSettings) -> Iterator[RawRecord]:
    """Read the rows of a Parquet file; rows longer than max_record_bytes are rejected."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        problem = f"{path}: reading Parquet needs pyarrow, which can't be imported: {error}"
        raise DependencyError(problem, hint="pip install pyarrow") from error
    index, max_bytes = 0, reading.max_record_bytes
    try:
        # an open file, because pyarrow accepts no path that isn't UTF-8
        with open(path, "rb") as opened, parquet.ParquetFile(opened, pre_buffer=False, buffer_size=1 << 20) as file:
            _check_column_names(file.schema_arrow.names, reading, str(path))
            classes = read_class_names(file.schema_arrow) if reading.kind == "labels" else {}
            for row, size in chain.from_iterable(_iterate_rows(batch, max_bytes) for batch in _read_batches(file)):
                location = RecordLocation(str(path), index + 1, index, 0)
                index += 1
                if size > max_bytes:
                    yield make_too_long_record(location, _read_beginning(row), size, max_bytes)
                else:
                    row |= {name: name_classes(row[name], names) for name, names in classes.items()}
                    yield RawRecord(location, row, size, has_filled_keys=True)
    except DataError:
        raise
    except Exception as error:  # pyarrow raises its own exceptions and many of Python's
        # further lines point into pyarrow's C++ code
        reason = shorten(next(iter(str(error).splitlines()), type(error).__name__), 200)
        problem = f"{path}: row {index}: broken Parquet: {reason}"
        raise DataError(problem, "download or copy the file again", "data_path") from error


def _check_column_names(names: list[str], reading: ReadingSettings, place: str, advice: str = "") -> None:
    used = list_label_columns(reading) if reading.kind == "labels" else list_read_keys(reading)
    if duplicates := [name for name, count in Counter(names).items() if count > 1 and name in used]:
        problem = f"{place}: duplicate column name: {join_first(duplicates)}"
        raise DataError(problem, hint=f"rename all but one of them{advice}")


def _read_batches(file: Any) -> Iterator[Any]:
    for group in range(file.num_row_groups):
        batches = partial(file.iter_batches, row_groups=[group], use_threads=False)
        # the file stores a text that many rows share only once, so its size says little: measure the first row
        first = next((batch.nbytes for batch in batches(batch_size=1)), 0)
        metadata = file.metadata.row_group(group)
        most = max(metadata.total_byte_size // max(1, metadata.num_rows), first)
        yield from batches(batch_size=max(1, min(ROWS_PER_BATCH, BYTES_PER_BATCH // max(1, most))))


def _iterate_rows(batch: Any, max_bytes: int) -> Iterator[tuple[Any, int]]:
    """Yield each row as a dict, with its size in bytes; a row longer than `max_bytes` is a one-row Arrow batch."""
    # a text that is stored once may be in many rows, so a batch can be much larger than the bytes that were read
    is_whole = batch.nbytes <= min(BYTES_PER_BATCH, max_bytes)
    counts_itself = "dictionary<" not in str(batch.schema)  # nbytes of a dictionary counts every row's text
    for part in [batch] if is_whole else (batch.slice(number, 1) for number in range(len(batch))):
        if counts_itself and part.nbytes > max_bytes:
            yield part, part.nbytes
            continue
        for number, row in enumerate(_convert_rows(part)):
            size = _count_bytes(row)
            yield row if size <= max_bytes else part.slice(number, 1), size


def _read_beginning(row: Any) -> bytes:
    # only the beginning of each text, to limit memory
    cells = {
        name: _convert_cell(column[0], MAX_KEPT_BYTES)
        for name, column in zip(row.schema.names, row.columns, strict=True)
    }
    return json.dumps(cells, default=str).encode()


def _convert_rows(batch: Any) -> list[dict[str, Any]]:
    # cell by cell only if pyarrow can't convert all at once
    try:
        return list(batch.to_pylist())
    except Exception:  # a time out of Python's range, a struct with a duplicate field name, …
        columns = [[_convert_cell(scalar) for scalar in column] for column in batch.columns]
        return [dict(zip(batch.schema.names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _convert_cell(scalar: Any, max_bytes: int | None = None) -> Any:
    """Convert an Arrow scalar to a Python value; a text is cut after `max_bytes`.

    Bytes that aren't UTF-8 become lone surrogates. A value without a type in Python becomes a list with the name of its
    Arrow type, which is rejected later as not being text.
    """
    kind = str(scalar.type)
    if kind in TEXT_TYPES and scalar.is_valid:
        return bytes(memoryview(scalar.as_buffer())[:max_bytes]).decode(errors="surrogateescape")
    try:
        return scalar.as_py()
    except Exception:  # as in `_convert_rows`
        if kind.startswith(("list<", "large_list<")):
            return [_convert_cell(item) for item in scalar]
    names = [field.name for field in scalar.type] if kind.startswith("struct<") else []
    return {name: _convert_cell(scalar[name]) for name in names} if len(set(names)) == len(names) > 0 else [kind]


def _count_bytes(value: Any) -> int:
    # anything but text counts as 8
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 8


class _LineReader:
    """Iterates over a file's lines as text with their line ends; bytes that are not UTF-8 become lone surrogates.

    From the line that makes a row longer than `max_bytes`, only a skeleton is yielded: each stretch of ordinary text is
    replaced with `x`, so that the csv module still finds the same cells and the end of the row.
    """

    def __init__(self, path: Path, reading: ReadingSettings) -> None:
        self.offset = 0  # of the next line in the file
        self.number = 0  # lines yielded so far
        self.size = 0  # bytes of the current row so far
        self.beginning = b""  # the first bytes of the current row
        self._max_bytes = reading.max_record_bytes
        self._encoding = reading.encoding
        self._path = path
        self._skeleton = b""  # of the dropped part of the current line, if the row is too long

    def begin_row(self) -> None:
        """Start counting a new row; forget the last."""
        self.size, self.beginning = 0, b""

    def __iter__(self) -> Iterator[str]:
        rest, line_end = b"", None
        for chunk in read_chunks(self._path, self._encoding):
            if line_end is None:
                self.offset = len(BOM) if chunk.startswith(BOM) else 0
                chunk = chunk[self.offset :]
                line_end = b"\r" if b"\r" in chunk.rstrip() and b"\n" not in chunk else b"\n"
            if self.size + len(rest) > self._max_bytes:
                self._skeleton += self._reduce(rest)
                rest = b""
            *lines, rest = (rest + chunk).split(line_end)
            for line in lines:
                yield self._finish_line(line + line_end)
        if rest or self._skeleton:
            yield self._finish_line(rest)

    def _finish_line(self, line: bytes) -> str:
        if self.size + len(line) > self._max_bytes:
            line, self._skeleton = self._skeleton + self._reduce(line), b""
        else:
            self._count(line)
        self.number += 1
        return decode_record(line)

    def _count(self, data: bytes) -> None:
        self.beginning += data[: MAX_KEPT_BYTES - len(self.beginning)]
        self.size += len(data)
        self.offset += len(data)

    def _reduce(self, data: bytes) -> bytes:
        self._count(data)
        if len(self._skeleton) > self._max_bytes:
            raise DataError(f"{self._path}:{self.number + 1}: a line with more than {self._max_bytes} separators")
        return _CELL_TEXT.sub(b"x", data)
