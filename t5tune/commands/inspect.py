"""`t5tune inspect`: what the model will really see of a cache's examples.

result = inspect(InspectSettings(cache="cache", worst_cut=True))
result.examples[0].source_text
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from t5tune.data.batching import epoch_order, padding_share
from t5tune.data.cache import Cache, open_cache
from t5tune.data.cache_view import CacheView, LengthStatistics
from t5tune.data.histogram import length_histogram
from t5tune.data.tokenizer import load_tokenizer
from t5tune.errors import DataError, SettingsError
from t5tune.progress import Note, Report, silent
from t5tune.reports.cache_page import write_page
from t5tune.settings import InspectSettings

NUM_LONGEST = 5
WAYS = ("worst_cut", "unknown", "all")  # to choose examples, beside their numbers


@dataclass(frozen=True)
class Inspected:
    """What was asked for: some examples of a cache, statistics of all of them, or both."""

    examples: CacheView
    statistics: LengthStatistics | None
    page: Path | None


def inspect(settings: InspectSettings, report: Report = silent) -> Inspected:
    """Choose the examples and lay them open.

    Raises:
        DataError: the cache can't be used, or holds no such example.
        SettingsError: more than one choice of examples, or a page that can't be written.
    """
    cache = open_cache(settings.cache)
    examples = CacheView(cache, _chosen(cache, settings, report))
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


def _statistics(cache: Cache, batch_size: int) -> LengthStatistics:
    sources, targets = cache.lengths()
    everything = np.arange(len(cache))
    shuffled = np.random.default_rng(0).permutation(everything)
    by_length = epoch_order(sources + targets, batch_size, seed=0, epoch=0)
    return LengthStatistics(
        source=length_histogram(sources),
        target=length_histogram(targets),
        batch_size=batch_size,
        padding_random=round(padding_share(sources, targets, shuffled, batch_size), 4),
        padding_by_length=round(padding_share(sources, targets, by_length, batch_size), 4),
        longest=np.argsort(-(sources + targets), kind="stable")[:NUM_LONGEST].tolist(),
    )
