"""Data files -> raw records, one by one, in bounded memory.

    for record in read_records([Path("chats.jsonl")], max_bytes=4 << 20):
        match record:
            case Raw(): value = value_of(record)
            case Rejected(): ...

JSON arrays, JSON lines and objects over several lines are told apart by looking, not by their names. An array is cut
into its elements without reading it whole; each element and each line is parsed by itself, so that one that can't be
used doesn't touch the others.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from t5tune.data.csv_parquet import read_csv, read_parquet
from t5tune.data.files import BOM, STDIN, TEXT, Digest, kind_of, read_chunks
from t5tune.data.records import STEPS, Place, Raw, Refused, Rejected, depths, parse
from t5tune.errors import DataError

MOST_BYTES = 1 << 30  # of one record: beyond it the file is no set of conversations


def read_records(
    files: list[Path], max_bytes: int, spool: Path | None = None, stdin: Digest | None = None
) -> Iterator[Raw | Rejected]:
    """Every record of the files, in order.

    Args:
        max_bytes: longer records are Rejected unread.
        spool: folder for the bytes of those.
        stdin: takes what comes in by standard input.

    Raises:
        DataError: a file can't be trusted: broken, cut off, or not what its name says.
    """
    for number, path in enumerate(files):
        kind = kind_of(path)
        long = spool / str(number) if spool is not None else None
        if kind in TEXT:
            chunks = read_chunks(path, stdin if path == STDIN else None)
            yield from _Text(path, chunks, max_bytes, long).records()
        elif kind == ".parquet":
            yield from read_parquet(path, max_bytes, long)
        else:
            yield from read_csv(path, "\t" if kind == ".tsv" else None, max_bytes, long)


class _Text:
    """One JSON file: an array, lines, or objects over several lines. Holds at most a record and a chunk of it."""

    def __init__(self, path: Path, chunks: Iterator[bytes], max_bytes: int, spool: Path | None) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.spool = spool
        self.chunks = chunks
        self.buffer = b""
        self.offset = 0  # of the buffer in the file
        self.start = 0  # in the buffer, of what isn't used yet
        self.scan = 0  # in the buffer, of what isn't looked at yet
        self.line = 1  # at `start`
        self.line_end = b"\n"
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
        form = self._form()
        if form == "array":
            yield from self._array()
            return
        while self._skip_blank():
            self.depth, self.in_string = 0, False
            yield self._record(self._to_line_end if form == "lines" else self._to_value_end)

    def _form(self) -> Literal["array", "lines", "values"]:
        """What the file is, by its first two lines that aren't blank."""
        while (lines := self._first_lines()) is None and len(self.buffer) <= self.max_bytes and self._more():
            pass
        first, second = lines or (b"", b"")
        if self._next() == b"[":
            # `[INFO] starting`, or a list a line; a list before an object is an array that goes on
            is_closed = bool(second) and 0 in depths(first)
            return "lines" if is_closed and (not _is_json(first) or second.startswith(b"[")) else "array"
        # an object that is open at the line's end goes on, unless that line was cut off and the next is whole
        is_open = self._next() == b"{" and bool(second) and 0 not in depths(first) and _is_outside_text(first)
        return "values" if is_open and not _is_json(second) else "lines"

    def _first_lines(self) -> tuple[bytes, bytes] | None:
        """The line at `start` and the next that isn't blank; None: they aren't read yet."""
        if found := _MAC_LINE.match(self.buffer, self.start):
            self.line_end = b"\r"
            end = found.end()
        else:
            end = self.buffer.find(b"\n", self.start)
        visible = _VISIBLE.search(self.buffer, end) if end >= 0 else None
        if visible is None:
            return None
        second_end = self.buffer.find(self.line_end, visible.start())
        second = self.buffer[visible.start() : second_end if second_end >= 0 else len(self.buffer)]
        return self.buffer[self.start : end], second

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
                        f"{self.path}:{self.line}: the array has no end",
                        hint="the file was cut off, or the record that begins there lacks a bracket or a quote",
                    )
                break
        if not spilled and self.scan - self.start <= self.max_bytes:
            return self._taken(place)
        self._spill(place)
        self.index += 1
        return Rejected(place, "too_long", f"longer than max_record_bytes {self.max_bytes}", self._spool_file(place))

    def _taken(self, place: Place) -> Raw:
        """The bytes from `start` to `scan` as a record."""
        data = self.buffer[self.start : self.scan].strip()
        size = self.scan - self.start
        self.line += self.buffer.count(self.line_end, self.start, self.scan)
        self.start = self.scan
        self.index += 1
        repairs, self.repairs = self.repairs, ()
        if data.startswith(BOM) and not self.in_array:  # of files that were joined
            data, repairs = data[len(BOM) :], (("byte_order_mark", 1),)
        return Raw(place, data, size, self.in_array, repairs)

    def _spill(self, place: Place) -> int:
        """Put them into the record's file instead, and return their number."""
        data = self.buffer[self.start : self.scan]
        if (file := self._spool_file(place)) is not None:
            with open(file, "ab") as stream:
                stream.write(data)
        self.line += data.count(self.line_end)
        self.start = self.scan
        return len(data)

    def _spool_file(self, place: Place) -> Path | None:
        return self.spool.with_name(f"{self.spool.name}-{place.index}.long") if self.spool is not None else None

    def _to_line_end(self) -> bool:
        end = self.buffer.find(self.line_end, self.scan)
        self.scan = end if end >= 0 else len(self.buffer)
        return end >= 0

    def _to_value_end(self) -> bool:
        """Behind the bracket that ends an object."""
        while sign := self._to_sign():
            self.depth += STEPS.get(sign, 0)
            if self.depth <= 0:
                return True
        return False

    def _to_separator(self) -> bool:
        """To the comma behind an element, or the bracket that ends the array."""
        while sign := self._to_sign():
            if self.depth == 0 and sign in b",]}":
                if sign == b"}":
                    raise DataError(f"{self.path}:{self.line}: not valid JSON here: a brace that nothing opened")
                self.scan -= 1
                return True
            self.depth += STEPS.get(sign, 0)
        return False

    def _to_sign(self) -> bytes:
        """Behind the next bracket or comma that stands in no text; nothing: the buffer holds none."""
        while True:
            if self.in_string:
                self.scan = _STRING.match(self.buffer, self.scan).end()  # type: ignore[union-attr]
                if self.buffer[self.scan : self.scan + 1] != b'"':
                    return b""
                self.in_string = False
                self.scan += 1
            found = _STRUCTURE.search(self.buffer, self.scan)
            if found is None:
                self.scan = len(self.buffer)
                return b""
            self.scan = found.end()
            if found[0] != b'"':
                return found[0]
            self.in_string = True

    def _place(self) -> Place:
        return Place(str(self.path), self.line, self.index, self.offset + self.start)

    def _next(self) -> bytes:
        return self.buffer[self.start : self.start + 1]

    def _skip_blank(self) -> bool:
        """To the next byte that is no white space; False at the file's end."""
        while (found := _VISIBLE.search(self.buffer, self.start)) is None:
            self.line += self.buffer.count(self.line_end, self.start)
            self.start = len(self.buffer)
            if not self._more():
                return False
        self.line += self.buffer.count(self.line_end, self.start, found.start())
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
_OUTSIDE_TEXT = re.compile(rb'(?:[^"]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_MAC_LINE = re.compile(rb'(?:[^"\r\n]++|"(?:[^"\\]++|\\.)*+")++(?=\r[^\n])', re.DOTALL)  # ends in a bare return


def _is_outside_text(line: bytes) -> bool:
    return _OUTSIDE_TEXT.fullmatch(line) is not None


def _is_json(data: bytes) -> bool:
    try:
        parse(data)
    except Refused as refused:
        return refused.reason not in {"not_json", "invalid_utf8"}
    return True
