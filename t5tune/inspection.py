"""`t5tune inspect`: what the model will really see of a cache's examples.

result = inspect(InspectSettings(cache="cache", worst_cut=True))
result.examples[0].source_text
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.data.cache import Cache, open_cache
from t5tune.data.lengths import Histogram, length_histogram
from t5tune.data.order import epoch_order, padding_share
from t5tune.data.tokenizer import Tokenizer, load_tokenizer
from t5tune.data.vocabulary import TextRun, text_runs
from t5tune.errors import DataError, SettingsError
from t5tune.inspection_page import write_page
from t5tune.progress import Note, Report, silent
from t5tune.settings import InspectSettings

NUM_LONGEST = 5
WAYS = ("worst_cut", "unknown", "all")  # to choose examples, beside their numbers


@dataclass(frozen=True)
class Shown:
    """One example as the model sees it.

    Args:
        index: in the cache; `conversation` and `turn` say where it comes from.
        source_ids, target_ids: end tokens included.
        truncated: which of source and target were cut.
        source_cut: tokens that were left out of the source, behind its first `source_head` tokens.
        target_cut: tokens that were left out at the target's end.
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

    def runs(self, tokenizer: Tokenizer, added: set[int]) -> dict[str, Iterator[tuple[TextRun, bool]]]:
        """Source and target as runs of text, each with whether it was cut off."""
        head, source = self.source_head, self.source_ids
        parts = {
            "source": [(source[:head], False), (self.source_cut, True), (source[head:], False)],
            "target": [(self.target_ids, False), (self.target_cut, True)],
        }
        return {side: _runs(of_side, tokenizer, added) for side, of_side in parts.items()}


def _runs(parts: list[tuple[list[int], bool]], tokenizer: Tokenizer, added: set[int]) -> Iterator[tuple[TextRun, bool]]:
    before = None
    for ids, is_cut in parts:
        for run in text_runs(ids, tokenizer, added, before):
            yield run, is_cut
        before = ids[-1] if ids else before


@dataclass(frozen=True)
class Statistics:
    """Lengths of a cache's examples. `padding` is the share of padding in batches of `batch_size`, 0 to 1."""

    source: Histogram
    target: Histogram
    batch_size: int
    padding_random: float
    padding_by_length: float
    longest: list[int]


class Examples(Sequence[Shown]):
    """Examples of a cache that are laid open as they are asked for."""

    def __init__(self, cache: Cache, indices: Sequence[int]) -> None:
        self.cache = cache
        self.tokenizer = load_tokenizer(cache.tokenizer_folder)
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: Any) -> Any:
        return _shown(self.cache, self._indices[number], self.tokenizer)


@dataclass(frozen=True)
class Inspected:
    """What was asked for: some examples of a cache, statistics of all of them, or both."""

    examples: Examples
    statistics: Statistics | None
    page: Path | None


def inspect(settings: InspectSettings, report: Report = silent) -> Inspected:
    """Choose the examples and lay them open.

    Raises:
        DataError: the cache can't be used, or holds no such example.
        SettingsError: more than one choice of examples, or a page that can't be written.
    """
    cache = open_cache(settings.cache)
    examples = Examples(cache, _chosen(cache, settings, report))
    statistics = _statistics(cache, settings.per_device_train_batch_size) if settings.stats or settings.html else None
    if (page := settings.html) is not None:
        if page.is_symlink() or (page.exists() and not page.is_file()):
            raise SettingsError(f"html: {page}: no regular file, which could be replaced", hint="name another file")
        try:
            write_page(page, examples, statistics)
        except OSError as error:
            raise SettingsError(f"html: {page}: can't be written: {error.strerror}") from error
    return Inspected(examples, statistics, page)


def _chosen(cache: Cache, settings: InspectSettings, report: Report) -> Sequence[int]:
    ways = {"example": settings.example is not None, **{name: getattr(settings, name) for name in WAYS}}
    asked = [name for name, is_asked in ways.items() if is_asked]
    if len(asked) > 1:
        raise SettingsError(f"{asked[0]}: beside {asked[1]}; choose the examples one way")
    if settings.all:
        return range(len(cache))
    if settings.example is not None:
        if settings.example >= len(cache):
            raise DataError(f"example: {settings.example}: {cache.folder} holds examples 0 to {len(cache) - 1}")
        return [settings.example]
    if settings.worst_cut:
        return _most(cache.cut(), cache, "is cut", report)
    if settings.unknown:
        unknown = load_tokenizer(cache.tokenizer_folder).unk_token_id
        counts = [int((example.source_S == unknown).sum() + (example.target_T == unknown).sum()) for example in cache]
        return _most(np.array(counts), cache, "has unknown tokens", report)
    return [] if settings.stats else [0]


def _most(counts: npt.NDArray[np.int64], cache: Cache, what: str, report: Report) -> list[int]:
    if not counts.any():
        report(Note(f"{cache.folder}: none of its {len(cache)} examples {what}"))
        return []
    return [int(counts.argmax())]


def _shown(cache: Cache, index: int, tokenizer: Tokenizer) -> Shown:
    example, conversation, ids, span = cache.whole(index)
    source, target = example.source_S.tolist(), example.target_T.tolist()
    return Shown(
        index=index,
        conversation=conversation,
        turn=span.turn,
        source_ids=source,
        target_ids=target,
        source_text=tokenizer.decode(source[:-1]),
        target_text=tokenizer.decode(target[: span.target_end - span.target_start]),
        truncated=["source"] * (not span.source_is_whole) + ["target"] * (not span.target_is_whole),
        source_head=span.system_end,
        source_cut=ids[span.system_end : span.source_start].tolist(),
        target_cut=ids[span.target_end : span.answer_end].tolist(),
    )


def _statistics(cache: Cache, batch_size: int) -> Statistics:
    sources, targets = cache.lengths()
    everything = np.arange(len(cache))
    shuffled = np.random.default_rng(0).permutation(everything)
    by_length = epoch_order(sources + targets, batch_size, seed=0, epoch=0)
    return Statistics(
        source=length_histogram(sources),
        target=length_histogram(targets),
        batch_size=batch_size,
        padding_random=round(padding_share(sources, targets, shuffled, batch_size), 4),
        padding_by_length=round(padding_share(sources, targets, by_length, batch_size), 4),
        longest=np.argsort(-(sources + targets), kind="stable")[:NUM_LONGEST].tolist(),
    )
