"""Write the files of a token cache: its tables, its tokenizer and its manifest."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.training_data import TrainingData, write_training_data
from t5tune.data.caches.cache import Cache, hash_files
from t5tune.data.caches.held_out import find_held_out_keys
from t5tune.data.caches.manifest import CACHE_FORMAT
from t5tune.data.labels import LabelTask, sort_names
from t5tune.data.reading.files import STDIN, Digest, find_files
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.sources import describe_origin
from t5tune.data.reading.text_encoding import UTF8
from t5tune.data.reading.workbooks import split_sheet
from t5tune.data.tokens.chat_template import build_chat_template, write_chat_template
from t5tune.data.tokens.encoders import choose_ids_dtype
from t5tune.data.tokens.span_corruption import SpanCorruption, make_corruption
from t5tune.data.tokens.templates import Template
from t5tune.data.tokens.tokenizer import save_tokenizer
from t5tune.data.tokens.vocabulary import ExtendedTokenizer, RoundTripCheck
from t5tune.errors import ModelError
from t5tune.file_names import CACHE_MANIFEST_FILE, EXAMPLES_FILE, TEMPLATE_FILE
from t5tune.io.atomic import write_json
from t5tune.io.yaml_file import to_yaml
from t5tune.preparing.cache_writer import CacheWriter
from t5tune.preparing.counts import RecordCounts
from t5tune.preparing.data_problems import check_any_used
from t5tune.preparing.pipeline import Pipeline
from t5tune.preparing.record_checks import RecordChecks
from t5tune.preparing.worker import BYTES_PER_WORKER, encode_records
from t5tune.progress import Report, track
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.data import SplitSettings
from t5tune.version import __version__

MAX_LISTED_CHARACTERS = 100  # lost characters in the manifest
MADE_BY = f"t5tune {__version__}"


@dataclass(frozen=True)
class CacheSource:
    """The data, the tokenizer and the template of a token cache.

    Args:
        base: the base's name as given, for messages.
        num_cores: how many may encode records.
        setting: the setting that `paths` come from, for messages.
        paths: as given; they lead to `files`.
        stdin: the hash of standard input, once that has been read.
        num_rows: number of the base's embedding rows.
        default_template: the template's name if it was chosen by the first records; None if it was given or saved.
        inputs: the description of everything that the cache depends on, for its manifest.
        records: iterates all records once.
        label_task: describes the labels; without names if any label may occur. None: no labels.
    """

    dataset: DatasetSpec
    split: SplitSettings
    base: str
    num_cores: int
    setting: str
    paths: list[str]
    files: list[Path]
    stdin: Digest
    vocabulary: ExtendedTokenizer
    num_rows: int
    template: Template
    default_template: str | None
    inputs: dict[str, Any]
    checks: RecordChecks
    records: Iterator[RawRecord]
    label_task: LabelTask | None = None

    @property
    def ids_dtype(self) -> np.dtype[Any]:
        """The type of the ids; values of labels have 32 bits."""
        return choose_ids_dtype(self.num_rows) if self.label_task is None else np.dtype("<i4")

    @property
    def label_names(self) -> tuple[str, ...]:
        """The known names of labels."""
        return () if self.label_task is None else self.label_task.names

    def make_pipeline(self, saved: Path) -> Pipeline:
        """Make the pipeline that encodes the records with the tokenizer, which was saved in this folder."""
        return Pipeline(saved, self.template, self.dataset, self.label_task, self.vocabulary.tokenizer)

    @cached_property
    def corruption(self) -> SpanCorruption | None:
        """How spans of raw text are masked; None if it isn't the objective."""
        dataset = self.dataset
        if dataset.kind != "raw text":
            return None
        corruption = make_corruption(dataset.denoisers, self.vocabulary.tokenizer, self.split.seed)
        if corruption is None:
            problem = f"objective: {dataset.objective}: the tokenizer of {self.base} has no sentinels"
            raise ModelError(
                f"{problem} (<extra_id_0>, …), which stand for masked spans", hint="use a T5, mT5, ByT5, UL2 or LongT5"
            )
        return corruption


def write_cache(
    staged: Path,
    source: CacheSource,
    write_records: Callable[[Path], tuple[RecordCounts, bool]],
    is_part: bool = False,
) -> dict[str, Any]:
    """Write the files of a token cache to `staged`, and return its manifest.

    Args:
        write_records: writes the files of the records to `staged`, where the tokenizer is already, and returns the
            counts, and whether all records were read.
        is_part: whether the cache is of a part of the data, which may contain nothing to train on.
    """
    dataset, tokenizer = source.dataset, source.vocabulary.tokenizer
    save_tokenizer(tokenizer, staged / "tokenizer")
    (staged / TEMPLATE_FILE).write_text(to_yaml(dict(vars(source.template))), encoding="utf-8")
    counts, is_complete = write_records(staged)
    is_checked = is_complete and not dataset.pair_lines  # whose records name the first file
    unused = [str(file) for file in source.files if is_checked and not counts.usable[str(file)]]
    for path in source.paths if unused else []:
        files = find_files([path], is_text=source.corruption is not None)
        check_any_used(f"{source.setting}: {path}", list(map(str, files)), counts, source.checks.purpose)
    has_labels = source.label_task is not None
    described = counts.describe(
        source.ids_dtype, staged / EXAMPLES_FILE, tokenizer.special_ids, source.corruption, has_labels
    )
    # how records were read, for adapters that are trained on this cache
    reading = {name: getattr(dataset, name) for name in select_settings(DatasetSpec, Affects.INFERENCE)}
    reading["source_prefix"] = dataset.source_prefix if counts.with_prefix else ""
    reading |= {"objective": dataset.objective, "denoisers": dataset.denoisers}
    labels = source.label_task and replace(source.label_task, names=sort_names(counts.label_names))
    labels = source.label_task if source.label_names else labels
    write_training_data(staged, TrainingData(described["examples_with_earlier_turns"] > 0, **reading, labels=labels))
    if not has_labels:
        chat_template = build_chat_template(source.template, tokenizer, reading["source_prefix"])
        write_chat_template(staged / "tokenizer", chat_template, tokenizer)
    manifest = _describe_cache(source, counts, unused, described)
    manifest["files"] = hash_files(staged)
    write_json(staged / CACHE_MANIFEST_FILE, manifest)
    if (fraction := source.split.eval_fraction) and not is_part:
        find_held_out_keys(Cache(staged, manifest), fraction, source.split.split_seed)  # raises if too few
    return manifest


def encode_cache(
    staged: Path, source: CacheSource, records: Iterable[RawRecord], report: Report
) -> tuple[RecordCounts, bool]:
    """Encode the records and write them, at least `num_data` examples if that is set.

    Returns:
        The counts, and whether all records were read.
    """
    checks, is_complete = source.checks, True
    pipeline, rejects_duplicates = source.make_pipeline(staged / "tokenizer"), source.dataset.dedupe == "exact"
    results = encode_records(track(records, "prepare", report, unit="records"), pipeline, choose_num_workers(source))
    with CacheWriter(staged, source.ids_dtype, rejects_duplicates, source.label_names) as writer:
        counts = writer.counts
        for record, encoded in results:
            checks.check_kind(record, encoded, counts)
            writer.add(record, encoded)
            if checks.num_data is not None and counts.num_examples >= checks.num_data:
                is_complete = False
                results.close()
                break
            checks.check_rejected_so_far(counts)
        checks.check_all(counts)
        writer.finish(checks.num_data)
    return counts, is_complete


def choose_num_workers(source: CacheSource, num_parts: int = 1) -> int:
    """Choose the number of tokenization processes for one of `num_parts` parts of the data."""
    if source.dataset.num_workers is not None:
        return source.dataset.num_workers
    if STDIN in source.files:  # its size is unknown; encode_records starts a worker only when all workers are busy
        return source.num_cores
    size = sum(split_sheet(file)[0].stat().st_size for file in source.files) // num_parts
    return min(source.num_cores, 1 + size // BYTES_PER_WORKER)


def _describe_corruption(source: CacheSource) -> dict[str, Any]:
    if source.corruption is None:
        return {}
    sentinels = list(source.corruption.sentinels)
    return {"span_corruption": {"denoisers": source.dataset.denoisers, "sentinel_ids": sentinels}}


def _describe_labels(source: CacheSource, counts: RecordCounts) -> dict[str, Any]:
    if (task := source.label_task) is None:
        return {}
    form = {"per_token": task.per_token, "several": task.several, "is_ordered": bool(task.names)}
    return {"labels": {"names": [*counts.label_names], **form}}


def _complete_file(file: dict[str, Any], stdin: Digest) -> dict[str, Any]:
    """Add the hash and the encoding of standard input once it has been read."""
    if file["sha256"] is not None:
        return file
    encoding = {} if stdin.encoding == UTF8 else {"encoding": stdin.encoding}
    return {**file, "sha256": stdin.value, **encoding}


def _describe_cache(
    source: CacheSource, counts: RecordCounts, unused: list[str], described: dict[str, Any]
) -> dict[str, Any]:
    tokenizer, added, left_out = source.vocabulary
    check = RoundTripCheck(tokenizer)
    sources = [origin for file in source.files if (origin := describe_origin(file)) is not None]
    data = [_complete_file(file, source.stdin) for file in source.inputs["data"]]
    return {
        "format": CACHE_FORMAT,
        "made_by": MADE_BY,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "source_start_ids": list(tokenizer.special_ids.source_start),
        "source_end_ids": list(tokenizer.special_ids.source_end),
        "added_tokens": added,
        "added_token_ids": tokenizer.convert_tokens_to_ids(added),
        "left_out_tokens": left_out,
        "eval_fraction": source.split.eval_fraction,
        "split_seed": source.split.split_seed,
        "seed": source.split.seed,
        "inputs": {**source.inputs, "data": data},
        **({"sources": sources} if sources else {}),
        **_describe_corruption(source),
        **_describe_labels(source, counts),
        "unused_files": unused,
        "conversations_with_prefix": counts.with_prefix,
        "pairs": counts.pairs,
        **described,
        # characters of the targets that the tokenizer can't encode, the most frequent first
        "lost_characters": [
            {"text": text, "becomes": check.round_trip(text), "count": count, "answers": num_targets}
            for text, count, num_targets in islice(counts.lost.iterate_by_targets(), MAX_LISTED_CHARACTERS)
        ],
    }
