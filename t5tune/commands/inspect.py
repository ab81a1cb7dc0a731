"""`t5tune inspect`: show the examples of a token cache as the model will see them, and how vocabularies split texts.

result = inspect(InspectSettings(cache="cache", worst_cut=True))
result.examples[0].source_text

result = inspect(InspectSettings(model_name_or_path=["google/mt5-small", "google/byt5-small"], data_path="train.csv"))
result.splits[0].tokens_per_word
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.base import find_base, find_local_base, read_config
from t5tune.data.caches.batching import compute_padding_share, epoch_order
from t5tune.data.caches.cache import Cache, open_cache
from t5tune.data.caches.cache_view import CacheView, ExampleView, LengthStatistics, build_histogram
from t5tune.data.caches.prepared import has_examples, is_prepared, list_caches
from t5tune.data.reading.rejections import Rejection
from t5tune.data.tokens.source_words import write_words
from t5tune.data.tokens.splitting import VocabularySplit, measure_split
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.data.tokens.vocabulary import REPLACEMENT_CHARACTER
from t5tune.errors import DataError, SettingsError
from t5tune.families import find_architecture
from t5tune.file_names import RUN_CACHE_FOLDER
from t5tune.io.reasons import join_first
from t5tune.planning.unused_rows import suggest_trimming
from t5tune.preparing.dataset import open_dataset
from t5tune.preparing.plan import PreparePlan
from t5tune.preparing.resolve_datasets import resolve_datasets
from t5tune.progress import Note, Report, silent
from t5tune.reports.cache_page import render_splits, write_cache_page
from t5tune.reports.page import write_page
from t5tune.runs.folder import RunFolder
from t5tune.settings import InspectSettings, TrainSettings
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.dataset_spec import list_shared
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.groups.data import SplitSettings

NUM_LONGEST = 5
NUM_SPLIT = 1000  # examples of a cache that its vocabulary is measured on
NUM_ON_PAGE = 50  # examples of the HTML page if none are chosen
SELECTION_FLAGS = ("worst_cut", "unknown", "all")  # ways to choose examples, in addition to --example N


@dataclass(frozen=True)
class InspectResult:
    """The chosen examples of a cache, statistics of all of its examples if requested, and the HTML page's path.

    `splits`: how each model's vocabulary splits the sources and the targets, or the cache's vocabulary, if requested.
    """

    examples: Sequence[ExampleView]
    statistics: LengthStatistics | None
    page: Path | None
    splits: list[VocabularySplit]


def inspect(settings: InspectSettings, report: Report = silent) -> InspectResult:
    """Choose examples, decode them, and write the HTML page if requested; without a cache, compare vocabularies.

    Raises:
        DataError: the cache can't be used, or contains no such example; the data has no texts.
        ModelError: a model can't be found, or has no tokenizer.
        SettingsError: more than one selection of examples, or a page that can't be written.
    """
    view, statistics, splits = None, None, []
    if settings.cache is None:
        splits = _compare_vocabularies(settings, report)
    else:
        cache = open_cache(_find_cache(settings.cache, report))
        view = CacheView(cache, _choose_examples(cache, settings, report))
        if settings.stats or settings.html:
            statistics = _compute_statistics(cache, settings.per_device_train_batch_size)
            _suggest_trimming(cache, settings.cache, report)
            splits = _measure_cache(cache)
    if (page := settings.html) is not None:
        if page.is_symlink() or (page.exists() and not page.is_file()):
            raise SettingsError(f"html: {page}: isn't a regular file, so it isn't replaced", hint="choose a new file")
        try:
            if view is None:
                write_page(page, "Vocabularies", render_splits(splits))
            elif (num_shown := write_cache_page(page, view, statistics, splits)) < len(view):
                size = "the page would be too large for a browser"
                report(Note(f"{page} shows the first {num_shown:,} of {len(view):,} examples; with more, {size}"))
        except OSError as error:
            raise SettingsError(f"html: {page}: can't be written: {error.strerror}") from error
    return InspectResult([] if view is None else view, statistics, page, splits)


def _compare_vocabularies(settings: InspectSettings, report: Report) -> list[VocabularySplit]:
    """Split the first records of the data with each model's vocabulary; no weights are downloaded."""
    bases = [BaseModelSettings(model_name_or_path=name) for name in settings.model_name_or_path or []]
    tokenizers = [load_tokenizer(find_base(base, with_weights=False, report=report)) for base in bases]
    (spec,) = resolve_datasets([DatasetSettings(path=settings.data_path or [])], list_shared(settings))
    if spec.cache is not None:
        raise DataError(f"data_path: {spec.cache}: a token cache", hint=f"show it with t5tune inspect {spec.cache}")
    opened = open_dataset(PreparePlan([spec], bases[0], Path(), SplitSettings(), ["none"]), spec, report)
    texts = _group_by_side((each.sources, each.targets) for each in opened.parse_sample())
    rejected = [each.parsed.message for each in opened.sample if isinstance(each.parsed, Rejection)]
    if not texts:
        hint = f"the first rejected record: {rejected[0]}" if rejected else "give data with records"
        raise DataError(f"data_path: {join_first(opened.files)}: contains no texts", hint=hint)
    which = "all" if next(opened.rest, None) is None else "only the first"
    unusable = f", {len(rejected):,} of them rejected: {rejected[0]}" if rejected else ""
    report(Note(f"read {which} records: {len(opened.sample):,}{unusable}"))
    return [
        measure_split(
            base.model_name_or_path, side, each, [write_words(text, spec.source_words, each) for text in found]
        )
        for base, each in zip(bases, tokenizers, strict=True)
        for side, found in texts.items()
    ]


def _group_by_side(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> dict[str, list[str]]:
    """Collect the texts that aren't blank; a side without texts is left out. Raw text has no sides."""
    sides: dict[str, list[str]] = {"sources": [], "targets": []}
    for pair in pairs:
        for found, texts in zip(sides.values(), pair, strict=True):
            found += filter(str.strip, texts)
    if not sides["sources"]:
        return {"texts": sides["targets"]} if sides["targets"] else {}
    return {side: texts for side, texts in sides.items() if texts}


def _measure_cache(cache: Cache) -> list[VocabularySplit]:
    """Split evenly spaced examples, at most NUM_SPLIT; the manifest has the unknown characters of all targets."""
    view = CacheView(cache, range(0, len(cache), 1 + len(cache) // NUM_SPLIT))
    texts = _group_by_side(([each.source_text], [each.target_text]) for each in view)
    lost = [each for each in cache.manifest["lost_characters"] if each["becomes"] == REPLACEMENT_CHARACTER]
    splits: list[VocabularySplit] = []
    for side, found in texts.items():
        unk = view.tokenizer.unk_token
        without_unk = [text.replace(unk, REPLACEMENT_CHARACTER) for text in found]
        unknown = {each["text"]: each["count"] for each in lost}
        if side == "sources":
            count = sum(text.count(unk) for text in found)
            unknown = {REPLACEMENT_CHARACTER: count} if count else {}
        splits.append(replace(measure_split(str(cache.folder), side, view.tokenizer, without_unk), unknown=unknown))
    return splits


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


def _suggest_trimming(cache: Cache, run: Path, report: Report) -> None:
    """Suggest a smaller base for a run whose base is on this machine; weights in fp32 are most of a run's memory."""
    run_settings = RunFolder(run).read_settings(TrainSettings)
    folder = None if run_settings is None else find_local_base(run_settings)
    if run_settings is None or folder is None:
        return
    architecture = find_architecture(read_config(folder), folder, run_settings.family)
    copies, sizes = architecture.list_shared(architecture.is_tied), Counter[str]()
    for name, shape in architecture.derive_shapes().items():
        sizes[architecture.classify(name)] += 4 * math.prod(shape) if name not in copies else 0
    row_bytes = sizes["embedding"] + sizes["head"]
    suggest_trimming([cache], architecture.dimensions.num_rows, row_bytes, sizes.total(), report)


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
        target=build_histogram(targets) if cache.label_task is None else None,
        batch_size=batch_size,
        padding_random=round(compute_padding_share(sources, targets, shuffled, batch_size), 4),
        padding_by_length=round(compute_padding_share(sources, targets, by_length, batch_size), 4),
        longest=np.argsort(-(sources + targets), kind="stable")[:NUM_LONGEST].tolist(),
    )
