"""Which records a part of the data has, when several processes prepare it: `--shard 0/3` is the first of three parts.

    reader = ShardReader([Path("chats.jsonl"), Path("more.json.gz")], Shard(0, 3), reading)
    for record in reader:
        ...
    reader.segments

All files are laid end to end, and each part has a range of these bytes. Files of JSON lines in UTF-8 are cut there: a
line belongs to the part in whose range its first byte is. Other files can't be cut without reading them: a small one
belongs to the part in whose range it begins, and each part reads a large one whole, but keeps only every Nth block of
records.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from t5tune.data.reading.files import find_data_suffix, find_file_encoding, is_compressed, read_byte_range, read_chunks
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.readers import JsonReader, read_records
from t5tune.data.reading.text_encoding import UTF8
from t5tune.errors import DataError
from t5tune.file_names import JSON_SUFFIXES
from t5tune.settings.groups.record_format import ReadingSettings
from t5tune.settings.groups.shard import Shard

BLOCK_RECORDS = 1024  # of a file that each part reads whole
SMALL_FILES_PER_PART = 4  # a file that is smaller than a part divided by this isn't divided


@dataclass
class Segment:
    """Consecutive records of a file.

    Args:
        file: the number of the file.
        is_cut: whether the file is cut between lines, so that its records' lines and indices count from `start`.
        start: offset of the first line in bytes if the file is cut; otherwise the index of the first record.
        lines: number of line ends, if the file is cut.
    """

    file: int
    is_cut: bool
    start: int
    records: int = 0
    lines: int = 0


class ShardReader:
    """Reads the records of a part, and lists the segments that they are in.

    A segment is complete when the next one begins, or all records are read.
    """

    def __init__(self, files: list[Path], shard: Shard, reading: ReadingSettings) -> None:
        self.segments: list[Segment] = []
        self.file = 0  # the file that is being read, and the records of it that are read, also those of other parts
        self.record = 0
        self._files = files
        self._shard = shard
        self._reading = reading

    def __iter__(self) -> Iterator[RawRecord]:
        sizes = [file.stat().st_size for file in self._files]
        total, index, count = sum(sizes), self._shard.index, self._shard.count
        starts = [total * number // count for number in range(count)]
        begin, end = starts[index], total * (index + 1) // count
        position = 0
        for number, (path, size) in enumerate(zip(self._files, sizes, strict=True)):
            self.file, self.record = number, 0
            line_end = find_line_end(path, self._reading)
            owner = min(bisect_right(starts, position), count) - 1
            if line_end is not None:
                yield from self._read_lines(path, line_end, max(begin - position, 0), min(end - position, size))
            elif size * count * SMALL_FILES_PER_PART > total and count > 1:
                yield from self._read_blocks(path)
            elif owner == index:
                yield from self._add_segment(False, 0, read_records([path], self._reading))
            position += size

    def is_at_beginning(self, num_records: int) -> bool:
        """Whether the first `num_records` records of the part are the first ones of all data."""
        first = self.segments[0]
        return (first.file, first.start) == (0, 0) and (len(self.segments) == 1 or num_records <= first.records)

    def split_at(self, num_records: int) -> tuple[int, int]:
        """Keep the segments of the first `num_records` records, and return the file and record after them."""
        for number, segment in enumerate(self.segments):
            if num_records < segment.records:
                del self.segments[number + 1 :]
                segment.records = num_records
                return segment.file, segment.start + num_records
            num_records -= segment.records
        return self.file, self.record

    def _read_lines(self, path: Path, line_end: bytes, begin: int, end: int) -> Iterator[RawRecord]:
        """Read the lines whose first byte is from `begin` to `end`."""
        if begin >= end:
            return
        start, end = (find_line_start(path, position, line_end) for position in (begin, end))
        if start < end:
            reader = JsonReader(path, read_byte_range(path, start, end), self._reading.max_record_bytes, start)
            yield from self._add_segment(True, start, reader.iterate_lines(line_end))
            self.segments[-1].lines = reader.line - 1

    def _read_blocks(self, path: Path) -> Iterator[RawRecord]:
        for record in read_records([path], self._reading):
            block, place = divmod(self.record, BLOCK_RECORDS)
            if (block + self.file) % self._shard.count == self._shard.index:
                if place == 0:
                    self.segments.append(Segment(self.file, False, self.record))
                self.segments[-1].records += 1
                yield record
            self.record += 1

    def _add_segment(self, is_cut: bool, start: int, records: Iterator[RawRecord]) -> Iterator[RawRecord]:
        segment = Segment(self.file, is_cut, start)
        self.segments.append(segment)
        for record in records:
            segment.records += 1
            self.record += 1
            yield record


def find_line_end(path: Path, reading: ReadingSettings) -> bytes | None:
    """Return the line end of a file of JSON lines in UTF-8 that isn't compressed; None for another file."""
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
    """Return the offset of the first line that begins at `position` or later; the file's size if there is none."""
    if position == 0:
        return 0
    offset = position - 1  # a line begins at `position` if the byte before is a line end
    for chunk in read_byte_range(path, offset):
        if (found := chunk.find(line_end)) >= 0:
            return offset + found + 1
        offset += len(chunk)
    return offset


def read_line_at(path: Path, line_end: bytes, offset: int, size: int) -> RawRecord:
    """Read the record of a file of JSON lines that begins at `offset` and has `size` bytes."""
    reader = JsonReader(path, read_byte_range(path, offset, offset + size), size, offset)
    return next(reader.iterate_lines(line_end))
