"""Write encoded records to the files of a token cache, and count them for its manifest."""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.data.cache import CONVERSATION_DTYPE, EXAMPLE_DTYPE, compute_lengths, compute_percentiles
from t5tune.data.encoders import choose_ids_dtype
from t5tune.data.encoding import EncodedConversation
from t5tune.data.pipeline import EncodedRecord
from t5tune.data.raw_records import RawRecord
from t5tune.data.records import LABELED_BAD, UNPARSED_REASONS, Rejection, parse_json
from t5tune.data.vocabulary import LostCharacterCounts
from t5tune.errors import DataError

REJECTED_FILE = "rejected.jsonl"
FIRST_ANSWER_TURN = 1  # index among the turns; turn 0 is the human's
MAX_TABLE_VALUE = np.iinfo(np.uint32).max  # in examples.bin
ROWS_PER_CHUNK = 1 << 14  # rows of examples.bin that are read at once
OTHER_FIELDS = "ignored_fields_of_other_names"  # counts the repairs of further kinds
MAX_REPAIR_KINDS = 100  # kinds of repairs that are counted by name; a kind may contain any field name of the data


class CacheWriter:
    """Writes tokens.bin, conversations.bin, examples.bin and rejected.jsonl, and counts.

    Args:
        num_rows: rows of the base's embedding; determines the width of an id.
        rejects_duplicates: whether a conversation with the same texts as an earlier one is rejected.
    """

    def __init__(self, folder: Path, num_rows: int, rejects_duplicates: bool) -> None:
        self.folder = folder
        self.dtype = choose_ids_dtype(num_rows)
        self.num_records = 0
        self.num_examples = 0
        self.conversations = 0
        self.with_prefix = 0  # conversations whose source has source_prefix
        self.pairs = 0  # conversations that are pairs of texts in the data
        self.usable = Counter[str]()  # usable records by file, including duplicates
        self.unknown_tokens = 0
        self.rejected = Counter[str]()
        self.first_rejected: dict[str, str] = {}  # file -> location and message, without records that are labeled bad
        self.labeled_bad = Counter[str]()  # records by file
        self.repaired = Counter[str]()
        self.dropped = Counter[str]()
        self.lost = LostCharacterCounts()
        self._num_tokens = 0
        self._num_parts = 0  # conversations in the cache, where a split one counts several times
        self._seen = _SeenKeys() if rejects_duplicates else None
        self._tokens = open(folder / "tokens.bin", "wb")  # noqa: SIM115 (closed by __exit__)
        self._conversations = open(folder / "conversations.bin", "wb")  # noqa: SIM115
        self._examples = open(folder / "examples.bin", "wb")  # noqa: SIM115
        self._rejected = open(folder / REJECTED_FILE, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._tokens, self._conversations, self._examples, self._rejected, self._seen):
            if file is not None:
                file.close()

    def add(self, record: RawRecord, encoded: EncodedRecord) -> None:
        """Append a record."""
        self.num_records += 1
        rejection = encoded.rejection
        self.usable[record.location.file] += rejection is None
        if rejection is None and self._seen is not None:
            first = self._seen.find_or_add(encoded.key, str(record.location))
            if first is not None:
                rejection = Rejection("duplicate", f"the same texts as {first}")
        if rejection is not None:
            self._reject(record, rejection)
            return
        self.conversations += 1
        self.with_prefix += encoded.has_prefix
        self.pairs += encoded.is_pair
        self.unknown_tokens += encoded.unknown
        self._count_repairs(encoded.repairs)
        self.dropped.update(encoded.dropped)
        self.lost.add(encoded.lost)
        for part in encoded.parts:
            self._append(part, encoded.key)
        self.repaired.update({"split_conversations": 1} if len(encoded.parts) > 1 else {})

    def finish(self, num_data: int | None) -> dict[str, Any]:
        """Keep the first `num_data` examples, and return the counts for the manifest."""
        if num_data is not None and num_data < self.num_examples:
            self._examples.truncate(num_data * EXAMPLE_DTYPE.itemsize)
            self.num_examples = num_data
        self._examples.flush()
        return {
            "dtype": self.dtype.str,
            "conversations": self.conversations,
            "rejected": self.rejected.total(),
            "rejected_by_reason": dict(sorted(self.rejected.items())),
            "repaired": dict(sorted(self.repaired.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "examples": self.num_examples,
            "unknown_tokens": self.unknown_tokens,
            **_measure_examples(self.folder / "examples.bin"),
        }

    def _count_repairs(self, repairs: Mapping[str, int]) -> None:
        for kind, count in repairs.items():
            is_known = kind in self.repaired or len(self.repaired) < MAX_REPAIR_KINDS or not kind.startswith("ignored_")
            self.repaired[kind if is_known else OTHER_FIELDS] += count

    def _append(self, encoded: EncodedConversation, key: bytes) -> None:
        rows = [(self._num_parts, *span) for span in encoded.spans]
        if any(max(row) > MAX_TABLE_VALUE for row in rows):
            limit = f"{MAX_TABLE_VALUE:,} conversations and {MAX_TABLE_VALUE:,} tokens in a conversation"
            raise DataError(f"more data than a token cache can contain: {limit}")
        self._examples.write(np.array(rows, EXAMPLE_DTYPE).tobytes())
        start = self._num_tokens, int.from_bytes(key[:8], "little")
        self._conversations.write(np.array(start, CONVERSATION_DTYPE).tobytes())
        self._tokens.write(np.asarray(encoded.ids, self.dtype).tobytes())
        self.num_examples += len(rows)
        self._num_parts += 1
        self._num_tokens += len(encoded.ids)

    def _reject(self, record: RawRecord, rejection: Rejection) -> None:
        location = record.location
        self.rejected[rejection.reason] += 1
        if rejection.reason == LABELED_BAD:
            self.labeled_bad[location.file] += 1
        else:
            self.first_rejected.setdefault(location.file, f"{location}: {rejection.message}")
        facts = {**vars(location), **rejection._asdict()}
        if location.key is None:
            del facts["key"]
        self._rejected.write(f'{json.dumps(facts)[:-1]}, "record": {_to_json(record.data, rejection.reason)}}}\n')


def _measure_examples(path: Path) -> dict[str, Any]:
    """Measure the examples of an examples.bin: token counts, truncated sides and length percentiles."""
    lengths: dict[str, Counter[int]] = {"source": Counter(), "target": Counter()}
    truncated = Counter[str]()
    with_earlier_turns = 0
    with open(path, "rb") as file:
        while len(rows := np.fromfile(file, EXAMPLE_DTYPE, ROWS_PER_CHUNK)):
            with_earlier_turns += int((rows["turn"] > FIRST_ANSWER_TURN).sum())
            for side, of_side in zip(lengths, compute_lengths(lambda name: rows[name].astype(np.int64)), strict=True):
                lengths[side].update(of_side.tolist())
                truncated[side] += int((~rows[f"{side}_is_whole"]).sum())
    measured: dict[str, Any] = {"examples_with_earlier_turns": with_earlier_turns}
    for side, counted in lengths.items():
        measured[f"{side}_tokens"] = sum(length * count for length, count in counted.items())
        measured[f"truncated_{side}s"] = truncated[side]
        measured[f"{side}_length"] = compute_percentiles(counted)
    return measured


class _SeenKeys:
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
    return json.dumps(data.decode(errors="surrogateescape") if reason in UNPARSED_REASONS else parse_json(data))
