"""`t5tune prepare`: encode conversations to a token cache.

result = prepare(PrepareSettings(model_name_or_path="pocket", data_path="chats.jsonl", output_dir="cache"))
result.cache, result.examples
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import find_base, read_config
from t5tune.checkpoints.pocket import find_conversations_file
from t5tune.checkpoints.training_data import TrainingData, write_training_data
from t5tune.data.cache import FORMAT_VERSION, Cache, hash_files, is_cache
from t5tune.data.cache_reuse import find_reusable_manifest
from t5tune.data.chat_template import build_chat_template, write_chat_template
from t5tune.data.data_problems import (
    check_any_example,
    check_any_used,
    check_rejected,
    format_first_rejected,
    make_mixed_data_error,
    report_default_template,
    report_models_template,
    report_problems,
)
from t5tune.data.files import STDIN, Digest, find_files
from t5tune.data.pipeline import EncodedRecord, Pipeline
from t5tune.data.raw_records import RawRecord
from t5tune.data.readers import read_records
from t5tune.data.records import LABELED_BAD
from t5tune.data.sample import choose_default_template, drain, parse_sample, take_sample
from t5tune.data.templates import PAIR_TEMPLATE, Template, find_template, load_template
from t5tune.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from t5tune.data.vocabulary import ExtendedTokenizer, RoundTripCheck, extend_tokenizer
from t5tune.data.worker import BYTES_PER_WORKER, encode_records
from t5tune.data.writer import REJECTED_FILE, CacheWriter
from t5tune.errors import DataError, T5TuneError
from t5tune.families import find_family
from t5tune.file_names import CACHE_MANIFEST_FILE, TEMPLATE_FILE
from t5tune.formatting import format_count
from t5tune.io.atomic import hash_file, remove_abandoned, write_folder_atomically, write_json
from t5tune.io.reasons import join_first
from t5tune.io.yaml_file import to_yaml
from t5tune.progress import Report, silent, track
from t5tune.settings import PrepareSettings
from t5tune.settings.affects import Affects, select_settings
from t5tune.version import __version__

MAX_LISTED_CHARACTERS = 100  # lost characters in the manifest
MIN_RECORDS_TO_STOP = 1000  # max_rejected_fraction isn't checked while fewer records than this were read


@dataclass(frozen=True)
class PrepareResult:
    """The token cache and its counts. `conversations` and `rejected` count records, `truncated_*` counts examples.

    Args:
        up_to_date: the cache existed already and was made from the same inputs, so it wasn't written again.
    """

    cache: Path
    conversations: int
    rejected: int
    examples: int
    source_tokens: int
    target_tokens: int
    truncated_sources: int
    truncated_targets: int
    unknown_tokens: int
    added_tokens: int
    up_to_date: bool
    seconds: float


def prepare(
    settings: PrepareSettings,
    report: Report = silent,
    in_use: bool = False,
    tokenizer_source: Path | None = None,
    setting: str = "data_path",
) -> PrepareResult:
    """Write the token cache of the conversations, or keep an existing one that was made from the same inputs.

    Args:
        in_use: a run was trained on the existing cache, so a cache of other inputs must not replace it.
        tokenizer_source: a cache or adapter whose tokenizer and conversation template replace the base's.
        setting: the setting that `settings.data_path` comes from, for messages.

    Raises:
        T5TuneError: the disk is full, or a file can't be read or written.
        DataError: the data contains nothing to train on, or a file in the way isn't a token cache.
        ModelError: the base has no usable tokenizer, or too few unused embedding rows for the added tokens.
        SettingsError: there is no such conversation template.
    """
    started = time.monotonic()
    try:
        manifest, up_to_date = _prepare(settings, report, in_use, tokenizer_source, setting)
    except OSError as error:
        place = error.filename or settings.output_dir
        raise T5TuneError(f"{os.fsdecode(place)}: {error.strerror or error}") from error
    counts = {field.name: manifest.get(field.name) for field in fields(PrepareResult)}
    return PrepareResult(
        cache=settings.output_dir,
        **{name: count for name, count in counts.items() if isinstance(count, int)},
        added_tokens=len(manifest["added_tokens"]),
        up_to_date=up_to_date,
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass(frozen=True)
class _CacheSource:
    """What a token cache is made from.

    Args:
        name: the setting and its files, for messages.
        records: an iterator over all records; can be consumed once.
        stdin: the hash of standard input, once that has been read.
        num_rows: number of the base's embedding rows.
        default_template: the template's name if it was chosen by the first records; None if it was given or saved.
        purpose: what the data is for, in messages: `train on` or `evaluate on`.
        inputs: the description of everything that the cache depends on, for its manifest.
    """

    files: list[Path]
    name: str
    records: Iterator[RawRecord]
    stdin: Digest
    vocabulary: ExtendedTokenizer
    num_rows: int
    template: Template
    default_template: str | None
    purpose: str
    inputs: dict[str, Any]


def _prepare(
    settings: PrepareSettings, report: Report, in_use: bool, tokenizer_source: Path | None, setting: str
) -> tuple[dict[str, Any], bool]:
    """Return the cache's manifest, and whether the cache was kept."""
    files = _find_data_files(settings, report, setting)
    name = f"{setting}: {join_first(files)}"
    base = find_base(settings)
    num_rows = _count_rows(settings, base)
    stdin = Digest()
    records = read_records(files, settings.max_record_bytes, stdin)
    sample = take_sample(records)
    vocabulary = _choose_vocabulary(settings, base, tokenizer_source, num_rows, sample)
    folder = settings.output_dir
    # a run is resumed with the template that was the default when it was started
    template_folders = (tokenizer_source, base, folder if in_use else None)
    saved_templates = [each / TEMPLATE_FILE for each in template_folders if each is not None]
    template = find_template(settings.conversation_template, saved_templates)
    default_template = None
    if template is None:
        default_template = choose_default_template(sample, files, settings)
        template = load_template(default_template)
    inputs = _describe_inputs(settings, files, vocabulary.tokenizer, template)
    if manifest := find_reusable_manifest(folder, inputs, in_use):
        rejected = Counter(manifest["rejected_by_reason"])
        num_records = manifest["conversations"] + rejected.total()
        check_rejected(rejected, num_records, settings.max_rejected_fraction, name, f"see {folder / REJECTED_FILE}")
        remove_abandoned(folder)
        return manifest, True
    all_records = chain(drain(sample), records)
    purpose = "evaluate on" if setting == "eval_data_path" else "train on"
    source = _CacheSource(
        files, name, all_records, stdin, vocabulary, num_rows, template, default_template, purpose, inputs
    )
    with write_folder_atomically(folder) as staged:
        manifest = _write_cache(staged, settings, source, setting, report)
    num_pairs, num_records = manifest["pairs"], manifest["conversations"]
    if default_template is not None:
        report_default_template(default_template, num_pairs, format_count(num_records, "record"), report)
    elif settings.conversation_template is None and setting == "data_path" and num_pairs == num_records:
        report_models_template(template, report)
    report_problems(manifest, folder, report)
    return manifest, False


def _find_data_files(settings: PrepareSettings, report: Report, setting: str) -> list[Path]:
    """Find the data files; token caches are refused."""
    for path in settings.data_path:
        if is_cache(Path(path)):
            problem = f"{setting}: {path}: is already a token cache"
            raise DataError(problem, hint="prepare reads conversations; give the cache to train")
    return find_files(_list_paths(settings), report, setting)


def _list_paths(settings: PrepareSettings) -> list[str]:
    return [str(find_conversations_file()) if path == "pocket" else path for path in settings.data_path]


def _count_rows(settings: PrepareSettings, base: Path) -> int:
    """Count the base's embedding rows; raise if the base isn't a supported model."""
    config = read_config(base)
    find_family(config, base, settings.family)
    return int(config.get("vocab_size", 0))


def _choose_vocabulary(
    settings: PrepareSettings, base: Path, tokenizer_source: Path | None, num_rows: int, sample: list[RawRecord]
) -> ExtendedTokenizer:
    """Take the tokenizer of `tokenizer_source`, or extend the base's with what the sample of records needs."""
    if tokenizer_source is not None:
        tokenizer = load_tokenizer(tokenizer_source / "tokenizer" if is_cache(tokenizer_source) else tokenizer_source)
        vocabulary = tokenizer.get_vocab()
        added = sorted(vocabulary.keys() - load_tokenizer(base).get_vocab().keys(), key=vocabulary.__getitem__)
        return ExtendedTokenizer(tokenizer, added, [])
    return extend_tokenizer(load_tokenizer(base), settings.add_tokens, num_rows, parse_sample(sample, settings))


def _describe_inputs(
    settings: PrepareSettings, files: list[Path], tokenizer: Tokenizer, template: Template
) -> dict[str, Any]:
    """Describe everything that the cache depends on: the same inputs give the same bytes."""
    vocabulary = tokenizer.backend.to_str() if tokenizer.backend is not None else "bytes"
    chosen = {name: getattr(settings, name) for name in select_settings(PrepareSettings, Affects.CACHE)}
    return {
        # standard input can't be hashed before it is read, so a cache of it is never up to date
        "data": [{"file": file.name, "sha256": hash_file(file) if file != STDIN else None} for file in files],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        # these three are in `chosen` too, and are first as in existing caches
        **{name: chosen[name] for name in ("model_max_length", "num_data", "add_tokens")},
        **chosen,
    }


def _write_cache(
    staged: Path, settings: PrepareSettings, source: _CacheSource, setting: str, report: Report
) -> dict[str, Any]:
    """Write the files of a token cache to `staged`, and return its manifest."""
    save_tokenizer(source.vocabulary.tokenizer, staged / "tokenizer")
    (staged / TEMPLATE_FILE).write_text(to_yaml(dict(vars(source.template))), encoding="utf-8")
    pipeline = Pipeline(staged / "tokenizer", source.template, settings)
    records = track(source.records, "prepare", report, unit="records")
    results = encode_records(records, pipeline, _choose_num_workers(settings, source.files))
    with CacheWriter(staged, source.num_rows, settings.dedupe == "exact") as writer:
        is_complete = _write_examples(results, writer, settings, source)
        unused = [str(file) for file in source.files if is_complete and not writer.usable[str(file)]]
        for path in _list_paths(settings) if unused else []:
            check_any_used(f"{setting}: {path}", list(map(str, find_files([path]))), writer, source.purpose)
        counts = writer.finish(settings.num_data)
    # how records were read, for adapters that are trained on this cache
    reading = {name: getattr(settings, name) for name in select_settings(PrepareSettings, Affects.INFERENCE)}
    reading["source_prefix"] = settings.source_prefix if writer.with_prefix else ""
    write_training_data(staged, TrainingData(counts["examples_with_earlier_turns"] > 0, **reading))
    tokenizer = source.vocabulary.tokenizer
    chat_template = build_chat_template(source.template, tokenizer, reading["source_prefix"])
    write_chat_template(staged / "tokenizer", chat_template, tokenizer)
    manifest = _describe_cache(settings, source, writer, unused, counts)
    manifest["files"] = hash_files(staged)
    write_json(staged / CACHE_MANIFEST_FILE, manifest)
    if settings.eval_fraction:
        Cache(staged, manifest).split_as_prepared()  # raises if eval_fraction leaves nothing to train on
    return manifest


def _choose_num_workers(settings: PrepareSettings, files: list[Path]) -> int:
    if settings.num_workers is not None:
        return settings.num_workers
    cores = os.cpu_count() or 1
    # the size of standard input is unknown; encode_records starts a worker only when all others are busy
    return cores if STDIN in files else min(cores, 1 + sum(file.stat().st_size for file in files) // BYTES_PER_WORKER)


def _write_examples(
    results: Generator[tuple[RawRecord, EncodedRecord], None, None],
    writer: CacheWriter,
    settings: PrepareSettings,
    source: _CacheSource,
) -> bool:
    """Write the examples, at least `num_data` if that is set.

    Returns:
        Whether all records were read.

    Raises:
        DataError: too many records are rejected, no example is left, or a conversation follows pairs that were taken
            for all of the data.
    """

    def check_rejected_so_far() -> None:
        allowed, hint = settings.max_rejected_fraction, format_first_rejected(writer)
        check_rejected(writer.rejected, writer.num_records, allowed, source.name, hint)

    is_complete = True
    for record, encoded in results:
        if source.default_template == PAIR_TEMPLATE and encoded.rejection is None and not encoded.is_pair:
            raise make_mixed_data_error(record.location, writer.conversations)
        writer.add(record, encoded)
        if settings.num_data is not None and writer.num_examples >= settings.num_data:
            is_complete = False
            results.close()
            break
        if writer.num_records - writer.rejected[LABELED_BAD] >= MIN_RECORDS_TO_STOP:
            check_rejected_so_far()
    check_rejected_so_far()
    check_any_example(source.name, writer, source.purpose)
    return is_complete


def _describe_cache(
    settings: PrepareSettings, source: _CacheSource, writer: CacheWriter, unused: list[str], counts: dict[str, Any]
) -> dict[str, Any]:
    """Make the manifest, except for the hashes of the files."""
    tokenizer, added, left_out = source.vocabulary
    check = RoundTripCheck(tokenizer)
    data = [{**file, "sha256": file["sha256"] or source.stdin.value} for file in source.inputs["data"]]
    return {
        "format": FORMAT_VERSION,
        "made_by": f"t5tune {__version__}",
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "added_tokens": added,
        "added_token_ids": tokenizer.convert_tokens_to_ids(added),
        "left_out_tokens": left_out,
        "eval_fraction": settings.eval_fraction,
        "seed": settings.seed,
        "inputs": {**source.inputs, "data": data},
        "unused_files": unused,
        "conversations_with_prefix": writer.with_prefix,
        "pairs": writer.pairs,
        **counts,
        # what the targets contain and the tokenizer can't encode, the most frequent first
        "lost_characters": [
            {"text": text, "becomes": check.round_trip(text), "count": count, "answers": num_targets}
            for text, count, num_targets in islice(writer.lost.iterate_by_targets(), MAX_LISTED_CHARACTERS)
        ],
    }
