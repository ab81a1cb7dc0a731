"""Data files -> raw records, one by one, in bounded memory.

    for record in read_records([Path("chats.jsonl")], max_bytes=4 << 20):
        match record:
            case Raw(): value = value_of(record)
            case Rejected(): ...

JSON arrays, JSON lines and single objects are told apart by looking, not by their names. An array is cut into its
elements without reading it whole; each element and each line is parsed by itself, so that one that can't be used
doesn't touch the others.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from t5tune.data.files import BOM, TEXT, kind_of, read_chunks
from t5tune.data.records import Place, Raw, Refused, Rejected, parse
from t5tune.data.tables import read_csv, read_parquet
from t5tune.errors import DataError

MOST_BYTES = 1 << 30  # of one record: beyond it the file is no set of conversations


def read_records(files: list[Path], max_bytes: int, spool: Path | None = None) -> Iterator[Raw | Rejected]:
    """Every record of the files, in order.

    Args:
        max_bytes: longer records are Rejected unread.
        spool: folder for the bytes of those.

    Raises:
        DataError: a file can't be trusted: broken, cut off, or not what its name says.
    """
    for number, path in enumerate(files):
        kind = kind_of(path)
        if kind in TEXT:
            yield from _Text(path, max_bytes, spool / str(number) if spool is not None else None).records()
        elif kind == ".parquet":
            yield from read_parquet(path)
        else:
            yield from read_csv(path, "\t" if kind == ".tsv" else None, max_bytes)


class _Text:
    """One JSON file: an array, one value, or lines. Holds at most a record and a chunk of it."""

    def __init__(self, path: Path, max_bytes: int, spool: Path | None) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.spool = spool
        self.chunks = read_chunks(path)
        self.buffer = b""
        self.offset = 0  # of the buffer in the file
        self.start = 0  # in the buffer, of what isn't used yet
        self.scan = 0  # in the buffer, of what isn't looked at yet
        self.line = 1  # at `start`
        self.index = 0
        self.depth = 0
        self.in_string = False
        self.in_array = False
        self.repairs: tuple[tuple[str, int], ...] = ()

    def records(self) -> Iterator[Raw | Rejected]:
        while len(self.buffer) < len(BOM) and self._more():
            pass
        if self.buffer.startswith(BOM):
            self.start = len(BOM)
            self.repairs = (("byte_order_mark", 1),)
        if not self._skip_blank():
            return
        if self._next() == b"[":
            yield from self._array()
        elif self._is_one_value():
            self.scan = len(self.buffer)
            yield self._taken(self._place())
        else:
            while self._skip_blank():
                yield self._record(self._to_line_end)

    def _array(self) -> Iterator[Raw | Rejected]:
        self.in_array = True
        self.start += 1
        ending = b"]" if self._skip_blank() and self._next() == b"]" else b","
        self.start += ending == b"]"
        while ending == b",":
            self._skip_blank()
            self.depth, self.in_string = 0, False
            yield self._record(self._to_separator)
            ending = self._next()
            self.start += 1
        if self._skip_blank():
            raise DataError(f"{self.path}:{self.line}: text goes on after the array's end")

    def _record(self, find_end: Callable[[], bool]) -> Raw | Rejected:
        """The record at `start`, whose end `find_end` finds; what is longer than max_bytes goes to a file unread."""
        place = self._place()
        self.scan = self.start
        spilled = 0
        while not find_end():
            if spilled or self.scan - self.start > self.max_bytes:
                spilled += self._spill(place)
                if spilled > MOST_BYTES:
                    raise DataError(f"{self.path}:{place.line}: a record of more than {MOST_BYTES} bytes; is it data?")
            if not self._more():
                if self.in_array:
                    raise DataError(
                        f"{self.path}:{self.line}: the array has no end", hint="the file was cut off; get it again"
                    )
                break
        if not spilled and self.scan - self.start <= self.max_bytes:
            return self._taken(place)
        self._spill(place)
        self.index += 1
        return Rejected(place, "too_long", f"longer than max_record_bytes {self.max_bytes}", self._spool_file(place))

    def _taken(self, place: Place) -> Raw:
        """The bytes from `start` to `scan` as a record."""
        data = self.buffer[self.start : self.scan]
        self.line += data.count(b"\n")
        self.start = self.scan
        self.index += 1
        repairs, self.repairs = self.repairs, ()
        return Raw(place, data.strip(), self.in_array, repairs)

    def _spill(self, place: Place) -> int:
        """Put them into the record's file instead, and return their number."""
        data = self.buffer[self.start : self.scan]
        if (file := self._spool_file(place)) is not None:
            with open(file, "ab") as stream:
                stream.write(data)
        self.line += data.count(b"\n")
        self.start = self.scan
        return len(data)

    def _spool_file(self, place: Place) -> Path | None:
        return self.spool.with_name(f"{self.spool.name}-{place.index}.long") if self.spool is not None else None

    def _to_line_end(self) -> bool:
        end = self.buffer.find(b"\n", self.scan)
        self.scan = end if end >= 0 else len(self.buffer)
        return end >= 0

    def _to_separator(self) -> bool:
        """To the comma behind an element, or the bracket that ends the array."""
        while True:
            if self.in_string:
                self.scan = _STRING.match(self.buffer, self.scan).end()  # type: ignore[union-attr]
                if self.buffer[self.scan : self.scan + 1] != b'"':
                    return False
                self.in_string = False
                self.scan += 1
            found = _STRUCTURE.search(self.buffer, self.scan)
            if found is None:
                self.scan = len(self.buffer)
                return False
            self.scan = found.end()
            if found[0] == b'"':
                self.in_string = True
            elif found[0] in b"[{":
                self.depth += 1
            elif self.depth == 0:
                self.scan = found.start()
                if found[0] == b"}":
                    raise DataError(f"{self.path}:{self.line}: not valid JSON here: a brace that nothing opened")
                return True
            elif found[0] in b"]}":
                self.depth -= 1

    def _is_one_value(self) -> bool:
        """Whether the file holds one object over several lines, rather than one a line."""
        if self._next() != b"{":
            return False
        while b"\n" not in self.buffer and len(self.buffer) <= self.max_bytes and self._more():
            pass
        if _is_json(self.buffer[self.start :].partition(b"\n")[0]):
            return False
        while len(self.buffer) <= self.max_bytes and self._more():
            pass
        return len(self.buffer) <= self.max_bytes and _is_json(self.buffer[self.start :])

    def _place(self) -> Place:
        return Place(str(self.path), self.line, self.index, self.offset + self.start)

    def _next(self) -> bytes:
        return self.buffer[self.start : self.start + 1]

    def _skip_blank(self) -> bool:
        """To the next byte that is no white space; False at the file's end."""
        while (found := _VISIBLE.search(self.buffer, self.start)) is None:
            self.line += self.buffer.count(b"\n", self.start)
            self.start = len(self.buffer)
            if not self._more():
                return False
        self.line += self.buffer.count(b"\n", self.start, found.start())
        self.start = found.start()
        return True

    def _more(self) -> bool:
        """Read on; False at the file's end."""
        chunk = next(self.chunks, b"")
        if self.start:
            self.buffer = self.buffer[self.start :]
            self.offset += self.start
            self.scan -= self.start
            self.start = 0
        self.buffer += chunk
        return bool(chunk)


_VISIBLE = re.compile(rb"[^ \t\r\n]")
_STRUCTURE = re.compile(rb'["\[\]{},]')
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


def _is_json(data: bytes) -> bool:
    try:
        parse(data)
    except Refused as refused:
        return refused.reason not in {"not_json", "invalid_utf8"}
    return True
