"""Check the records of a token cache while they are written, in one process or when parts are joined.

If too many are rejected, no cache is written, and its rejected.jsonl is kept next to it as `cache.rejected.jsonl`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from t5tune.data.reading.raw_records import RawRecord
from t5tune.file_names import REJECTED_FILE, REJECTED_SUFFIX
from t5tune.io.atomic import copy_atomically
from t5tune.preparing.counts import RecordCounts
from t5tune.preparing.data_problems import (
    RejectedRecordsError,
    check_any_example,
    check_rejected,
    count_left_out,
    format_first_rejected,
    make_mixed_data_error,
)
from t5tune.preparing.pipeline import EncodedRecord

MIN_RECORDS_TO_STOP = 1000  # max_rejected_fraction isn't checked while fewer were read, without those left out
BEGINNING_BYTES = 1 << 16  # has room for the longest path, escaped
_REJECTED = re.compile(rb'{"file": "[^\n]*", "line": \d+, "index": \d+, "offset": \d+, ')


@dataclass(frozen=True)
class RecordChecks:
    """Limits that the data must satisfy.

    Args:
        data: the setting and its files, for messages.
        purpose: `train on` or `evaluate on`, for messages.
        rejected_file: where the rejected records are kept if no cache is written.
        takes_only_pairs: whether the default template of pairs was chosen, so that no conversation may follow.
        num_data: number of examples after which no more records are read; None: read all.
    """

    data: str
    purpose: str
    rejected_file: Path
    takes_only_pairs: bool
    max_rejected_fraction: float | None
    num_data: int | None

    def check_kind(self, record: RawRecord, encoded: EncodedRecord, counts: RecordCounts) -> None:
        """Check a record that follows the counted records."""
        if self.takes_only_pairs and encoded.rejection is None and not encoded.is_pair:
            raise make_mixed_data_error(record.location, counts.conversations)

    def check_rejected_so_far(self, counts: RecordCounts) -> None:
        """Check the fraction of rejected records, once there are enough records."""
        if counts.num_records - count_left_out(counts.rejected) >= MIN_RECORDS_TO_STOP:
            self._check_rejected(counts)

    def check_all(self, counts: RecordCounts) -> None:
        """Check the records as a whole."""
        check_any_example(self.data, counts, self.purpose, self.rejected_file)
        self._check_rejected(counts)

    def _check_rejected(self, counts: RecordCounts) -> None:
        allowed, first = self.max_rejected_fraction, format_first_rejected(counts)
        check_rejected(counts.rejected, counts.num_records, allowed, self.data, self.rejected_file, first)


def name_rejected_file(folder: Path) -> Path:
    """Name the file for the rejected records of a cache that isn't written: `cache.rejected.jsonl`, next to it.

    It is `cache.1.rejected.jsonl` if a user has a file of that name, such as the records that were corrected by hand.
    """
    named = folder if folder.name not in ("", "..") else Path(os.path.realpath(folder))
    file, number = named.with_name(f"{named.name}{REJECTED_SUFFIX}"), 0
    while os.path.lexists(file) and not _lists_rejected(file):
        number += 1
        file = named.with_name(f"{named.name}.{number}{REJECTED_SUFFIX}")
    return file


def _lists_rejected(file: Path) -> bool:
    """Whether t5tune wrote the file, by the beginning of its first line."""
    try:
        with open(file, "rb") as lines:
            return _REJECTED.match(lines.read(BEGINNING_BYTES)) is not None
    except OSError:
        return False


@contextmanager
def keep_rejected(staged: Path, rejected_file: Path) -> Iterator[None]:
    """Keep the rejected records of a folder that is being written if the block fails because of them."""
    try:
        yield
    except RejectedRecordsError:
        copy_atomically(staged / REJECTED_FILE, rejected_file)
        raise
