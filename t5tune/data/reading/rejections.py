"""Where a record is, the reasons to reject one, strict parsing of JSON, and hints for an object of records."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from t5tune.data.reading.text_encoding import decode_record, is_escaped_utf8
from t5tune.errors import make_printable
from t5tune.formatting import shorten
from t5tune.io.reasons import describe_json_error

INTEGER_RANGE = range(-(1 << 63), 1 << 64)
MAX_JSON_DEPTH = 200  # nesting of objects and lists; Python's own recursion limit depends on the caller's depth
LABELED_BAD = "labeled_bad"
LEFT_OUT_REASONS = {LABELED_BAD, "zero_weight", "no_label", "duplicate"}
"""Reasons that leave out a record on purpose, not because it is broken; max_rejected_fraction doesn't count these."""
REJECTION_REASONS = {
    "not_json": "the line is not valid JSON",
    "invalid_utf8": "bytes that aren't valid in the file's encoding",
    "too_long": "more bytes than max_record_bytes",
    "too_deep": "more than 200 nested objects or lists",
    "duplicate_key": "an object with a duplicate key",
    "bad_number": "NaN, Infinity, or a number that does not fit in 64 bits",
    "bad_row": "a row with more or fewer cells than the table's header",
    "bad_cell": "a formula without a stored value, or an error such as #N/A",
    "not_an_object": "a record that is not a JSON object",
    "unknown_format": "keys that don't match data_format or any known format",
    "bad_turn": "a turn without a role or a text",
    "unknown_role": "a turn with an unknown role",
    "not_text": "a value that should be text but is not",
    "control_character": "a control character other than tab and line ends",
    "lone_surrogate": "half of a surrogate pair",
    "misplaced_system": "a system turn that is not the first turn",
    "same_role_twice": "two consecutive turns of the same role",
    "no_source": "a source/target pair whose source is empty",
    "no_answer": "no answer to learn",
    "zero_weight": "every assistant turn has weight 0",
    "no_preference": "a chosen or a rejected answer is missing, or both are the same",
    "other_question": "a chosen and a rejected answer to different questions",
    LABELED_BAD: "an answer labeled bad (label: false, kto_tag: false), which supervised training doesn't learn",
    "no_label": "no label to learn: null, empty, -100, or a mask of zeros",
    "bad_label": "a value that isn't a label, a number or a mask, or a list in place of a label, or the reverse",
    "label_count": "more or fewer labels than words",
    "unknown_label": "a label that isn't among the given or the trained labels",
    "unaligned_word": "a word that begins inside a token of the text before it, so no token can have its label",
    "long_word": "more than 100,000 characters that the tokenizer can't divide",
    "duplicate": "the same texts as an earlier conversation, and the same learned turns (dedupe)",
}
UTF8_HINT = "save the file as UTF-8, or name the right encoding with --encoding"
ESCAPED_UTF8_TEXT = "UTF-8 in a file with a different encoding"
# keys of records whose values are lists of turns, calls or tools
LIST_KEYS = {"conversations", "messages", "prompt", "completion", "chosen", "rejected", "tools", "tool_calls", "images"}
DEPTH_STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
UNPARSED_REASONS = {"not_json", "invalid_utf8", "too_deep", "duplicate_key", "bad_number"}  # reasons of `parse_json`


class BadCell(str):
    """The problem of a workbook's cell, in place of its text: a record that uses the cell is rejected."""


@dataclass(frozen=True)
class RecordLocation:
    """A record's line, from 1, its index and byte offset (decompressed), from 0, and its key if it has one."""

    file: str
    line: int
    index: int
    offset: int
    key: str | None = None

    def __str__(self) -> str:
        """The file, the line and the key, for messages."""
        return f"{self.file}:{self.line}" + (f": {shorten(repr(self.key), 60)}" if self.key is not None else "")


class Rejection(NamedTuple):
    """Why a record can't be used: `reason` is one of REJECTION_REASONS, `message` has the details."""

    reason: str
    message: str


class RejectionError(Exception):
    """Raised for a record that can't be used. `suggests_key`: the message suggests one of the record's keys."""

    def __init__(self, reason: str, message: str, suggests_key: bool = False) -> None:
        self.suggests_key = suggests_key
        self.rejection = Rejection(reason, make_printable(message))
        super().__init__(self.rejection.message)


def parse_json(data: bytes) -> Any:
    """Parse JSON strictly: RejectionError for data that is not valid, or that JSON parsers read differently."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise RejectionError("invalid_utf8", f"{_describe_invalid(decode_record(data))}; {UTF8_HINT}") from None
    # nearly all records have few brackets, so their depth needn't be checked
    has_many_brackets = data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH
    if has_many_brackets and any(depth > MAX_JSON_DEPTH for depth in iterate_depths(data)):
        raise RejectionError("too_deep", f"more than {MAX_JSON_DEPTH} nested objects or lists")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise RejectionError("not_json", "not valid JSON: expected a value, found nothing") from None
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        where = f"{line}character {error.colno} of the record"
        raise RejectionError("not_json", f"not valid JSON: {describe_json_error(error)} at {where}") from None


def _describe_invalid(text: str) -> str:
    if is_escaped_utf8(text):
        return ESCAPED_UTF8_TEXT
    found = _SURROGATE.search(text)
    assert found is not None
    what = f"the byte 0x{ord(found[0]) - 0xDC00:02X}" if found[0] >= "\udc80" else f"U+{ord(found[0]):04X}"
    return f"{what} at character {found.start()} of the record isn't valid in the file's encoding"


def check_characters(value: Any, where: str = "the record") -> None:
    """Reject a control character or half of a surrogate pair in any text of a record, also in keys."""
    if isinstance(value, str):
        if found := _FORBIDDEN.search(value):
            reason = "control_character" if found[0] < " " else "lone_surrogate"
            raise RejectionError(reason, f"{shorten(where, 80)}: U+{ord(found[0]):04X} at character {found.start()}")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_characters(key, "a key")
            check_characters(item, key)
    elif isinstance(value, list):
        for item in value:
            check_characters(item, where)


def can_contain_forbidden(data: bytes) -> bool:
    """Return whether `check_characters` may reject a record's JSON; False is certain, True is not."""
    return bool(data.translate(None, _ALLOWED)) or _ESCAPED.search(data) is not None


def suggest_unwrapping(value: dict[str, Any]) -> str:
    """Return how to read an object that contains records, such as `{"version": 1, "data": [{…}, {…}]}`.

    It is the end of a message; empty: the object contains no records.
    """
    for key, item in value.items():
        if key not in LIST_KEYS and isinstance(item, list) and item and all(isinstance(each, dict) for each in item):
            return _suggest_list(key)
    count = sum(isinstance(item, dict) for item in value.values())
    if count < 2:
        return ""
    command = "jq 'with_entries(select(.value | type == \"object\"))' IN.json > OUT.json"
    return f"; {count} of its {len(value)} values are objects; if these are the records, remove the rest: {command}"


def suggest_unwrapping_text(beginning: str) -> str:
    """Do what `suggest_unwrapping` does for an object whose beginning is known."""
    found = _LIST_OF_OBJECTS.search(beginning)
    return "" if found is None or found[1] in LIST_KEYS else _suggest_list(found[1])


def _suggest_list(key: str) -> str:
    command = f"jq '.[{json.dumps(key[:40])}]' IN.json > OUT.json"
    return f"; if the list {key[:40]!r} has the records, give it as a separate file: {command}"


def iterate_depths(data: bytes) -> Iterator[int]:
    """Yield the nesting depth after each bracket of JSON: `[{}]` -> 1, 2, 1, 0."""
    brackets = _JSON_STRING.sub(b"", data).translate(None, _NO_BRACKETS)
    return accumulate(DEPTH_STEPS[brackets[index : index + 1]] for index in range(len(brackets)))


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RejectionError("duplicate_key", f"duplicate key {twice!r} in an object")
    return value


def _parse_constant(name: str) -> Any:
    raise RejectionError("bad_number", f"{name} is not a JSON number")


def _parse_integer(digits: str) -> int:
    if len(digits) > 20 or int(digits) not in INTEGER_RANGE:
        raise RejectionError("bad_number", f"{shorten(digits, 24)} does not fit in 64 bits")
    return int(digits)


def _parse_float(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise RejectionError("bad_number", f"{shorten(digits, 24)} does not fit in 64 bits")
    return float(digits)


_SURROGATE = re.compile("[\ud800-\udfff]")
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
# the same characters escaped in JSON: \b, \f, \u000b, or \ud83d (which may be half of a complete pair)
_ESCAPED = re.compile(rb"\\(?:[bf]|u(?:00[01]|[dD][89a-fA-F]))")
_ALLOWED = bytes({*b"\t\n\r", *range(32, 256)})
_LIST_OF_OBJECTS = re.compile(r'"([\w -]{1,40})"\s*:\s*\[\s*\{')
_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# strict=False: an unescaped tab or line end in a string is harmless; `check_characters` rejects the rest
_DECODER = json.JSONDecoder(
    object_pairs_hook=_parse_object,
    parse_constant=_parse_constant,
    parse_int=_parse_integer,
    parse_float=_parse_float,
    strict=False,
)
