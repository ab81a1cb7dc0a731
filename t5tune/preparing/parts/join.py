"""Join the parts of a token cache: the same bytes as one process writes.

The records of all parts are read in their order in the data, as rows of records.bin. What needs no look at a single
record is computed from these rows, and the bytes of the other files are copied. Only some records take longer: rejected
ones, whose line numbers are those of the whole file; later duplicates, which are removed; and all records if there are
more kinds of repairs than are counted, or if num_data ends in the middle.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from t5tune.data.caches.cache import CONVERSATION_DTYPE, EXAMPLE_DTYPE
from t5tune.data.reading.rejections import LABELED_BAD, LEFT_OUT_REASONS
from t5tune.errors import DataError
from t5tune.file_names import CONVERSATIONS_FILE, EXAMPLES_FILE, REJECTED_FILE, TOKENS_FILE
from t5tune.preparing.cache_writer import MAX_TABLE_VALUE, make_too_much_data_error
from t5tune.preparing.counts import MAX_REPAIR_KINDS, OTHER_FIELDS, RecordCounts
from t5tune.preparing.data_problems import count_left_out, make_mixed_data_error
from t5tune.preparing.parts.duplicates import DuplicateFinder
from t5tune.preparing.parts.part import REASONS, RECORD_DTYPE, PartReader
from t5tune.preparing.parts.placed_segments import Chunk, place_segments
from t5tune.preparing.parts.rejected_lines import RejectedLines
from t5tune.preparing.record_checks import RecordChecks
from t5tune.progress import Report, count_done
from t5tune.settings.groups.record_format import ReadingSettings

CHUNK_RECORDS = 1 << 14  # rows of records.bin that are read at once
COPY_BYTES = 4 << 20
MAX_OPEN_PARTS = 100  # each has up to six open files
_BAD = REASONS.index(LABELED_BAD)
_LEFT_OUT = [REASONS.index(reason) for reason in LEFT_OUT_REASONS]


class Join:
    """Joins parts to the files of a cache, and counts.

    Args:
        parts: the folder of each part with its manifest, in the order of the parts.
        staged: the folder to write to.
        id_size: bytes of an id in tokens.bin.
        reading: how the files were read.
    """

    def __init__(
        self,
        parts: list[tuple[Path, dict[str, Any]]],
        files: list[Path],
        staged: Path,
        checks: RecordChecks,
        id_size: int,
        reading: ReadingSettings,
    ) -> None:
        self.counts = RecordCounts()
        self._folders = [folder for folder, _ in parts]
        self._manifests = [manifest for _, manifest in parts]
        self._files = files
        self._staged = staged
        self._checks = checks
        self._id_size = id_size
        self._places = place_segments(self._manifests)
        self._num_records = sum(place.segment.records for place in self._places)
        errors = [manifest["error"] for manifest in self._manifests if manifest["error"] is not None]
        self._error = min(errors, key=lambda error: error["place"], default=None)
        self._lines = RejectedLines(files, self._places, self._open_part, reading)
        self._removed = RecordCounts()  # of duplicates
        self._num_tokens = 0
        self._num_parts = 0  # conversations in the cache, where a split one counts several times
        self._open: OrderedDict[int, PartReader] = OrderedDict()
        self._finder: DuplicateFinder | None = None

    def run(self, rejects_duplicates: bool, report: Report) -> bool:
        """Write the cache's files; return whether all records are in it, not only those before num_data examples.

        Raises:
            DataError: what one process raises for the data.
        """
        with ExitStack() as stack:
            stack.callback(self._close)
            if rejects_duplicates:
                self._finder = stack.enter_context(DuplicateFinder(self._staged, self._num_records))
                self._find_duplicates(self._finder)
            advance = stack.enter_context(count_done("join", report, self._num_records, "records"))
            names = (TOKENS_FILE, CONVERSATIONS_FILE, EXAMPLES_FILE, REJECTED_FILE)
            outputs = {name: stack.enter_context(open(self._staged / name, "wb")) for name in names}
            is_complete = self._write_chunks(outputs, advance)
            self._count_details(is_complete)
            self._checks.check_all(self.counts)
            num_data = self._checks.num_data
            if num_data is not None and num_data < self.counts.num_examples:
                outputs[EXAMPLES_FILE].truncate(num_data * EXAMPLE_DTYPE.itemsize)
                self.counts.num_examples = num_data
        return is_complete

    def _find_duplicates(self, finder: DuplicateFinder) -> None:
        for chunk in self._iterate_chunks():
            usable = np.flatnonzero(chunk.rows["reason"] == 0)
            finder.add(chunk.rows["key"][usable], chunk.place.position + chunk.start + usable)
        finder.search()

    def _iterate_chunks(self) -> Iterator[Chunk]:
        """Yield all records, up to the first error at which a part ended."""
        self._close()
        for place in self._places:
            if self._error is not None and [place.segment.file, place.segment.start] >= self._error["place"]:
                return
            for start in range(0, place.segment.records, CHUNK_RECORDS):
                count = min(CHUNK_RECORDS, place.segment.records - start)
                rows = self._open_part(place.part).read_rows("records.bin", RECORD_DTYPE, count)
                if self._finder is not None:
                    firsts = self._finder.find_firsts(place.position + start, count)
                else:
                    firsts = np.full(count, -1, np.int64)
                yield Chunk(place, start, rows, firsts)

    def _write_chunks(self, outputs: Mapping[str, BinaryIO], advance: Callable[[int], None]) -> bool:
        """Write the records up to that with the last example that is wanted; return whether these are all."""
        for chunk in self._iterate_chunks():
            wanted = self._find_end(chunk)
            self._check_and_write(chunk if wanted is None else chunk.take(wanted), outputs)
            advance(len(chunk.rows))
            if wanted is not None:
                return False
        if self._error is not None:
            raise DataError(self._error["message"], hint=self._error["hint"])
        return True

    def _find_end(self, chunk: Chunk) -> int | None:
        """Find the number of records after which there are num_data examples; None if there are fewer."""
        if self._checks.num_data is None:
            return None
        totals = self.counts.num_examples + np.cumsum(np.where(chunk.reasons == 0, chunk.rows["examples"], 0))
        number = int(np.searchsorted(totals, self._checks.num_data))
        return number + 1 if number < len(totals) else None

    def _check_and_write(self, chunk: Chunk, outputs: Mapping[str, BinaryIO]) -> None:
        mixed, excess = self._find_conversation(chunk), self._find_excess(chunk)
        if excess is not None and (mixed is None or excess < mixed):
            self._write_chunk(chunk.take(excess + 1), outputs)
            self._checks.check_rejected_so_far(self.counts)  # raises
        if mixed is not None:
            location = self._lines.locate(chunk.place.position + chunk.start + mixed)
            num_before = self.counts.conversations + int((chunk.reasons[:mixed] == 0).sum())
            raise make_mixed_data_error(location, num_before)
        self._write_chunk(chunk, outputs)

    def _find_conversation(self, chunk: Chunk) -> int | None:
        """Find the first conversation where only pairs are expected."""
        if not self._checks.takes_only_pairs:
            return None
        found = np.flatnonzero((chunk.rows["reason"] == 0) & ~chunk.rows["is_pair"])
        return int(found[0]) if len(found) else None

    def _find_excess(self, chunk: Chunk) -> int | None:
        """Find the first record after which too many are rejected for max_rejected_fraction."""
        counted, num_left_out = ~np.isin(chunk.reasons, _LEFT_OUT), count_left_out(self.counts.rejected)
        totals = self.counts.num_records - num_left_out + np.cumsum(counted)
        broken = self.counts.rejected.total() - num_left_out + np.cumsum((chunk.reasons != 0) & counted)
        return self._checks.find_excess(totals, broken)

    def _write_chunk(self, chunk: Chunk, outputs: Mapping[str, BinaryIO]) -> None:
        outputs[REJECTED_FILE].writelines(self._lines.iterate_lines(chunk, self.counts))
        self._count_chunk(chunk)
        part, rows, is_kept = self._open_part(chunk.place.part), chunk.rows, chunk.firsts < 0
        for row in rows[~is_kept]:
            _add_details(self._removed, part, row)
        tokens, conversations, examples = (
            rows[name].astype(np.int64) for name in ("tokens", "conversations", "examples")
        )
        # each file's numbers count from the beginning of the next file in this order, so its position is needed before
        moved = _compute_shifts(conversations, is_kept, part.tell(CONVERSATIONS_FILE, CONVERSATION_DTYPE.itemsize))
        spans = part.read_rows(EXAMPLES_FILE, EXAMPLE_DTYPE, int(examples.sum()))[np.repeat(is_kept, examples)]
        numbers = spans["conversation"] + np.repeat((moved + self._num_parts)[is_kept], examples[is_kept])
        if len(numbers) and numbers.max() > MAX_TABLE_VALUE:
            raise make_too_much_data_error()
        spans["conversation"] = numbers
        outputs[EXAMPLES_FILE].write(spans.tobytes())
        moved = _compute_shifts(tokens, is_kept, part.tell(TOKENS_FILE, self._id_size))
        starts = part.read_rows(CONVERSATIONS_FILE, CONVERSATION_DTYPE, int(conversations.sum()))
        starts = starts[np.repeat(is_kept, conversations)]
        shifts = np.repeat((moved + self._num_tokens)[is_kept], conversations[is_kept])
        starts["start"] = starts["start"].astype(np.int64) + shifts
        outputs[CONVERSATIONS_FILE].write(starts.tobytes())
        _copy_runs(part, outputs[TOKENS_FILE], tokens * self._id_size, is_kept)
        self._num_tokens += int(tokens[is_kept].sum())
        self._num_parts += int(conversations[is_kept].sum())

    def _count_chunk(self, chunk: Chunk) -> None:
        counts, rows, reasons = self.counts, chunk.rows, chunk.reasons
        name = str(self._files[chunk.place.segment.file])
        counts.num_records += len(rows)
        counts.usable[name] += int((rows["reason"] == 0).sum())
        counts.labeled_bad[name] += int((reasons == _BAD).sum())
        found, first, how_often = np.unique(reasons, return_index=True, return_counts=True)
        for place in np.argsort(first):  # messages list reasons in the order in which they occur
            if found[place]:
                counts.rejected[REASONS[found[place]]] += int(how_often[place])
        kept = rows[reasons == 0]
        counts.conversations += len(kept)
        counts.with_prefix += int(kept["has_prefix"].sum())
        counts.pairs += int(kept["is_pair"].sum())
        counts.unknown_tokens += int(kept["unknown"].sum())
        counts.num_examples += int(kept["examples"].sum())

    def _count_details(self, is_complete: bool) -> None:
        """Count repairs, left out examples and lost characters."""
        kinds = {kind for manifest in self._manifests for kind in manifest["repaired"]}
        if not is_complete or not self.counts.num_examples or OTHER_FIELDS in kinds or len(kinds) > MAX_REPAIR_KINDS:
            # the records in their order: it decides which kinds are counted, and the order in messages
            self._count_details_of_records()
            return
        for manifest in self._manifests:
            self.counts.repaired.update(manifest["repaired"])
            self.counts.dropped.update(manifest["dropped"])
            self.counts.lost.add(manifest["lost"])
        self.counts.repaired -= self._removed.repaired
        self.counts.dropped -= self._removed.dropped
        self.counts.lost.add({text: (-n, -targets) for text, n, targets in self._removed.lost.iterate_by_targets()})

    def _count_details_of_records(self) -> None:
        remaining = self.counts.num_records
        for chunk in self._iterate_chunks():
            chunk = chunk.take(remaining)
            has_any = (chunk.rows["details"] > 0) | (chunk.rows["conversations"] > 1)
            for row in chunk.rows[has_any & (chunk.reasons == 0)]:
                _add_details(self.counts, self._open_part(chunk.place.part), row)
            remaining -= len(chunk.rows)
            if remaining == 0:
                return

    def _open_part(self, number: int) -> PartReader:
        """Return the reader of a part, and close the files of the one that wasn't used for longest if too many are."""
        if number not in self._open:
            self._open[number] = PartReader(self._folders[number])
        self._open.move_to_end(number)
        for other in list(self._open)[:-MAX_OPEN_PARTS]:
            self._open[other].close()
        return self._open[number]

    def _close(self) -> None:
        for part in self._open.values():
            part.close()
        self._open.clear()


def _add_details(counts: RecordCounts, part: PartReader, row: Any) -> None:
    details = part.read_details(int(row["details"]))
    counts.add_repairs(details.get("repairs", {}))
    counts.dropped.update(details.get("dropped", {}))
    counts.lost.add(details.get("lost", {}))
    if row["conversations"] > 1:
        counts.repaired["split_conversations"] += 1


def _compute_shifts(
    sizes: npt.NDArray[np.int64], is_kept: npt.NDArray[np.bool_], position: int
) -> npt.NDArray[np.int64]:
    """Compute by how much the place of each record that is kept changes, from `position` in the part on to 0 on."""
    return np.cumsum(np.where(is_kept, sizes, 0)) - np.cumsum(sizes) - position


def _copy_runs(
    part: PartReader, output: BinaryIO, sizes: npt.NDArray[np.int64], is_kept: npt.NDArray[np.bool_]
) -> None:
    """Copy the ids of records that are kept, as many at once as follow each other."""
    starts = np.flatnonzero(np.concatenate([[True], is_kept[1:] != is_kept[:-1]]))
    for start, size in zip(starts.tolist(), np.add.reduceat(sizes, starts).tolist(), strict=True):
        if not is_kept[start]:
            part.skip(TOKENS_FILE, size)
            continue
        for begin in range(0, size, COPY_BYTES):
            output.write(part.read(TOKENS_FILE, min(COPY_BYTES, size - begin)))
