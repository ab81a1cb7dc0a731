"""Read data files record by record, in bounded memory.

    for record in read_records([Path("chats.jsonl")], reading):
        parse_record(record, reading)

JSON arrays, objects of records (`{"id1": {…}, "id2": {…}}`), JSON lines and multi-line records are recognized by their
content, not by the file name. An array or an object is split into its records without reading it whole. Each record is
parsed separately, so a broken record affects no other record.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from t5tune.data.reading.files import BOM, STDIN, Digest, find_data_suffix, read_chunks
from t5tune.data.reading.raw_records import KEYED_RECORDS, MAX_KEPT_BYTES, RawRecord, make_too_long_record
from t5tune.data.reading.raw_text import read_text
from t5tune.data.reading.rejections import DEPTH_STEPS, RecordLocation, RejectionError, iterate_depths, parse_json
from t5tune.data.reading.tables import read_csv, read_line_pairs, read_parquet, read_workbook
from t5tune.data.reading.text_encoding import decode_record
from t5tune.errors import DataError
from t5tune.file_names import JSON_SUFFIXES, TEXT_SUFFIXES
from t5tune.settings.groups.record_format import ReadingSettings
from t5tune.settings.records_in_memory import is_stored_table

Form = Literal["array", "object", "lines", "values"]

MAX_KEY_BYTES = 1000  # of a record in an object of records
MIN_MEMBERS = 2  # of an object of records on a line that is longer than a record may be


def read_records(files: list[Path], reading: ReadingSettings, stdin: Digest | None = None) -> Iterator[RawRecord]:
    """Yield every record of the files, in order; `stdin` hashes standard input. DataError: a file is broken."""
    if reading.pair_lines:
        yield from read_line_pairs(files, reading)
        return
    for path in files:
        kind = find_data_suffix(path, is_text=True)
        if kind in JSON_SUFFIXES:
            chunks = read_chunks(path, reading.encoding, stdin if path == STDIN else None)
            yield from JsonReader(path, chunks, reading.max_record_bytes).iterate_records()
        elif kind in TEXT_SUFFIXES:
            yield from read_text(path, reading.encoding)
        elif kind == ".parquet":
            yield from read_parquet(path, reading)
        elif kind == ".xlsx":
            yield from read_workbook(path, reading)
        else:
            yield from read_csv(path, "\t" if kind == ".tsv" else None, reading)


class JsonReader:
    """Reads a JSON file: an array or an object of records, lines, or multi-line records.

    Keeps at most one record and one chunk in memory.
    """

    def __init__(self, path: Path, chunks: Iterator[bytes], max_bytes: int, offset: int = 0) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.chunks = chunks
        self.buffer = b""
        self.offset = offset  # of the buffer in the file
        self.start = 0  # in the buffer, of the data that isn't consumed yet
        self.scan = 0  # in the buffer, of the data that isn't scanned yet
        self.line = 1  # line number at `start`
        self.mac_line = 1  # line number if lines end in carriage returns, until the line end is known
        self.line_end = b"\n"
        self.index = 0
        self.depth = 0  # at `scan`, within the record
        self.in_string = False
        self.closing = b""  # the bracket that ends the array or the object of records; empty: neither
        self.repairs: tuple[tuple[str, int], ...] = ()
        self.has_filled_keys = is_stored_table(path)

    def iterate_records(self) -> Iterator[RawRecord]:
        """Yield the file's records."""
        form = self.detect_form()
        if form in ("array", "object"):
            yield from self._read_enclosed(b"]" if form == "array" else b"}")
        elif form == "lines":
            yield from self._iterate_lines()
        elif form == "values":
            while self._skip_blank():
                yield self._read_record(self._scan_to_value_end)

    def iterate_lines(self, line_end: bytes) -> Iterator[RawRecord]:
        """Yield the records of lines that begin at `offset`; they are all data of this reader."""
        self.line_end = line_end
        self._skip_byte_order_mark()
        yield from self._iterate_lines()

    def _iterate_lines(self) -> Iterator[RawRecord]:
        while self._skip_blank():
            if self.line > 1:
                self.repairs = ()  # a mark belongs to the first line, so that each line can be read alone
            yield self._read_record(self._scan_to_line_end)

    def detect_form(self) -> Form | None:
        """Skip to the first record, and detect the form of the file; None: no record."""
        self._skip_byte_order_mark()
        if not self._skip_blank():
            return None
        form = self._detect_form()
        if self.line_end == b"\r":
            self.line = self.mac_line
        return form

    def _skip_byte_order_mark(self) -> None:
        if self.offset > 0:
            return
        while len(self.buffer) < len(BOM) and self._read_more():
            pass
        if self.buffer.startswith(BOM):
            self.start = len(BOM)
            self.repairs = (("byte_order_mark", 1),)

    def _detect_form(self) -> Form:
        # from the first two lines that aren't blank; for an object whose first values are objects, from max_bytes of it
        while (lines := self._peek_lines()) is None and len(self.buffer) <= self.max_bytes and self._read_more():
            pass
        first, second = lines or (b"", b"")
        if self._peek_byte() == b"[":
            # lines: `[INFO] starting`, or one list per line; otherwise an array, which may continue on the next line
            is_closed = bool(second) and 0 in iterate_depths(first)
            return "lines" if is_closed and (not _is_json(first) or second.startswith(b"[")) else "array"
        if self._peek_byte() == b"{" and self._is_object_of_records(first, second):
            return "object"
        # an object that is open at the end of the line continues, unless the line was cut off and the next is complete
        is_open = self._peek_byte() == b"{" and bool(second) and 0 not in iterate_depths(first)
        return "values" if is_open and _OUTSIDE_TEXT.fullmatch(first) and not _is_json(second) else "lines"

    def _is_object_of_records(self, first: bytes, second: bytes) -> bool:
        """Whether all values of the object at `start` are objects in its first max_bytes, and nothing follows it.

        `first` and `second` are the file's first two lines, empty if they aren't in the buffer.
        """
        while True:
            beginning = self.buffer[self.start : self.start + self.max_bytes]
            seen = _scan_objects(beginning)
            if seen is None:
                return False
            is_closed, end, num_members = seen
            if is_closed and _VISIBLE.search(self.buffer, self.start + end) is not None:
                return False  # it is the first of several lines or values
            if len(beginning) == self.max_bytes or not self._read_more():
                # a line that is longer than a record may be can also be a record itself, which begins with an object
                is_long_line = len(beginning) == self.max_bytes and not 0 < len(first) < self.max_bytes
                is_object = num_members >= MIN_MEMBERS if is_long_line else _MEMBER.match(beginning, 1) is not None
                # complete lines may follow a line that was cut off
                return is_closed or (is_object and not _is_json(second))

    def _peek_lines(self) -> tuple[bytes, bytes] | None:
        """Return the line at `start` and the next one that isn't blank; None: the buffer doesn't contain them."""
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

    def _read_enclosed(self, closing: bytes) -> Iterator[RawRecord]:
        self.closing = closing
        self.start += 1
        ending = closing if self._skip_blank() and self._peek_byte() == closing else b","
        self.start += ending == closing
        while ending == b",":
            self._skip_blank()
            key = self._read_key() if closing == b"}" else None
            yield self._read_record(self._scan_to_separator, key)
            ending = self._peek_byte()
            self.start += 1
        if self._skip_blank():
            raise DataError(f"{self.path}:{self.line}: there is text after the end of {self._name_enclosure()}")

    def _name_enclosure(self) -> str:
        return "the array" if self.closing == b"]" else "the object"

    def _read_key(self) -> str:
        while (found := _KEY.match(self.buffer, self.start)) is None and len(self.buffer) - self.start <= MAX_KEY_BYTES:
            if not self._read_more():
                break
        key = None
        if found is not None and len(found[1]) <= MAX_KEY_BYTES:
            with suppress(json.JSONDecodeError):
                # bytes that aren't UTF-8 become lone surrogates, so the record is rejected
                key = str(json.loads(decode_record(found[1]), strict=False))
        if found is None or key is None:
            problem = f"{self.path}:{self.line}: record {self.index}: expected a key in double quotes, and a colon"
            hint = "the file is incomplete, not valid JSON, or a key is longer than 1,000 bytes"
            raise DataError(problem, hint=hint)
        self.line += self.buffer.count(self.line_end, self.start, found.end())
        self.start = found.end()
        self._skip_blank()
        return key

    def _read_record(self, find_end: Callable[[], bool], key: str | None = None) -> RawRecord:
        """Read the record at `start`; `find_end` scans for its end. If it is too long, only its beginning is kept."""
        location = RecordLocation(str(self.path), self.line, self.index, self.offset + self.start, key)
        repairs, self.repairs = self.repairs, ()
        self.scan, self.depth, self.in_string = self.start, 0, False
        beginning, size = b"", 0  # of the record's part that isn't in the buffer anymore
        while not find_end():
            if size + self.scan - self.start > self.max_bytes:
                skipped = self._consume()
                beginning += skipped[: MAX_KEPT_BYTES - len(beginning)]
                size += len(skipped)
            if not self._read_more():
                if self.closing:
                    hint = "the file is incomplete, or the record that begins there lacks a bracket or a quote"
                    raise DataError(f"{self.path}:{self.line}: {self._name_enclosure()} has no end", hint=hint)
                break
        data = self._consume()
        self.index += 1
        size += len(data)
        if size > self.max_bytes:
            return make_too_long_record(location, beginning + data[:MAX_KEPT_BYTES], size, self.max_bytes)
        data = data.strip()
        if data.startswith(BOM) and not self.closing:  # from concatenated files
            data, repairs = data[len(BOM) :], (("byte_order_mark", 1),)
        if key is not None:
            repairs += ((KEYED_RECORDS, 1),)
        return RawRecord(location, data, size, bool(self.closing), self.has_filled_keys, repairs)

    def _consume(self) -> bytes:
        data = self.buffer[self.start : self.scan]
        self.line += data.count(self.line_end)
        self.start = self.scan
        return data

    def _scan_to_line_end(self) -> bool:
        end = self.buffer.find(self.line_end, self.scan)
        self.scan = end if end >= 0 else len(self.buffer)
        return end >= 0

    def _scan_to_value_end(self) -> bool:
        # past the bracket that closes the object
        while mark := self._scan_to_punctuation():
            self.depth += DEPTH_STEPS.get(mark, 0)
            if self.depth <= 0:
                return True
        return False

    def _scan_to_separator(self) -> bool:
        # to the comma after a record, or to the closing bracket
        while mark := self._scan_to_punctuation():
            if self.depth == 0 and mark in b",]}":
                if mark not in (b",", self.closing):
                    bracket = "brace" if mark == b"}" else "bracket"
                    problem = f"not valid JSON here: a closing {bracket} without an opening one"
                    raise DataError(f"{self.path}:{self.line}: {problem}")
                self.scan -= 1
                return True
            self.depth += DEPTH_STEPS.get(mark, 0)
        return False

    def _scan_to_punctuation(self) -> bytes:
        """Scan past the next bracket or comma outside of strings, and return it; b"": the buffer has no such byte."""
        while True:
            if self.in_string:
                self.scan = _STRING_BODY.match(self.buffer, self.scan).end()  # type: ignore[union-attr]
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

    def _peek_byte(self) -> bytes:
        return self.buffer[self.start : self.start + 1]

    def _skip_blank(self) -> bool:
        while (found := _VISIBLE.search(self.buffer, self.start)) is None:
            self._count_blank_lines(len(self.buffer))
            self.start = len(self.buffer)
            if not self._read_more():
                return False
        self._count_blank_lines(found.start())
        self.start = found.start()
        return True

    def _count_blank_lines(self, end: int) -> None:
        self.line += self.buffer.count(self.line_end, self.start, end)
        if self.index == 0:
            self.mac_line += self.buffer.count(b"\r", self.start, end)

    def _read_more(self) -> bool:
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
_STRING_BODY = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_OUTSIDE_TEXT = re.compile(rb'(?:[^"]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_KEY = re.compile(rb'("(?:[^"\\]++|\\.)*+")[ \t\r\n]*+:', re.DOTALL)
# a key with an object as its value, and its rest if it is cut off at the end of the data
_MEMBER = re.compile(rb'[ \t\r\n]*+"(?:[^"\\]++|\\.)*+"[ \t\r\n]*+:[ \t\r\n]*+\{', re.DOTALL)
_CUT_MEMBER = re.compile(rb'[ \t\r\n]*+(?:"(?:[^"\\]++|\\.)*+(?:\\|"[ \t\r\n]*+(?::[ \t\r\n]*+)?)?)?\Z', re.DOTALL)
_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)  # a bracket or a string, which may be cut off
_AFTER_VALUE = re.compile(rb"[ \t\r\n]*+([,}]|\Z)")
# ends in a carriage return without a newline
_MAC_LINE = re.compile(rb'(?:[^"\r\n]++|"(?:[^"\\]++|\\.)*+")++(?=\r[^\n])', re.DOTALL)


def _scan_objects(data: bytes) -> tuple[bool, int, int] | None:
    """Scan an object while its values are objects; None: a value isn't an object.

    Return whether the object is complete, the end of the scanned part, and the number of complete members.
    """
    position = 1
    num_members = 0
    while (member := _MEMBER.match(data, position)) is not None:
        depth = 1
        for mark in _MARK.finditer(data, member.end()):
            depth += DEPTH_STEPS.get(mark[0], 0)
            if depth == 0:
                break
        else:
            return False, len(data), num_members
        num_members += 1
        after = _AFTER_VALUE.match(data, mark.end())
        if after is None:
            return None
        position = after.end()
        if after[1] != b",":
            return after[1] == b"}", position, num_members
    return (False, len(data), num_members) if _CUT_MEMBER.match(data, position) else None


def _is_json(data: bytes) -> bool:
    try:
        parse_json(data)
    except RejectionError as error:
        return error.rejection.reason not in {"not_json", "invalid_utf8"}
    return True
