"""Read a file of raw text as records: parts of a few pages, which begin where a paragraph, a line or a word does."""

import re
from collections.abc import Iterator
from pathlib import Path

from t5tune.data.reading.files import BOM, read_chunks
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.reading.text_encoding import decode_record

PART_BYTES = 1 << 15  # about; a few windows of the text
# where a part may end, from the best place to the worst
_ENDS = [re.compile(pattern) for pattern in (rb"\n\s*\n", rb"\n", rb"[ \t]")]


def read_text(path: Path, encoding: str | None = None) -> Iterator[RawRecord]:
    """Yield the parts of a text, in order; `text` is the key of each.

    Raises:
        DataError: as of `read_chunks`.
    """
    line, index, offset = 1, 0, 0
    for part in _cut(read_chunks(path, encoding)):
        text = part.removeprefix(BOM) if offset == 0 else part
        if text.strip():
            location = RecordLocation(
                str(path), line + _count_lines(part[: len(part) - len(part.lstrip())]), index, offset
            )
            repairs = (("byte_order_mark", 1),) if len(text) < len(part) else ()
            # bytes that aren't UTF-8 become lone surrogates, for which the record is rejected
            value = {"text": decode_record(text.strip())}
            yield RawRecord(location, value, len(part), repairs=repairs)
            index += 1
        line += _count_lines(part)
        offset += len(part)


def _count_lines(part: bytes) -> int:
    return part.count(b"\n")


def _cut(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut a stream into parts of at most 2 * PART_BYTES, at the best place in the second half of each."""
    buffer = b""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > 2 * PART_BYTES:
            end = _find_end(buffer, start + PART_BYTES, start + 2 * PART_BYTES)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _find_end(data: bytes, first: int, last: int) -> int:
    """Find where a part ends: after the first paragraph, line or word that ends in this range; else at its end."""
    for pattern in _ENDS:
        if found := pattern.search(data, first, last):
            return found.end()
    while last > first and data[last] & 0xC0 == 0x80:  # within a character
        last -= 1
    return last
