"""Count records, for the manifest of a token cache and for messages."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.data.caches.cache import compute_lengths
from t5tune.data.caches.tables import EXAMPLE_DTYPE
from t5tune.data.labels import Values
from t5tune.data.reading.rejections import LABELED_BAD, RecordLocation, Rejection
from t5tune.data.tokens.span_corruption import SpanCorruption
from t5tune.data.tokens.tokenizer import SpecialIds
from t5tune.data.tokens.vocabulary import LostCharacterCounts

FIRST_ANSWER_TURN = 1  # index among the turns; turn 0 is the human's
ROWS_PER_CHUNK = 1 << 14  # rows of examples.bin that are read at once
PERCENTILES = (50, 90, 99, 100)
OTHER_FIELDS = "ignored_fields_of_other_names"  # counts the repairs of further kinds
MAX_REPAIR_KINDS = 100  # kinds of repairs that are counted by name; a kind may contain any field name of the data


@dataclass
class RecordCounts:
    """Counts of records: used, repaired, rejected, and so on.

    Args:
        with_prefix: conversations whose source has source_prefix.
        pairs: conversations that are pairs of texts in the data.
        usable: usable records by file, including duplicates.
        first_rejected: file -> location and message, without records that are labeled bad.
        labeled_bad: records by file.
        with_unknown_tokens: conversations.
        label_names: the classes of labels so far, with their numbers.
    """

    num_records: int = 0
    num_examples: int = 0
    conversations: int = 0
    with_prefix: int = 0
    pairs: int = 0
    unknown_tokens: int = 0
    with_unknown_tokens: int = 0
    usable: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejected: dict[str, str] = field(default_factory=dict)
    labeled_bad: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    lost: LostCharacterCounts = field(default_factory=LostCharacterCounts)
    label_names: dict[str, int] = field(default_factory=dict)

    def add_repairs(self, repairs: Mapping[str, int]) -> None:
        """Count the repairs of a record; kinds after the first MAX_REPAIR_KINDS are counted together."""
        for kind, count in repairs.items():
            is_known = kind in self.repaired or len(self.repaired) < MAX_REPAIR_KINDS or not kind.startswith("ignored_")
            self.repaired[kind if is_known else OTHER_FIELDS] += count

    def number_labels(self, names: Iterable[str]) -> Values:
        """Return the numbers of classes; new classes get the next numbers."""
        numbers = [self.label_names.setdefault(name, len(self.label_names)) for name in names]
        return np.array(numbers, np.float64)

    def add_rejection(self, location: RecordLocation, rejection: Rejection) -> None:
        """Count a rejected record."""
        self.rejected[rejection.reason] += 1
        if rejection.reason == LABELED_BAD:
            self.labeled_bad[location.file] += 1
        else:
            self.first_rejected.setdefault(location.file, f"{location}: {rejection.message}")

    def describe(
        self,
        dtype: np.dtype[Any],
        examples: Path,
        special: SpecialIds,
        corruption: SpanCorruption | None,
        has_labels: bool,
    ) -> dict[str, Any]:
        """Return the counts for the manifest, including the counts of examples.bin."""
        return {
            "dtype": dtype.str,
            "conversations": self.conversations,
            "rejected": self.rejected.total(),
            "rejected_by_reason": dict(sorted(self.rejected.items())),
            "repaired": dict(sorted(self.repaired.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "examples": self.num_examples,
            "unknown_tokens": self.unknown_tokens,
            "with_unknown_tokens": self.with_unknown_tokens,
            **_measure_examples(examples, special, corruption, has_labels),
        }


def _measure_examples(
    path: Path, special: SpecialIds, corruption: SpanCorruption | None, has_labels: bool
) -> dict[str, Any]:
    lengths: dict[str, Counter[int]] = {"source": Counter(), "target": Counter()}
    truncated = Counter[str]()
    with_earlier_turns = num_read = 0
    with open(path, "rb") as file:
        while len(rows := np.fromfile(file, EXAMPLE_DTYPE, ROWS_PER_CHUNK)):
            with_earlier_turns += int((rows["turn"] > FIRST_ANSWER_TURN).sum()) if corruption is None else 0
            indices = np.arange(num_read, num_read + len(rows))
            source, *targets = compute_lengths(
                lambda name: rows[name].astype(np.int64), special, corruption, indices, has_labels
            )
            num_read += len(rows)
            lengths["source"].update(source.tolist())
            truncated["source"] += int((~rows["source_is_whole"]).sum())
            for kind, of_kind in zip(("target", "rejected"), targets, strict=True):  # both are targets
                lengths["target"].update(of_kind[of_kind > 0].tolist())
                truncated["target"] += int((~rows[f"{kind}_is_whole"]).sum())
    measured: dict[str, Any] = {"examples_with_earlier_turns": with_earlier_turns}
    for side, counted in lengths.items():
        measured[f"{side}_tokens"] = sum(length * count for length, count in counted.items())
        measured[f"truncated_{side}s"] = truncated[side]
        measured[f"{side}_length"] = _compute_percentiles(counted)
    return measured


def _compute_percentiles(counted: Counter[int]) -> dict[str, int]:
    """Compute p50, p90, p99 and p100 from counts of lengths.

    pN is the smallest length that at least N percent of the lengths don't exceed.
    """
    found: dict[str, int] = {}
    total, below = counted.total(), 0
    for length in sorted(counted):
        below += counted[length]
        for share in PERCENTILES:
            if 100 * below >= share * total:
                found.setdefault(f"p{share}", length)
    return found
