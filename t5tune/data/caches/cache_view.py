"""Decoded examples of a token cache, as the model sees them, with their truncated tokens; histograms of lengths."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np

from t5tune.data.caches.batching import Integers
from t5tune.data.caches.cache import Cache
from t5tune.data.labels import LabelTask, Values
from t5tune.data.tokens.encoding import LabeledExample, PreferencePair
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.label_metrics import show_label

NUM_BARS = 20  # of a histogram, about

_RunKind = Literal["text", "added", "unknown", "special", "label"]
_Part = tuple[list[int], bool, str]  # ids, whether they were cut off, and the label of the last id


@dataclass(frozen=True)
class TextRun:
    """The text of consecutive tokens; an added, unknown or special token is a separate run.

    So is a label, after the token that predicts it.
    """

    text: str
    kind: _RunKind


@dataclass(frozen=True)
class ExampleView:
    """One example as the model sees it.

    Args:
        index: position in the cache; `conversation` and `turn` are its origin.
        source_ids, target_ids: special tokens included.
        truncated: which of "source", "target" and "rejected" are truncated.
        source_cut: tokens that were removed from the source, after its first `source_head` tokens.
        target_cut, rejected_cut: tokens that were removed from the end.
        rejected_ids, rejected_text: the rejected answer of a preference pair; None: not a pair.
        labels: names or numbers of the text or, with `has_token_labels`, of each source token; None there: not learned.
    """

    index: int
    conversation: int
    turn: int
    source_ids: list[int]
    target_ids: list[int]
    source_text: str
    target_text: str
    truncated: list[str]
    source_head: int
    source_cut: list[int]
    target_cut: list[int]
    rejected_ids: list[int] | None = None
    rejected_text: str | None = None
    rejected_cut: list[int] = field(default_factory=list)
    labels: list[str | float | None] | None = None
    has_token_labels: bool = False

    @property
    def lengths(self) -> dict[str, tuple[int, int]]:
        """The length of each side, and how many tokens were cut off from it."""
        sides = {"source": (len(self.source_ids), len(self.source_cut))}
        if self.labels is None:
            sides["target"] = len(self.target_ids), len(self.target_cut)
        if self.rejected_ids is not None:
            sides["rejected"] = len(self.rejected_ids), len(self.rejected_cut)
        return sides

    def group_runs_by_side(self, tokenizer: Tokenizer, added: set[int]) -> dict[str, Iterator[tuple[TextRun, bool]]]:
        """Return source, target and rejected answer as runs of text, each with whether it was cut off.

        A text's labels are a side, too.
        """
        head, source = self.source_head, self.source_ids
        kept = [(source[:head], False, "")]
        if self.labels is not None and self.has_token_labels:
            shown = [*map(_show_label, self.labels[:head])]
            ends = [0, *(place + 1 for place, label in enumerate(shown) if label), head]
            kept = [(source[start:end], False, shown[end - 1]) for start, end in pairwise(ends) if start < end]
        parts = {"source": [*kept, (self.source_cut, True, ""), (source[head:], False, "")]}
        if self.labels is None:
            parts["target"] = [(self.target_ids, False, ""), (self.target_cut, True, "")]
        if self.rejected_ids is not None:
            parts["rejected"] = [(self.rejected_ids, False, ""), (self.rejected_cut, True, "")]
        sides = {side: _iterate_runs(of_side, tokenizer, added) for side, of_side in parts.items()}
        if self.labels is not None and not self.has_token_labels:
            sides["label"] = iter([(TextRun(", ".join(map(_show_label, self.labels)) or "none", "label"), False)])
        return sides


def _show_label(label: str | float | None) -> str:
    return "" if label is None else f"{label:g}" if isinstance(label, float) else show_label(label)


def _iterate_runs(parts: list[_Part], tokenizer: Tokenizer, added: set[int]) -> Iterator[tuple[TextRun, bool]]:
    around = tokenizer.special_ids
    special: dict[int, _RunKind] = dict.fromkeys((*around.source_start, *around.source_end), "special")
    special |= {around.target_end: "special", tokenizer.unk_token_id: "unknown", **dict.fromkeys(added, "added")}
    before: list[int] = []  # the token before the run
    for ids, is_cut, label in parts:
        for kind, tokens in groupby(ids, lambda token: special.get(token, "text")):
            for run in [list(tokens)] if kind == "text" else [[token] for token in tokens]:
                # alone, the decoder would drop the space of a text's first token
                start = before if kind == "text" else []
                yield TextRun(tokenizer.decode(start + run).removeprefix(tokenizer.decode(start)), kind), is_cut
                before = run[-1:]
        if label:
            yield TextRun(f"[{label}]", "label"), is_cut


@dataclass(frozen=True)
class Histogram:
    """counts[i] is the number of lengths (tokens) in [edges[i], edges[i + 1]).

    All bars are equally wide, except the last one if it collects a long tail.
    """

    edges: list[int]
    counts: list[int]

    @property
    def has_tail(self) -> bool:
        return self.edges[-1] - self.edges[-2] > self.edges[1] - self.edges[0]

    def label_bars(self) -> list[str]:
        """Name the lengths that each bar counts: "9", "10–12", and "133 and more" for a tail."""
        labels = [f"{low:,}–{high - 1:,}" if high - low > 1 else f"{low:,}" for low, high in pairwise(self.edges)]
        if self.has_tail:
            labels[-1] = f"{self.edges[-2]:,} and more"
        return labels


def build_histogram(lengths: Integers) -> Histogram:
    """Count lengths in about NUM_BARS bars of equal integer width, from the shortest length to the longest.

    If the longest 1% make the range at least twice as wide, the last bar collects them: a few very long examples would
    leave most bars empty.
    """
    ordered = np.sort(lengths).tolist()
    low, high = ordered[0], ordered[-1]
    edges = _make_edges(low, high)
    if len(ordered) >= NUM_BARS:
        longest_without_tail = ordered[-1 - math.ceil(len(ordered) / 100)]
        if high - low + 1 >= 2 * (longest_without_tail - low + 1):
            edges = [*_make_edges(low, longest_without_tail), high + 1]
    return Histogram(edges, np.histogram(lengths, edges)[0].tolist())


def _make_edges(low: int, high: int) -> list[int]:
    width = max(1, -(-(high - low + 1) // NUM_BARS))
    return list(range(low, high + width + 1, width))


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths of a cache's examples.

    Args:
        target: None: the examples have labels.
        padding_random: share of padding, 0 to 1, in random batches of `batch_size`.
        padding_by_length: the share in batches of similar lengths, as training makes them.
        longest: indices of the longest examples, longest first.
    """

    source: Histogram
    target: Histogram | None
    batch_size: int
    padding_random: float
    padding_by_length: float
    longest: list[int]


class CacheView(Sequence[ExampleView]):
    """Some examples of a cache, each decoded on access."""

    def __init__(self, cache: Cache, indices: Sequence[int]) -> None:
        self.cache = cache
        self.tokenizer = load_tokenizer(cache.tokenizer_folder)
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: Any) -> Any:
        index, decode = self._indices[number], self.tokenizer.decode
        example, conversation, ids, span = self.cache.read_untruncated(index)
        source, target, around = example.source_S.tolist(), example.target_T.tolist(), self.cache.special_ids
        task, labels = self.cache.label_task, None
        if task is not None and isinstance(example, LabeledExample):
            labels = _name_values(example.values, task)
        is_masked = self.cache.corruption is not None
        rejected = example.rejected_R.tolist() if isinstance(example, PreferencePair) else None
        is_whole = {side: getattr(span, f"{side}_is_whole") for side in ("source", "target", "rejected")}
        return ExampleView(
            index=index,
            conversation=conversation,
            turn=span.turn,
            source_ids=source,
            target_ids=target,
            source_text=decode(around.strip_source(source)),
            target_text=decode(target[:-1] if is_masked else target[: span.target_end - span.target_start]),
            truncated=[side for side, whole in is_whole.items() if not whole],
            source_head=len(around.source_start) + span.system_end,
            # the rest of a raw text is in other examples
            source_cut=[] if is_masked else ids[span.system_end : span.source_start].tolist(),
            target_cut=ids[span.target_end : span.answer_end].tolist(),
            rejected_ids=rejected,
            rejected_text=None if rejected is None else decode(rejected[: span.rejected_end - span.rejected_start]),
            rejected_cut=ids[span.rejected_end : span.rejected_answer_end].tolist(),
            labels=labels,
            has_token_labels=task is not None and task.per_token,
        )


def _name_values(values: Values, task: LabelTask) -> list[str | float | None]:
    known = [None if np.isnan(value) else float(value) for value in values]
    return [None if value is None else task.names[int(value)] if task.names else value for value in known]
