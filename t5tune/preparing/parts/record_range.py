"""The records of one part of the data: those that begin in its share of the bytes.

A file of JSON lines in UTF-8 is divided between two lines, and each part reads only its lines. In any other file, each
part reads all records up to the end of its range; a compressed file or a workbook belongs to the part where it begins.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from t5tune.data.reading.files import (
    BOM,
    find_data_suffix,
    find_file_encoding,
    is_compressed,
    read_byte_range,
    read_chunks,
)
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.readers import JsonReader, read_records
from t5tune.data.reading.tables import count_rows
from t5tune.data.reading.text_encoding import UTF8
from t5tune.data.reading.workbooks import split_sheet
from t5tune.errors import DataError
from t5tune.file_names import JSON_SUFFIXES
from t5tune.settings.groups.record_format import ReadingSettings
from t5tune.settings.groups.shard import Shard


def read_range(files: list[Path], shard: Shard, reading: ReadingSettings) -> Iterator[RawRecord]:
    """Yield the records of a part, with their places in the whole files."""
    groups = [files] if reading.pair_lines else [[file] for file in files]
    sizes = [split_sheet(path)[0].stat().st_size for path, *_ in groups]
    begin, end = (sum(sizes) * number // shard.count for number in (shard.index, shard.index + 1))
    for group, size in zip(groups, sizes, strict=True):
        first, last = max(begin, 0), min(end, size)
        begin, end = begin - size, end - size
        if first >= last:
            continue
        if (line_end := find_line_end(path := group[0], reading)) is not None:
            yield from _read_lines(path, line_end, first, last, reading)
        elif find_data_suffix(path) == ".xlsx" or is_compressed(path):
            yield from read_records(group, reading) if first == 0 else ()
        else:
            yield from _select_records(group, size, first, last, reading)


def _select_records(
    group: list[Path], size: int, first: int, last: int, reading: ReadingSettings
) -> Iterator[RawRecord]:
    """Yield the records that begin in these bytes of the first file; Parquet's rows count as equally long."""
    num_rows = count_rows(group[0]) if find_data_suffix(group[0]) == ".parquet" else None
    for record in read_records(group, reading):
        location = record.location
        # text in a different encoding may have more bytes than its file
        place = min(location.offset, size - 1) if num_rows is None else location.index * size // num_rows
        if place >= last:
            return
        if place >= first:
            yield record


def _read_lines(path: Path, line_end: bytes, first: int, last: int, reading: ReadingSettings) -> Iterator[RawRecord]:
    """Yield the records of the lines that begin at these bytes."""
    start, end = (find_line_start(path, position, line_end) for position in (first, last))
    if start < end:
        reader = JsonReader(path, read_byte_range(path, start, end), reading.max_record_bytes, start)
        num_lines, reader.index = _count_lines(path, start, line_end)
        reader.line += num_lines
        yield from reader.iterate_lines(line_end)


def _count_lines(path: Path, end: int, line_end: bytes) -> tuple[int, int]:
    """Count the lines before this byte, and how many of them aren't blank."""
    num_lines = num_records = 0
    chunks = read_byte_range(path, 0, end)
    rest = next(chunks, b"").removeprefix(BOM)
    for chunk in chain([b""], chunks):
        *lines, rest = (rest + chunk).split(line_end)
        num_lines += len(lines)
        num_records += sum(bool(line.strip(b" \t\r\n")) for line in lines)
    return num_lines, num_records


def find_line_end(path: Path, reading: ReadingSettings) -> bytes | None:
    """Return the line end of a file of JSON lines in UTF-8 that isn't compressed; None for other files."""
    try:
        if find_data_suffix(path) not in JSON_SUFFIXES or is_compressed(path):
            return None
        if find_file_encoding(path, reading.encoding) != UTF8:
            return None
        reader = JsonReader(path, read_chunks(path, UTF8), reading.max_record_bytes)
        return reader.line_end if reader.detect_form() == "lines" else None
    except DataError:  # it is raised again when the file is read
        return None


def find_line_start(path: Path, position: int, line_end: bytes) -> int:
    """Return the offset of the first line that begins at `position` or later, or the file's size."""
    if position == 0:
        return 0
    offset = position - 1  # a line begins at `position` if the byte before is a line end
    for chunk in read_byte_range(path, offset):
        if (found := chunk.find(line_end)) >= 0:
            return offset + found + 1
        offset += len(chunk)
    return offset
