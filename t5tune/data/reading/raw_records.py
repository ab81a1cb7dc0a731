"""Records as read from a file, and their conversion to conversations.

record = RawRecord(location, b'{"source": "Hi", "target": "Hello."}', size=36)
parse_record(record, ReadingSettings())
# Conversation(location, None, (Turn("human", "Hi"), Turn("assistant", "Hello.")))
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t5tune.data.reading.files import find_data_suffix
from t5tune.data.reading.formats import Conversation, parse_conversation
from t5tune.data.reading.labeled_records import parse_labeled
from t5tune.data.reading.rejections import (
    ESCAPED_UTF8_TEXT,
    UTF8_HINT,
    RecordLocation,
    Rejection,
    RejectionError,
    can_contain_forbidden,
    check_characters,
    parse_json,
    suggest_unwrapping_text,
)
from t5tune.data.reading.text_encoding import decode_record, is_escaped_utf8
from t5tune.data.reading.tool_calls import drop_null_arguments
from t5tune.errors import DataError
from t5tune.settings.groups.record_format import ReadingSettings

KEYED_RECORDS = "records_keyed_by_id"  # among the repairs: the number of records in JSON objects of records
MAX_KEPT_CHARACTERS = 1000  # of a record that is too long
MAX_KEPT_BYTES = 4 * MAX_KEPT_CHARACTERS  # at least MAX_KEPT_CHARACTERS of UTF-8


@dataclass(frozen=True)
class RawRecord:
    """A record as read from a file.

    Args:
        data: the bytes of its JSON, or a row of a table; of a record that is too long, only the beginning, as text.
        size: approximate size in bytes; 0 if the record is too long.
        is_enclosed: whether it is an element of a JSON array, or a value of a JSON object of records.
        has_filled_keys: whether its table (Parquet, Arrow) gives each object the keys of all other objects.
        repairs: (kind, count) of the reader's repairs.
        parsed: the record's conversation or its rejection; None: not parsed yet.
        has_doubtful_header: whether the header of its table looks like data.
    """

    location: RecordLocation
    data: bytes | str | dict[str, Any] | list[str]
    size: int
    is_enclosed: bool = False
    has_filled_keys: bool = False
    repairs: tuple[tuple[str, int], ...] = ()
    parsed: Conversation | Rejection | None = None
    has_doubtful_header: bool = False


def make_too_long_record(location: RecordLocation, beginning: bytes, size: int, max_bytes: int) -> RawRecord:
    """Make a rejected record from the first MAX_KEPT_BYTES bytes of a record longer than max_record_bytes."""
    text = decode_record(beginning[:MAX_KEPT_BYTES])[:MAX_KEPT_CHARACTERS]
    problem = f"{size:,} bytes, more than max_record_bytes {max_bytes:,}"
    rejection = Rejection("too_long", problem + suggest_unwrapping_text(text))
    return RawRecord(location, text, 0, parsed=rejection)


def parse_record(record: RawRecord, reading: ReadingSettings) -> Conversation | Rejection:
    """Convert a record to a conversation, or reject it; the reader's repairs are counted, too.

    Raises:
        DataError: a record of a JSON array or object is not valid JSON, so the start of the next record is unknown.
    """
    if record.parsed is not None:
        return record.parsed
    data, location, repairs = record.data, record.location, Counter(dict(record.repairs))
    try:
        value = parse_json(data) if isinstance(data, bytes) else data
        if location.key is not None and isinstance(value, dict):
            value = {"id": location.key, **value}
        if not isinstance(data, bytes) or location.key is not None or can_contain_forbidden(data):
            check_characters(value)
        if record.has_filled_keys:
            value = drop_null_arguments(value, repairs)
        parse = parse_labeled if reading.kind == "labels" else parse_conversation
        conversation = parse(value, location, reading)
    except RejectionError as error:
        reason = error.rejection.reason
        if record.is_enclosed and reason == "not_json":
            raise DataError(f"{location.file}:{location.line}: record {location.index}: {error}") from None
        # in a table, a lone surrogate represents an invalid byte
        if reason == "lone_surrogate" and not isinstance(data, bytes):
            where = re.sub(r"U\+DC([89A-F][0-9A-F])", r"the byte 0x\1", str(error))
            what = f"bytes that aren't valid in the file's encoding ({where})"
            if is_escaped_utf8("".join(map(str, data.values() if isinstance(data, dict) else data))):
                what = ESCAPED_UTF8_TEXT
            return Rejection("invalid_utf8", f"{what}; {UTF8_HINT}")
        is_text_table = find_data_suffix(Path(location.file)) in (".csv", ".tsv", ".xlsx")
        if reason != "unknown_format" or not is_text_table:
            return error.rejection
        if record.has_doubtful_header:
            advice = "the first line looks like data: add --no-header to read it as the first row"
            return Rejection(reason, f"{advice}; otherwise, {error}")
        # a suggested key shows that the first line has names
        if error.suggests_key or not reading.header:
            return error.rejection
        return Rejection(reason, f"{error}; the first line must name the columns; if it is data, add --no-header")
    if not repairs:
        return conversation
    return replace(conversation, repairs=Counter(conversation.repairs) + repairs)
