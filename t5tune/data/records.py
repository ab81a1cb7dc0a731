"""A record as it was read, the strict parsing of its JSON, and what is wrong with one that can't be used."""

import json
import math
from dataclasses import dataclass
from typing import Any

from t5tune.errors import DataError

INTEGERS = range(-(1 << 63), 1 << 64)
REASONS = {
    "not_json": "the line is no JSON",
    "invalid_utf8": "bytes that are no UTF-8",
    "too_long": "more bytes than max_record_bytes",
    "too_deep": "objects or lists inside each other beyond what a parser takes",
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
    "duplicate": "said before, word for word (dedupe)",
}


@dataclass(frozen=True)
class Place:
    """Where a record stands: line from 1, index and byte offset (in the unpacked file) from 0."""

    file: str
    line: int
    index: int
    offset: int


@dataclass(frozen=True)
class Raw:
    """A record as it was read: the bytes of its JSON, or the row of a table. `repairs` counts what was mended."""

    place: Place
    data: bytes | dict[str, Any]
    in_array: bool = False
    repairs: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A record that can't be used: the reason is one of REASONS, the message says what was found.

    `record` is what stood there: a JSON value, bytes that are none, or a file of them where they are many.
    """

    place: Place
    reason: str
    message: str
    record: Any


class Refused(Exception):
    """A record can't be used, for one of REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
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
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise Refused("too_deep", "objects or lists inside each other, too deep to read") from None
    except json.JSONDecodeError as error:
        raise Refused("not_json", f"not valid JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
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


# strict=False: a tab or a line end that stands in a text as it is is harmless; other control characters are refused
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float, strict=False
)
