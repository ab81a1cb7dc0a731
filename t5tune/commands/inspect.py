"""`t5tune inspect`: show the examples of a token cache as the model will see them.

result = inspect(InspectSettings(cache="cache", worst_cut=True))
result.examples[0].source_text
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from t5tune.data.caches.batching import compute_padding_share, epoch_order
from t5tune.data.caches.cache import Cache, open_cache
from t5tune.data.caches.cache_view import CacheView, LengthStatistics, build_histogram
from t5tune.data.caches.prepared import has_examples, is_prepared, list_caches
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import DataError, SettingsError
from t5tune.file_names import RUN_CACHE_FOLDER
from t5tune.io.reasons import join_first
from t5tune.progress import Note, Report, silent
from t5tune.reports.cache_page import write_cache_page
from t5tune.runs.folder import RunFolder
from t5tune.settings import InspectSettings, TrainSettings

NUM_LONGEST = 5
NUM_ON_PAGE = 50  # examples of the HTML page if none are chosen
SELECTION_FLAGS = ("worst_cut", "unknown", "all")  # ways to choose examples, in addition to --example N


@dataclass(frozen=True)
class InspectResult:
    """The chosen examples of a cache, statistics of all of its examples if requested, and the HTML page's path."""

    examples: CacheView
    statistics: LengthStatistics | None
    page: Path | None


def inspect(settings: InspectSettings, report: Report = silent) -> InspectResult:
    """Choose examples, decode them, and write the HTML page if requested.

    Raises:
        DataError: the cache can't be used, or contains no such example.
        SettingsError: more than one selection of examples, or a page that can't be written.
    """
    cache = open_cache(_find_cache(settings.cache, report))
    examples = CacheView(cache, _choose_examples(cache, settings, report))
    statistics = (
        _compute_statistics(cache, settings.per_device_train_batch_size) if settings.stats or settings.html else None
    )
    if (page := settings.html) is not None:
        if page.is_symlink() or (page.exists() and not page.is_file()):
            raise SettingsError(f"html: {page}: isn't a regular file, so it isn't replaced", hint="choose a new file")
        try:
            num_shown = write_cache_page(page, examples, statistics)
        except OSError as error:
            raise SettingsError(f"html: {page}: can't be written: {error.strerror}") from error
        if num_shown < len(examples):
            size = "the page would be too large for a browser"
            report(Note(f"{page} shows the first {num_shown:,} of {len(examples):,} examples; with more, {size}"))
    return InspectResult(examples, statistics, page)


def _find_cache(folder: Path, report: Report) -> Path:
    if not has_examples(folder) and (run_settings := RunFolder(folder).read_settings(TrainSettings)) is not None:
        cache = run_settings.preprocessed_path or folder / RUN_CACHE_FOLDER
        report(Note(f"{folder} is a run folder; its token cache is {cache}"))
        folder = cache
    if not is_prepared(folder):
        return folder
    first, *others = list_caches(folder).values()
    if others:
        caches = join_first(list(map(str, (first, *others))))
        raise DataError(f"cache: {folder}: a token cache of several datasets", hint=f"name one of them: {caches}")
    return first


def _choose_examples(cache: Cache, settings: InspectSettings, report: Report) -> Sequence[int]:
    is_set = {"example": settings.example is not None, **{name: getattr(settings, name) for name in SELECTION_FLAGS}}
    selections = [name for name, value in is_set.items() if value]
    if len(selections) > 1:
        raise SettingsError(f"{selections[0]}: can't be combined with {selections[1]}", hint="use only one of them")
    if settings.all:
        return range(len(cache))
    if settings.example is not None:
        if settings.example >= len(cache):
            raise DataError(f"example: {settings.example}: {cache.folder} contains examples 0 to {len(cache) - 1}")
        return [settings.example]
    if settings.worst_cut:
        return _find_largest(cache.count_cut_tokens(), cache, "is truncated", report)
    if settings.unknown:
        unknown = load_tokenizer(cache.tokenizer_folder).unk_token_id
        texts = ((example.source_S, *example.targets) for example in cache)
        counts = [sum(int((ids == unknown).sum()) for ids in each) for each in texts]
        return _find_largest(np.array(counts), cache, "has unknown tokens", report)
    if settings.html is not None:
        count = min(NUM_ON_PAGE, len(cache))
        if count < len(cache):
            report(Note(f"the page shows {count} of {len(cache):,} examples, evenly spaced; --all shows all of them"))
        return [number * (len(cache) - 1) // max(count - 1, 1) for number in range(count)]  # evenly spaced
    return [] if settings.stats else [0]


def _find_largest(counts: npt.NDArray[np.int64], cache: Cache, what: str, report: Report) -> list[int]:
    if not counts.any():
        report(Note(f"{cache.folder}: none of its examples ({len(cache):,}) {what}"))
        return []
    return [int(counts.argmax())]


def _compute_statistics(cache: Cache, batch_size: int) -> LengthStatistics:
    sources, targets = cache.read_lengths()
    everything = np.arange(len(cache))
    shuffled = np.random.default_rng(0).permutation(everything)
    by_length = epoch_order(sources + targets, batch_size, seed=0, epoch=0)
    return LengthStatistics(
        source=build_histogram(sources),
        target=build_histogram(targets),
        batch_size=batch_size,
        padding_random=round(compute_padding_share(sources, targets, shuffled, batch_size), 4),
        padding_by_length=round(compute_padding_share(sources, targets, by_length, batch_size), 4),
        longest=np.argsort(-(sources + targets), kind="stable")[:NUM_LONGEST].tolist(),
    )
