"""The segments of all parts of a token cache, in the order of the data, and pieces of them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.preparing.parts.part import REASONS
from t5tune.preparing.parts.record_range import Segment

_DUPLICATE = REASONS.index("duplicate")


@dataclass(frozen=True)
class PlacedSegment:
    """A segment of a part, and where it is.

    Args:
        row: the first row in the part's records.bin.
        position: number of the first record among all records of the data.
        line, index: what to add to the line and to the number of a record in the segment.
    """

    part: int
    segment: Segment
    row: int
    position: int
    line: int
    index: int


@dataclass(frozen=True)
class Chunk:
    """Some records of a segment.

    Args:
        start: number of the first of them in the segment.
        rows: of RECORD_DTYPE.
        firsts: for a later duplicate the position of the first record with the same texts, otherwise -1.
    """

    place: PlacedSegment
    start: int
    rows: npt.NDArray[Any]
    firsts: npt.NDArray[np.int64]

    @property
    def reasons(self) -> npt.NDArray[np.uint8]:
        """The numbers in REASONS for which records are rejected, also as duplicates; 0 for those that are kept."""
        reasons: npt.NDArray[np.uint8] = np.where(self.firsts >= 0, _DUPLICATE, self.rows["reason"]).astype(np.uint8)
        return reasons

    def take(self, count: int) -> "Chunk":
        """Return the first `count` records."""
        return replace(self, rows=self.rows[:count], firsts=self.firsts[:count])


def place_segments(manifests: list[dict[str, Any]]) -> list[PlacedSegment]:
    """Put the segments of all parts in the order of the data."""
    found: list[tuple[int, int, Segment]] = []
    for part, manifest in enumerate(manifests):
        row = 0
        for segment in (Segment(*values) for values in manifest["segments"]):
            found.append((part, row, segment))
            row += segment.records
    found.sort(key=lambda item: (item[2].file, item[2].start))
    placed: list[PlacedSegment] = []
    file, position, line, index = -1, 0, 0, 0
    for part, row, segment in found:
        if segment.file != file:
            file, line, index = segment.file, 0, 0
        placed.append(PlacedSegment(part, segment, row, position, line, index if segment.is_cut else segment.start))
        position, line, index = position + segment.records, line + segment.lines, index + segment.records
    return placed
