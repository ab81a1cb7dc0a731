"""Write the outcomes of records to the files of a token cache, and count them for its manifest."""

import codecs
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from t5tune.data.cache import CONVERSATION_COLUMNS, EXAMPLE_COLUMNS, compute_lengths, compute_percentiles
from t5tune.data.encoding import EncodedConversation, choose_ids_dtype
from t5tune.data.integer_table import WIDE_DTYPE, write_narrow_table
from t5tune.data.pipeline import AcceptedRecord, Outcome, Record
from t5tune.data.records import LABELED_BAD, UNPARSED_REASONS, RawRecord, RejectedRecord, parse_json
from t5tune.data.vocabulary import LostCharacterCounts
from t5tune.io.atomic import CHUNK_BYTES

REJECTED_FILE = "rejected.jsonl"
FIRST_ANSWER_TURN = 1  # index among the turns; turn 0 is the human's
MAX_REPAIR_KINDS = 100  # kinds of repairs that are counted by name; a kind may contain any field name of the data


class CacheWriter:
    """Writes tokens.bin, conversations.bin, examples.bin and rejected.jsonl, and counts.

    Args:
        num_rows: rows of the base's embedding; determines the width of an id.
        seen: folder for a database of the conversations so far, to reject duplicates; None keeps duplicates.
    """

    def __init__(self, folder: Path, num_rows: int, seen: Path | None) -> None:
        self.folder = folder
        self.dtype = choose_ids_dtype(num_rows)
        self.num_records = 0
        self.num_examples = 0
        self.conversations = 0
        self.with_prefix = 0  # conversations whose source has source_prefix
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
        self._seen = _SeenKeys(seen / "seen.sqlite") if seen is not None else None
        self._tokens = open(folder / "tokens.bin", "wb")  # noqa: SIM115 (closed by __exit__)
        self._conversations = open(folder / "conversations.wide", "wb")  # noqa: SIM115
        self._examples = open(folder / "examples.wide", "wb")  # noqa: SIM115
        self._rejected = open(folder / REJECTED_FILE, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._tokens, self._conversations, self._examples, self._rejected):
            file.close()
        if self._seen is not None:
            self._seen.close()

    def add(self, record: Record, outcome: Outcome) -> None:
        """Append the outcome of one record."""
        self.num_records += 1
        self.usable[outcome.location.file] += isinstance(outcome, AcceptedRecord)
        if isinstance(outcome, AcceptedRecord) and self._seen is not None:
            location = outcome.location
            if first := self._seen.find_or_add(outcome.key, f"{location.file}:{location.line}"):
                assert isinstance(record, RawRecord)
                outcome = RejectedRecord(location, "duplicate", f"the same texts as {first}", record.data)
        if isinstance(outcome, RejectedRecord):
            self._reject(outcome)
            return
        self.conversations += 1
        self.with_prefix += outcome.has_prefix
        self.unknown_tokens += outcome.unknown
        self._count_repairs(outcome.repairs)
        self.dropped.update(outcome.dropped)
        self.lost.add(outcome.lost)
        for part in outcome.encoded:
            self._append(part, outcome.key)
        self.repaired.update({"split_conversations": 1} if len(outcome.encoded) > 1 else {})

    def finish(self, num_data: int | None) -> dict[str, Any]:
        """Keep the first `num_data` examples, write the tables, and return the counts for the manifest."""
        if num_data is not None and num_data < self.num_examples:
            self._examples.truncate(num_data * len(EXAMPLE_COLUMNS) * WIDE_DTYPE.itemsize)
            self.num_examples = num_data
        self._examples.flush()
        self._conversations.flush()
        counts = {
            "dtype": self.dtype.str,
            "conversations": self.conversations,
            "rejected": self.rejected.total(),
            "rejected_by_reason": dict(sorted(self.rejected.items())),
            "repaired": dict(sorted(self.repaired.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "examples": self.num_examples,
            "unknown_tokens": self.unknown_tokens,
        }
        return counts | self._write_tables()

    def _count_repairs(self, repairs: Mapping[str, int]) -> None:
        for kind, count in repairs.items():
            is_known = kind in self.repaired or len(self.repaired) < MAX_REPAIR_KINDS or not kind.startswith("ignored_")
            self.repaired[kind if is_known else "ignored_fields_of_other_names"] += count

    def _write_tables(self) -> dict[str, Any]:
        """Write conversations.bin and examples.bin; return their columns, token counts and length percentiles."""
        lengths: dict[str, Counter[int]] = {"source": Counter(), "target": Counter()}
        cut = Counter[str]()
        with_earlier_turns = 0

        def count_rows(rows: npt.NDArray[Any]) -> None:
            nonlocal with_earlier_turns
            columns = dict(zip(EXAMPLE_COLUMNS, rows.T.astype(np.int64), strict=True))
            with_earlier_turns += int((columns["turn"] > FIRST_ANSWER_TURN).sum())
            for side, found in zip(lengths, compute_lengths(columns.__getitem__), strict=True):
                lengths[side].update(found.tolist())
                cut[side] += int((columns[f"{side}_is_whole"] == 0).sum())

        wide = self.folder / "conversations.wide", self.folder / "examples.wide"
        measured: dict[str, Any] = {
            "conversation_columns": write_narrow_table(
                wide[0], self.folder / "conversations.bin", CONVERSATION_COLUMNS
            ),
            "example_columns": write_narrow_table(wide[1], self.folder / "examples.bin", EXAMPLE_COLUMNS, count_rows),
        }
        measured["examples_with_earlier_turns"] = with_earlier_turns
        for side, counted in lengths.items():
            measured[f"{side}_tokens"] = sum(length * count for length, count in counted.items())
            measured[f"truncated_{side}s"] = cut[side]
            measured[f"{side}_length"] = compute_percentiles(counted)
        return measured

    def _append(self, encoded: EncodedConversation, key: bytes) -> None:
        rows = np.array([(self._num_parts, *span) for span in encoded.spans], WIDE_DTYPE)
        self._examples.write(rows.tobytes())
        self._conversations.write(np.array([self._num_tokens, int.from_bytes(key[:8], "little")], WIDE_DTYPE).tobytes())
        self._tokens.write(np.asarray(encoded.ids, self.dtype).tobytes())
        self.num_examples += len(rows)
        self._num_parts += 1
        self._num_tokens += len(encoded.ids)

    def _reject(self, rejected: RejectedRecord) -> None:
        location = rejected.location
        self.rejected[rejected.reason] += 1
        if rejected.reason == LABELED_BAD:
            self.labeled_bad[location.file] += 1
        else:
            self.first_rejected.setdefault(location.file, f"{location.file}:{location.line}: {rejected.message}")
        facts = {**vars(location), "reason": rejected.reason, "message": rejected.message}
        self._rejected.write(json.dumps(facts)[:-1] + ', "record": ')
        if isinstance(rejected.record, Path):
            _copy_as_json(rejected.record, self._rejected)
            rejected.record.unlink()
        else:
            self._rejected.write(_to_json(rejected.record, rejected.reason))
        self._rejected.write("}\n")


class _SeenKeys:
    """A database on disk with the keys of the conversations so far."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
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


def _to_json(record: Any, reason: str) -> str:
    """Return a record as JSON: its value, or its text if unparsable; bytes that aren't UTF-8 become lone surrogates."""
    if not isinstance(record, bytes):  # a table row; NaN is not JSON, and dates become text
        return json.dumps(json.loads(json.dumps(record, default=str), parse_constant=str))
    return json.dumps(record.decode(errors="surrogateescape") if reason in UNPARSED_REASONS else parse_json(record))


def _copy_as_json(path: Path, file: IO[str]) -> None:
    """Copy a file's bytes as one JSON string; bytes that are not UTF-8 become lone surrogates (surrogateescape)."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    file.write('"')
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            file.write(json.dumps(decoder.decode(chunk))[1:-1])
    file.write(json.dumps(decoder.decode(b"", final=True))[1:-1] + '"')
