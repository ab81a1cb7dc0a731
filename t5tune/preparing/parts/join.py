"""Join the parts of a dataset: the tables of one process, without the duplicates of earlier parts.

    counts, is_complete = join_tables([part / "chats" for part in parts], lost, staged, source, report)

A duplicate of an earlier part's record is counted, but not listed in rejected.jsonl, and its repairs still count.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from t5tune.data.caches.manifest import read_manifest
from t5tune.data.caches.tables import CONVERSATION_DTYPE, EXAMPLE_DTYPE
from t5tune.data.labels import read_values, renumber
from t5tune.data.reading.rejections import RecordLocation, Rejection
from t5tune.file_names import CONVERSATIONS_FILE, EXAMPLES_FILE, REJECTED_FILE, TOKENS_FILE
from t5tune.preparing.cache_files import CacheSource
from t5tune.preparing.cache_writer import MAX_TABLE_VALUE, SeenKeys, make_duplicate_rejection, make_too_much_data_error
from t5tune.preparing.counts import RecordCounts
from t5tune.preparing.data_problems import make_mixed_data_error
from t5tune.preparing.parts.part import RECORD_DTYPE, get_records_path
from t5tune.progress import Report, track

CHUNK_BYTES = 4 << 20


def join_tables(
    parts: Sequence[Path], lost: Sequence[dict[str, Any]], staged: Path, source: CacheSource, report: Report
) -> tuple[RecordCounts, bool]:
    """Write the tables of a dataset's cache from its parts; return the counts, and whether all records count.

    Args:
        parts: the cache of each part.
        lost: the characters that each part's tokenizer can't reproduce.
    """
    join = _Join(staged, source)
    is_complete = True
    with closing(join.seen), join.files[0], join.files[1], join.files[2], join.files[3]:
        for part, characters in zip(parts, track(lost, "join", report, unit="parts"), strict=True):
            manifest = read_manifest(part)
            join.counts.add_repairs(manifest["repaired"])
            join.counts.dropped.update(manifest["dropped"])
            join.counts.lost.add(characters)
            if not join.add(part):
                is_complete = False
                break
    num_data = source.checks.num_data
    if num_data is not None and num_data < join.counts.num_examples:
        with open(staged / EXAMPLES_FILE, "r+b") as file:
            file.truncate(num_data * EXAMPLE_DTYPE.itemsize)
        join.counts.num_examples = num_data
    source.checks.check_all(join.counts)
    return join.counts, is_complete


class _Join:
    def __init__(self, staged: Path, source: CacheSource) -> None:
        self.counts = RecordCounts()
        self.seen = SeenKeys()
        self.files: list[BinaryIO] = [
            open(staged / name, "wb")  # noqa: SIM115 (closed by join_tables)
            for name in (TOKENS_FILE, CONVERSATIONS_FILE, EXAMPLES_FILE, REJECTED_FILE)
        ]
        self._source = source
        self.counts.number_labels(source.label_names)
        self._dtype = source.ids_dtype
        self._num_tokens = 0
        self._num_conversations = 0

    def add(self, part: Path) -> bool:
        """Append a part's tables; return False if num_data examples are reached before its end."""
        records = np.fromfile(get_records_path(part), RECORD_DTYPE)
        is_kept = self._find_new(records, part)
        num_data = self._source.checks.num_data
        totals = self.counts.num_examples + np.cumsum(np.where(is_kept, records["examples"], 0), dtype=np.int64)
        num_rejected, is_last = None, False
        if num_data is not None and len(totals) and totals[-1] >= num_data:  # one process would read no further
            is_last = True
            wanted = int(np.searchsorted(totals, num_data)) + 1
            records, is_kept, num_rejected = records[:wanted], is_kept[:wanted], int(records["rejected"][wanted - 1])
        self._add_rejected(part, num_rejected)
        self._count(records, is_kept)
        self._append(part, records, is_kept)
        return not is_last

    def _find_new(self, records: npt.NDArray[Any], part: Path) -> npt.NDArray[np.bool_]:
        """Find the records whose texts no earlier part has."""
        if self._source.dataset.dedupe == "none":
            return np.ones(len(records), bool)
        keys = (record.tobytes() for record in records["key"])
        return np.array([self.seen.find_or_add(key, part.parent.name) is None for key in keys], bool)

    def _add_rejected(self, part: Path, count: int | None) -> None:
        """Copy the first `count` lines of a part's rejected.jsonl; None: all."""
        for number, line in enumerate(_iterate_lines(part / REJECTED_FILE)):
            if number == count:
                return
            facts = json.loads(line)
            location = RecordLocation(*(facts.get(name) for name in ("file", "line", "index", "offset", "key")))
            self.counts.num_records += 1
            self.counts.usable[location.file] += facts["reason"] == "duplicate"
            self.counts.add_rejection(location, Rejection(facts["reason"], facts["message"]))
            self.files[3].write(line)

    def _count(self, records: npt.NDArray[Any], is_kept: npt.NDArray[np.bool_]) -> None:
        counts, kept = self.counts, records[is_kept]
        counts.num_records += len(records)
        for number, usable in zip(*np.unique(records["file"], return_counts=True), strict=True):
            counts.usable[str(self._source.files[number])] += int(usable)
        if duplicates := len(records) - len(kept):
            counts.rejected[make_duplicate_rejection("").reason] += duplicates
        if self._source.checks.takes_only_pairs and not kept["is_pair"].all():
            number = int(np.argmin(kept["is_pair"]))
            place = RecordLocation(str(self._source.files[kept["file"][number]]), int(kept["line"][number]), 0, 0)
            raise make_mixed_data_error(place, counts.conversations + number)
        counts.conversations += len(kept)
        counts.with_prefix += int(kept["has_prefix"].sum())
        counts.pairs += int(kept["is_pair"].sum())
        counts.unknown_tokens += int(kept["unknown"].sum())
        counts.with_unknown_tokens += int((kept["unknown"] > 0).sum())
        counts.num_examples += int(kept["examples"].sum())

    def _append(self, part: Path, records: npt.NDArray[Any], is_kept: npt.NDArray[np.bool_]) -> None:
        tokens, conversations, examples, _ = self.files
        rows = np.fromfile(part / CONVERSATIONS_FILE, CONVERSATION_DTYPE, int(records["conversations"].sum()))
        spans = np.fromfile(part / EXAMPLES_FILE, EXAMPLE_DTYPE, int(records["examples"].sum()))
        has_row = np.repeat(is_kept, records["conversations"])
        num_ids = (part / TOKENS_FILE).stat().st_size // self._dtype.itemsize
        starts = np.append(rows["start"].astype(np.int64), num_ids)
        if len(rows) < (part / CONVERSATIONS_FILE).stat().st_size // CONVERSATION_DTYPE.itemsize:
            following = np.fromfile(part / CONVERSATIONS_FILE, CONVERSATION_DTYPE)[len(rows)]
            starts[-1] = following["start"]
        sizes = np.where(has_row, np.diff(starts), 0)
        # the numbers of the conversations that are kept, and where their ids begin
        numbers = np.cumsum(has_row) - 1 + self._num_conversations
        spans = spans[has_row[spans["conversation"]]]
        if len(spans) and numbers[spans["conversation"]].max() > MAX_TABLE_VALUE:
            raise make_too_much_data_error()
        spans["conversation"] = numbers[spans["conversation"]]
        examples.write(spans.tobytes())
        rows["start"] = np.cumsum(sizes) - sizes + self._num_tokens
        conversations.write(rows[has_row].tobytes())
        with open(part / TOKENS_FILE, "rb") as file:
            for begin, end in _find_runs(has_row):  # conversations that follow each other are copied at once
                _copy(file, tokens, *(int(starts[number]) * self._dtype.itemsize for number in (begin, end)))
        if (labels := read_manifest(part).get("labels")) is not None and labels["names"] and len(spans):
            begins = rows["start"][has_row][spans["conversation"] - self._num_conversations].astype(np.int64)
            bounds = zip(begins + spans["target_start"], begins + spans["target_end"], strict=True)
            self._number_labels(labels["names"], list(bounds))
        self._num_tokens += int(sizes.sum())
        self._num_conversations += int(has_row.sum())

    def _number_labels(self, names: list[str], bounds: list[tuple[int, int]]) -> None:
        """Replace a part's class numbers, which are already copied, by the joined cache's.

        Args:
            names: the part's classes, in the order of their numbers.
            bounds: of the values of each text.
        """
        self.files[0].flush()
        ids = np.memmap(self.files[0].name, np.int32, "r+")
        values = [read_values(ids[start:end]) for start, end in bounds]
        # a class that only later records have gets no number yet
        used = max((np.nanmax(each) for each in values if len(each)), default=-1)
        numbers = self.counts.number_labels(names[: int(used) + 1])
        for each in values:
            each[:] = renumber(each, numbers)


def _find_runs(has_row: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], has_row, [False]]).astype(int)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _copy(file: BinaryIO, output: BinaryIO, begin: int, end: int) -> None:
    file.seek(begin)
    while begin < end:
        begin += output.write(file.read(min(CHUNK_BYTES, end - begin)))


def _iterate_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file
