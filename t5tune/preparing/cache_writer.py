"""Write encoded records to the files of a token cache, and count them for its manifest."""

import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from t5tune.data.caches.tables import CONVERSATION_DTYPE, EXAMPLE_DTYPE
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.rejections import UNPARSED_REASONS, RecordLocation, Rejection, parse_json
from t5tune.data.reading.text_encoding import decode_record
from t5tune.data.tokens.encoding import EncodedConversation, renumber_spans
from t5tune.errors import DataError
from t5tune.file_names import CONVERSATIONS_FILE, EXAMPLES_FILE, REJECTED_FILE, TOKENS_FILE
from t5tune.preparing.counts import RecordCounts
from t5tune.preparing.pipeline import EncodedRecord, read_key

MAX_TABLE_VALUE = np.iinfo(np.uint32).max  # in examples.bin


class CacheWriter:
    """Writes tokens.bin, conversations.bin, examples.bin and rejected.jsonl, and counts.

    Args:
        dtype: of the ids.
        rejects_duplicates: whether a conversation with the key of an earlier one is rejected.
        label_names: the classes if they are known; further classes get the next numbers.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype[Any], rejects_duplicates: bool, label_names: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.counts = RecordCounts()
        self.counts.number_labels(label_names)
        self.num_tokens = 0
        self.num_parts = 0  # conversations in the cache, where a split one counts several times
        self.rejected_bytes = 0  # of rejected.jsonl
        self._seen = SeenKeys() if rejects_duplicates else None
        self._tokens = open(folder / TOKENS_FILE, "wb")  # noqa: SIM115 (closed by __exit__)
        self._conversations = open(folder / CONVERSATIONS_FILE, "wb")  # noqa: SIM115
        self._examples = open(folder / EXAMPLES_FILE, "wb")  # noqa: SIM115
        self._rejected = open(folder / REJECTED_FILE, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._tokens, self._conversations, self._examples, self._rejected, self._seen):
            if file is not None:
                file.close()

    def add(self, record: RawRecord, encoded: EncodedRecord) -> None:
        """Append a record."""
        counts = self.counts
        counts.num_records += 1
        rejection = encoded.rejection
        counts.usable[record.location.file] += rejection is None
        if rejection is None and self._seen is not None:
            first = self._seen.find_or_add(encoded.key, str(record.location))
            if first is not None:
                rejection = make_duplicate_rejection(first)
        if rejection is not None:
            counts.add_rejection(record.location, rejection)
            self.rejected_bytes += self._rejected.write(format_rejected(record.location, rejection, record.data))
            return
        counts.conversations += 1
        counts.with_prefix += encoded.has_prefix
        counts.pairs += encoded.is_pair
        counts.unknown_tokens += encoded.unknown
        counts.with_unknown_tokens += encoded.unknown > 0
        counts.add_repairs(encoded.repairs)
        counts.dropped.update(encoded.dropped)
        counts.lost.add(encoded.lost)
        for part in encoded.parts:
            self._append(self._number_labels(part, encoded.label_names), encoded.key)
        counts.repaired.update({"split_conversations": 1} if len(encoded.parts) > 1 else {})

    def finish(self, num_data: int | None) -> None:
        """Keep the first `num_data` examples, and write their buffered data."""
        if num_data is not None and num_data < self.counts.num_examples:
            self._examples.truncate(num_data * EXAMPLE_DTYPE.itemsize)
            self.counts.num_examples = num_data
        self._examples.flush()

    def _number_labels(self, encoded: EncodedConversation, names: tuple[str, ...]) -> EncodedConversation:
        """Replace the record's class numbers by the cache's."""
        return renumber_spans(encoded, self.counts.number_labels(names)) if names else encoded

    def _append(self, encoded: EncodedConversation, key: bytes) -> None:
        rows = [(self.num_parts, *span) for span in encoded.spans]
        if any(max(row) > MAX_TABLE_VALUE for row in rows):
            raise make_too_much_data_error()
        self._examples.write(np.array(rows, EXAMPLE_DTYPE).tobytes())
        start = self.num_tokens, read_key(key)
        self._conversations.write(np.array(start, CONVERSATION_DTYPE).tobytes())
        self._tokens.write(np.asarray(encoded.ids, self.dtype).tobytes())
        self.counts.num_examples += len(rows)
        self.num_parts += 1
        self.num_tokens += len(encoded.ids)


def make_duplicate_rejection(first: str) -> Rejection:
    """Make the rejection of a conversation with the texts of an earlier one, whose location is `first`."""
    return Rejection("duplicate", f"the same texts as {first}")


def make_too_much_data_error() -> DataError:
    """Make the error for a number that doesn't fit in examples.bin."""
    limit = f"{MAX_TABLE_VALUE:,} conversations and {MAX_TABLE_VALUE:,} tokens in a conversation"
    return DataError(f"more data than a token cache can contain: {limit}")


def format_rejected(location: RecordLocation, rejection: Rejection, data: Any) -> str:
    """Format the line of a rejected record in rejected.jsonl, which is ASCII."""
    facts = {**vars(location), **rejection._asdict()}
    if location.key is None:
        del facts["key"]
    return f'{json.dumps(facts)[:-1]}, "record": {_to_json(data, rejection.reason)}}}\n'


class SeenKeys:
    """A database with the keys of the conversations so far, in a temporary file that SQLite deletes."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN")
        self._database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, place BLOB) WITHOUT ROWID")

    def find_or_add(self, key: bytes, place: str) -> str | None:
        """Return the place where the key was first seen; if it is new, add it and return None."""
        done = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, os.fsencode(place)))
        if done.rowcount:
            return None
        return os.fsdecode(self._database.execute("SELECT place FROM seen WHERE key = ?", (key,)).fetchone()[0])

    def close(self) -> None:
        self._database.close()


def _to_json(data: Any, reason: str) -> str:
    """Return a record as JSON: its value, or its text if unparsable; bytes that aren't UTF-8 become lone surrogates."""
    if not isinstance(data, bytes):  # a table row; NaN is not JSON, and dates become text
        return json.dumps(json.loads(json.dumps(data, default=str), parse_constant=str))
    return json.dumps(decode_record(data) if reason in UNPARSED_REASONS else parse_json(data))
