"""Read a file of raw text as records: parts of a few pages, which begin at a paragraph, a line or a word."""

import re
from collections.abc import Iterator
from pathlib import Path

from t5tune.data.reading.files import BOM, read_chunks
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.reading.text_encoding import decode_record

PART_BYTES = 1 << 15  # roughly; a few windows of the text
# where a part may end, from the best place to the worst
_ENDS = [re.compile(pattern) for pattern in (rb"\n\s*\n", rb"\n", rb"[ \t]")]


def read_text(path: Path, encoding: str | None = None) -> Iterator[RawRecord]:
    """Yield the parts of a text, in order; the key of each text is `text`."""
    line, index, offset = 1, 0, 0
    for part in _cut(read_chunks(path, encoding)):
        text = part.removeprefix(BOM) if offset == 0 else part
        if text.strip():
            line_of_text = line + part[: len(part) - len(part.lstrip())].count(b"\n")
            location = RecordLocation(str(path), line_of_text, index, offset)
            repairs = (("byte_order_mark", 1),) if len(text) < len(part) else ()
            # bytes that aren't UTF-8 become lone surrogates, so the record is rejected
            value = {"text": decode_record(text.strip())}
            yield RawRecord(location, value, len(part), repairs=repairs)
            index += 1
        line += part.count(b"\n")
        offset += len(part)


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
    # after the first paragraph, line or word that ends in this range; otherwise at its end
    for pattern in _ENDS:
        if found := pattern.search(data, first, last):
            return found.end()
    while last > first and data[last] & 0xC0 == 0x80:  # within a character
        last -= 1
    return last
