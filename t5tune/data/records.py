"""A record as it was read, the strict parsing of its JSON, and what is wrong with one that can't be used."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from t5tune.errors import DataError, one_line
from t5tune.io.reasons import json_reason

INTEGERS = range(-(1 << 63), 1 << 64)
MOST_DEPTH = 200  # of objects and lists inside each other; Python's own limit depends on who calls
LABELED_BAD = "labeled_bad"  # the one reason for which a record is left out by design, not because it is broken
REASONS = {
    "not_json": "the line is no JSON",
    "invalid_utf8": "bytes that are no UTF-8",
    "too_long": "more bytes than max_record_bytes",
    "too_deep": "more than 200 objects or lists inside each other",
    "duplicate_key": "an object with a key twice",
    "bad_number": "NaN, Infinity, or a number beyond 64 bits",
    "bad_row": "a row with more or fewer cells than the table's head",
    "not_an_object": "a record that is no object",
    "unknown_format": "none of the formats' keys, or not those of data_format",
    "bad_turn": "a turn without speaker or text",
    "unknown_role": "a speaker of no known role",
    "not_text": "something other than text where text belongs",
    "control_character": "a control character other than tab and line ends",
    "lone_surrogate": "half of a surrogate pair",
    "misplaced_system": "a system turn that isn't the first",
    "same_role_twice": "two turns of one side in a row",
    "no_answer": "no answer to learn from",
    "zero_weight": "every assistant turn has weight 0",
    LABELED_BAD: "an answer labeled bad (label: false, kto_tag: false), which supervised training doesn't learn",
    "duplicate": "said before, word for word (dedupe)",
}
STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
UNPARSED = {"not_json", "invalid_utf8", "too_deep", "duplicate_key", "bad_number"}  # reasons of `parse`


@dataclass(frozen=True)
class Place:
    """Where a record stands: line from 1, index and byte offset (in the unpacked file) from 0."""

    file: str
    line: int
    index: int
    offset: int


@dataclass(frozen=True)
class Raw:
    """A record as it was read: the bytes of its JSON, or the row of a table; `size` is about how many bytes it holds.

    `repairs` counts what was mended.
    """

    place: Place
    data: bytes | dict[str, Any]
    size: int
    in_array: bool = False
    repairs: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A record that can't be used: the reason is one of REASONS, the message says what was found.

    `record` is what stood there: bytes, a table's row or cells, or a file of bytes where they are many.
    """

    place: Place
    reason: str
    message: str
    record: Any
    size: int = 0


class Refused(Exception):
    """A record can't be used, for one of REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(one_line(message))
        self.reason = reason


def value_of(raw: Raw) -> Any:
    """The record's JSON value, or its row.

    Raises:
        Refused: it is no JSON, or holds what JSON readers disagree on.
        DataError: it is no JSON and stands in an array, where nobody can tell where the next one begins.
    """
    if not isinstance(raw.data, bytes):
        return raw.data
    try:
        return parse(raw.data)
    except Refused as refused:
        if raw.in_array and refused.reason == "not_json":
            place = raw.place
            raise DataError(f"{place.file}:{place.line}: record {place.index}: {refused}") from None
        raise


def parse(data: bytes) -> Any:
    """The value of a record's JSON, read strictly.

    Raises:
        Refused: it is no JSON, or holds what JSON readers disagree on.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Refused("invalid_utf8", f"byte {error.start} of the record is no UTF-8") from None
    if _is_too_deep(data):
        raise Refused("too_deep", f"more than {MOST_DEPTH} objects or lists inside each other")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise Refused("not_json", "not valid JSON: nothing stands where a value is expected") from None
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        where = f"{line}character {error.colno} of the record"
        raise Refused("not_json", f"not valid JSON: {json_reason(error)} at {where}") from None


def check_characters(value: Any, place: str = "the record") -> None:
    """Look at every text of a record, keys and what nothing uses included.

    Raises:
        Refused: a control character, or half of a surrogate pair, which is no character.
    """
    if isinstance(value, str):
        if found := _FORBIDDEN.search(value):
            reason = "control_character" if found[0] < " " else "lone_surrogate"
            raise Refused(reason, f"{place[:80]}: U+{ord(found[0]):04X} at character {found.start()}")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_characters(key, "a key")
            check_characters(item, key)
    elif isinstance(value, list):
        for item in value:
            check_characters(item, place)


def may_hold_forbidden(data: bytes) -> bool:
    """Whether the texts of a record's JSON may have what `check_characters` refuses; False is certain."""
    return bool(data.translate(None, _ALLOWED)) or _ESCAPED.search(data) is not None


def depths(data: bytes) -> Iterator[int]:
    """How many brackets are open behind each bracket of JSON: `[{}]` -> 1, 2, 1, 0."""
    brackets = _STRING.sub(b"", data).translate(None, _NO_BRACKETS)
    return accumulate(STEPS[brackets[place : place + 1]] for place in range(len(brackets)))


def _is_too_deep(data: bytes) -> bool:
    if data.count(b"[") + data.count(b"{") <= MOST_DEPTH:  # as nearly all are
        return False
    return any(depth > MOST_DEPTH for depth in depths(data))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Refused("duplicate_key", f"the key {twice!r} twice in one object")
    return value


def _constant(name: str) -> Any:
    raise Refused("bad_number", f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > 20 or int(digits) not in INTEGERS:
        raise Refused("bad_number", f"{digits[:24]}{'…' if len(digits) > 24 else ''} is beyond 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise Refused("bad_number", f"{digits[:24]} is beyond 64 bits")
    return float(digits)


_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
# the same in JSON: as \b or \f, as \u000b, as \ud83d (which may be half of a whole pair), or as it is
_ESCAPED = re.compile(rb"\\(?:[bf]|u(?:00[01]|[dD][89a-fA-F]))")
_ALLOWED = bytes({*b"\t\n\r", *range(32, 256)})
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# strict=False: a tab or a line end that stands in a text as it is is harmless; other control characters are refused
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float, strict=False
)
