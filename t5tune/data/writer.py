"""Outcomes of records -> the files of a token cache, one after the other, and the counts of its manifest."""

import codecs
import json
import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from t5tune.data.cache import CONVERSATION, EXAMPLE, lengths_of, percentiles
from t5tune.data.encoding import Encoded, ids_dtype
from t5tune.data.integer_table import WIDE, narrow
from t5tune.data.pipeline import Accepted, Outcome, Record
from t5tune.data.records import LABELED_BAD, UNPARSED, Raw, Rejected, parse
from t5tune.data.vocabulary import Lost
from t5tune.io.atomic import CHUNK

REJECTED = "rejected.jsonl"
FIRST_ANSWER = 1  # among a conversation's turns: a question is the first
MOST_KINDS = 100  # of repairs that are counted by name: a field's name may be anything


class Writer:
    """Writes tokens.bin, examples.bin and rejected.jsonl, and counts.

    Args:
        num_rows: of the base's embedding; decides the width of an id.
        seen: folder for the table of what was read, where conversations that come again are to be refused.
    """

    def __init__(self, folder: Path, num_rows: int, seen: Path | None) -> None:
        self.folder = folder
        self.dtype = ids_dtype(num_rows)
        self.num_records = 0
        self.num_examples = 0
        self.conversations = 0
        self.with_prefix = 0  # conversations whose question got source_prefix
        self.usable = Counter[str]()  # records by file, those that came again included
        self.unknown_tokens = 0
        self.rejected = Counter[str]()
        self.first_rejected: dict[str, str] = {}  # file -> place and message, of those that aren't labeled bad
        self.labeled_bad = Counter[str]()  # records by file
        self.repaired = Counter[str]()
        self.dropped = Counter[str]()
        self.lost = Lost()
        self._num_tokens = 0
        self._num_parts = 0  # conversations as they stand in the cache: some were split
        self._seen = _Seen(seen / "seen.sqlite") if seen is not None else None
        self._tokens = open(folder / "tokens.bin", "wb")  # noqa: SIM115 (closed by __exit__)
        self._conversations = open(folder / "conversations.wide", "wb")  # noqa: SIM115
        self._examples = open(folder / "examples.wide", "wb")  # noqa: SIM115
        self._rejected = open(folder / REJECTED, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._tokens, self._conversations, self._examples, self._rejected):
            file.close()
        if self._seen is not None:
            self._seen.close()

    def add(self, record: Record, outcome: Outcome) -> None:
        """Append what came of one record."""
        self.num_records += 1
        self.usable[outcome.place.file] += isinstance(outcome, Accepted)
        if isinstance(outcome, Accepted) and self._seen is not None:
            place = outcome.place
            if first := self._seen.first(outcome.key, f"{place.file}:{place.line}"):
                assert isinstance(record, Raw)
                outcome = Rejected(place, "duplicate", f"the same words as {first}", record.data)
        if isinstance(outcome, Rejected):
            self._reject(outcome)
            return
        self.conversations += 1
        self.with_prefix += outcome.has_prefix
        self.unknown_tokens += outcome.unknown
        for kind, count in outcome.repairs.items():
            is_known = kind in self.repaired or len(self.repaired) < MOST_KINDS or not kind.startswith("ignored_")
            self.repaired[kind if is_known else "ignored_fields_of_other_names"] += count
        self.dropped.update(outcome.dropped)
        self.lost.add(outcome.lost)
        for part in outcome.encoded:
            self._append(part, outcome.key)
        self.repaired.update({"split_conversations": 1} if len(outcome.encoded) > 1 else {})

    def counts(self, num_data: int | None) -> dict[str, Any]:
        """The manifest's counts; of the examples the first `num_data` are kept."""
        if num_data is not None and num_data < self.num_examples:
            self._examples.truncate(num_data * len(EXAMPLE) * WIDE.itemsize)
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
        return counts | self._measured()

    def _measured(self) -> dict[str, Any]:
        """Write examples.bin and conversations.bin; their columns, token counts and percentiles."""
        lengths: dict[str, Counter[int]] = {"source": Counter(), "target": Counter()}
        cut = Counter[str]()
        with_earlier_turns = 0

        def look(rows: npt.NDArray[Any]) -> None:
            nonlocal with_earlier_turns
            columns = dict(zip(EXAMPLE, rows.T.astype(np.int64), strict=True))
            with_earlier_turns += int((columns["turn"] > FIRST_ANSWER).sum())
            for side, found in zip(lengths, lengths_of(columns.__getitem__), strict=True):
                lengths[side].update(found.tolist())
                cut[side] += int((columns[f"{side}_is_whole"] == 0).sum())

        wide = self.folder / "conversations.wide", self.folder / "examples.wide"
        measured: dict[str, Any] = {
            "conversation_columns": narrow(wide[0], self.folder / "conversations.bin", CONVERSATION),
            "example_columns": narrow(wide[1], self.folder / "examples.bin", EXAMPLE, look),
        }
        measured["examples_with_earlier_turns"] = with_earlier_turns
        for side, counted in lengths.items():
            measured[f"{side}_tokens"] = sum(length * count for length, count in counted.items())
            measured[f"truncated_{side}s"] = cut[side]
            measured[f"{side}_length"] = percentiles(counted)
        return measured

    def _append(self, encoded: Encoded, key: bytes) -> None:
        rows = np.array([(self._num_parts, *span) for span in encoded.spans], WIDE)
        self._examples.write(rows.tobytes())
        self._conversations.write(np.array([self._num_tokens, int.from_bytes(key[:8], "little")], WIDE).tobytes())
        self._tokens.write(np.asarray(encoded.ids, self.dtype).tobytes())
        self.num_examples += len(rows)
        self._num_parts += 1
        self._num_tokens += len(encoded.ids)

    def _reject(self, rejected: Rejected) -> None:
        place = rejected.place
        self.rejected[rejected.reason] += 1
        if rejected.reason == LABELED_BAD:
            self.labeled_bad[place.file] += 1
        else:
            self.first_rejected.setdefault(place.file, f"{place.file}:{place.line}: {rejected.message}")
        facts = {**vars(place), "reason": rejected.reason, "message": rejected.message}
        self._rejected.write(json.dumps(facts)[:-1] + ', "record": ')
        if isinstance(rejected.record, Path):
            _write_as_json(rejected.record, self._rejected)
            rejected.record.unlink()
        else:
            self._rejected.write(_as_json(rejected.record, rejected.reason))
        self._rejected.write("}\n")


class _Seen:
    """The keys of what was read, on disk."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN")
        self._database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, place BLOB) WITHOUT ROWID")

    def first(self, key: bytes, place: str) -> str | None:
        """Where the key was seen first; None: it is new."""
        done = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, os.fsencode(place)))
        if done.rowcount:
            return None
        return os.fsdecode(self._database.execute("SELECT place FROM seen WHERE key = ?", (key,)).fetchone()[0])

    def close(self) -> None:
        self._database.close()


def _as_json(record: Any, reason: str) -> str:
    """What stood there as JSON: its value, or its text where it has none, bytes that are no UTF-8 as surrogates."""
    if not isinstance(record, bytes):  # of a table, whose NaN is no JSON, and whose dates are text
        return json.dumps(json.loads(json.dumps(record, default=str), parse_constant=str))
    return json.dumps(record.decode(errors="surrogateescape") if reason in UNPARSED else parse(record))


def _write_as_json(path: Path, file: IO[str]) -> None:
    """A file's bytes as one JSON text; those that are no UTF-8 as lone surrogates (Python's surrogateescape)."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    file.write('"')
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            file.write(json.dumps(decoder.decode(chunk))[1:-1])
    file.write(json.dumps(decoder.decode(b"", final=True))[1:-1] + '"')
