"""The lines of rejected.jsonl when parts are joined: with the line numbers of whole files, and with all duplicates."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.readers import read_records
from t5tune.data.reading.rejections import LABELED_BAD, RecordLocation
from t5tune.preparing.cache_writer import format_rejected, make_duplicate_rejection
from t5tune.preparing.counts import RecordCounts
from t5tune.preparing.parts.part import REASONS, PartReader
from t5tune.preparing.parts.placed_segments import Chunk, PlacedSegment
from t5tune.preparing.parts.record_range import find_line_end, read_line_at
from t5tune.settings.groups.record_format import ReadingSettings

_END_OF_NUMBERS = b', "offset": '


@dataclass(frozen=True)
class RejectedLines:
    """Makes the lines of rejected.jsonl.

    Args:
        places: all segments, in the order of the data.
        open_part: returns the reader of a part.
    """

    files: list[Path]
    places: list[PlacedSegment]
    open_part: Callable[[int], PartReader]
    reading: ReadingSettings

    def iterate_lines(self, chunk: Chunk, counts: RecordCounts) -> Iterator[bytes]:
        """Yield the lines of a chunk's rejected records and duplicates; note the first one of each file in `counts`."""
        place, reasons = chunk.place, chunk.reasons
        part, name = self.open_part(place.part), str(self.files[place.segment.file])
        start = b'{"file": %b, "line": ' % json.dumps(name).encode()
        numbers = np.flatnonzero(reasons)
        lines = (chunk.rows["line"][numbers] + np.uint64(place.line)).tolist()
        sizes = chunk.rows["rejected_bytes"][numbers].tolist()
        for number, line, size, reason in zip(numbers.tolist(), lines, sizes, reasons[numbers].tolist(), strict=True):
            index = place.index + chunk.start + number
            if size:
                rest = part.read("rejected.bin", size).partition(_END_OF_NUMBERS)[2]
                text = b'%b%d, "index": %d%b%b' % (start, line, index, _END_OF_NUMBERS, rest)
            else:
                text = self._format_duplicate(chunk, number, index)
            if REASONS[reason] != LABELED_BAD and name not in counts.first_rejected:
                facts = json.loads(text)
                location = RecordLocation(name, line, index, 0, facts.get("key"))
                counts.first_rejected[name] = f"{location}: {facts['message']}"
            yield text

    def locate(self, position: int) -> RecordLocation:
        """Return the location of the record at this position in the data, without its index and offset."""
        place = self.places[bisect_right(self._positions, position) - 1]
        part = self.open_part(place.part)
        row = part.read_row(place.row + position - place.position)
        key = part.read_details(int(row["details"])).get("key")
        return RecordLocation(str(self.files[place.segment.file]), place.line + int(row["line"]), 0, 0, key)

    def _format_duplicate(self, chunk: Chunk, number: int, index: int) -> bytes:
        place, row = chunk.place, chunk.rows[number]
        if place.segment.is_cut:
            path = self.files[place.segment.file]
            record = read_line_at(path, self._find_line_end(path), int(row["offset"]), int(row["size"]))
        else:
            record = self._originals.read(place.segment.file, index)
        location = replace(record.location, line=place.line + int(row["line"]), index=index)
        rejection = make_duplicate_rejection(str(self.locate(int(chunk.firsts[number]))))
        return format_rejected(location, rejection, record.data).encode()

    def _find_line_end(self, path: Path) -> bytes:
        if path not in self._line_ends:
            self._line_ends[path] = find_line_end(path, self.reading) or b"\n"
        return self._line_ends[path]

    @cached_property
    def _positions(self) -> list[int]:
        return [place.position for place in self.places]

    @cached_property
    def _line_ends(self) -> dict[Path, bytes]:
        return {}

    @cached_property
    def _originals(self) -> "_Originals":
        return _Originals(self.files, self.reading)


class _Originals:
    """Reads records again from files that can't be read from the middle; they are asked for in their order."""

    def __init__(self, files: list[Path], reading: ReadingSettings) -> None:
        self._files = files
        self._reading = reading
        self._file = -1
        self._records: Iterator[RawRecord] = iter(())

    def read(self, file: int, index: int) -> RawRecord:
        if file != self._file:
            self._file, self._records = file, read_records([self._files[file]], self._reading)
        return next(record for record in self._records if record.location.index == index)
