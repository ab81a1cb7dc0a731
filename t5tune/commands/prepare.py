"""`t5tune prepare`: encode conversations to a token cache.

result = prepare(PrepareSettings(model_name_or_path="pocket", data_path="chats.jsonl", output_dir="cache"))
result.cache, result.examples
"""

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import find_base, read_config
from t5tune.checkpoints.pocket import find_conversations_file
from t5tune.data.cache import is_cache
from t5tune.data.cache_reuse import find_reusable_manifest
from t5tune.data.data_problems import (
    check_rejected,
    report_default_template,
    report_models_template,
    report_problems,
)
from t5tune.data.files import STDIN, Digest, find_files
from t5tune.data.raw_records import RawRecord
from t5tune.data.readers import read_records
from t5tune.data.sample import choose_default_template, drain, parse_sample, take_sample
from t5tune.data.sources import bring_data
from t5tune.data.templates import PAIR_TEMPLATE, Template, find_template, load_template
from t5tune.data.tokenizer import Tokenizer, load_tokenizer
from t5tune.data.vocabulary import ExtendedTokenizer, extend_tokenizer
from t5tune.data.writer import REJECTED_FILE
from t5tune.distributed.shard import find_shard
from t5tune.errors import DataError, T5TuneError
from t5tune.families import find_architecture
from t5tune.file_names import TEMPLATE_FILE
from t5tune.formatting import format_count
from t5tune.hub.datasets import EVALUATION_SPLITS, DatasetChoice
from t5tune.io.atomic import hash_file, remove_abandoned, write_folder_atomically
from t5tune.io.reasons import join_first
from t5tune.preparing.cache_files import CacheSource, encode_cache, write_cache
from t5tune.preparing.record_checks import RecordChecks
from t5tune.preparing.sharded import find_parts, join_parts, prepare_part
from t5tune.progress import Note, Report, silent
from t5tune.settings import PrepareSettings
from t5tune.settings.affects import Affects, select_settings


@dataclass(frozen=True)
class PrepareResult:
    """The token cache and its counts. `conversations` and `rejected` count records, `truncated_*` counts examples.

    Args:
        up_to_date: the cache existed already and was made from the same inputs, so it wasn't written again.
        shard: the part that was prepared, such as 0/3; None without `--shard`.
        joined: whether the parts are joined, so that the cache is there; if not, the counts are those of the part. None
            without `--shard` and `--join`.
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
    shard: str | None = None
    joined: bool | None = None


def prepare(
    settings: PrepareSettings,
    report: Report = silent,
    in_use: bool = False,
    tokenizer_source: Path | None = None,
    setting: str = "data_path",
) -> PrepareResult:
    """Write the token cache of the conversations, or keep an existing one that was made from the same inputs.

    With `settings.shard`, write a part of it, and join the parts if all are complete; with `settings.join`, only join.

    Args:
        in_use: a run was trained on the existing cache, so a cache of other inputs must not replace it.
        tokenizer_source: a cache or adapter whose tokenizer and conversation template replace the base's.
        setting: the setting that `settings.data_path` comes from, for messages.

    Raises:
        T5TuneError: the disk is full, or a file can't be read or written.
        DataError: the data contains nothing to train on, or a file in the way isn't a token cache.
        ModelError: the base has no usable tokenizer, or too few unused embedding rows for the added tokens.
        SettingsError: there is no such conversation template, or other parts were made from other inputs.
    """
    started = time.monotonic()
    try:
        manifest, facts = _prepare(settings, report, in_use, tokenizer_source, setting)
    except OSError as error:
        place = error.filename or settings.output_dir
        raise T5TuneError(f"{os.fsdecode(place)}: {error.strerror or error}") from error
    counts: dict[str, Any] = {
        field.name: manifest[field.name] for field in fields(PrepareResult) if isinstance(manifest.get(field.name), int)
    }
    return PrepareResult(
        cache=settings.output_dir,
        **counts,
        added_tokens=len(manifest["added_tokens"]),
        seconds=round(time.monotonic() - started, 3),
        **facts,
    )


def _prepare(
    settings: PrepareSettings, report: Report, in_use: bool, tokenizer_source: Path | None, setting: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest of the cache or of a part, and what the result says about this call."""
    shard = find_shard(settings.shard) if settings.shard is not None else None
    facts: dict[str, Any] = {"up_to_date": False, "shard": None if shard is None else str(shard), "joined": None}
    paths = _bring_data(settings, report, setting)
    files = find_files(paths, report, setting)
    stdin = Digest()
    records = read_records(files, settings.max_record_bytes, stdin)
    sample = take_sample(records)
    base = find_base(settings, report=report)
    source = _describe_source(settings, base, paths, files, stdin, sample, in_use, tokenizer_source, setting)
    folder, data = settings.output_dir, source.checks.data
    is_divided = shard is not None or settings.join
    if manifest := find_reusable_manifest(folder, source.inputs, in_use):
        rejected = Counter(manifest["rejected_by_reason"])
        num_records = manifest["conversations"] + rejected.total()
        check_rejected(rejected, num_records, settings.max_rejected_fraction, data, f"see {folder / REJECTED_FILE}")
        remove_abandoned(folder)
        if is_divided:
            find_parts(source).remove()
        return manifest, {**facts, "up_to_date": True, "joined": is_divided or None}
    if not is_divided:
        if (parts := find_parts(source)).are_left():
            words = "parts that prepare --shard left; delete the folder if they aren't needed any more"
            report(Note(f"{parts.folder}: {words}"))
        all_records = chain(drain(sample), records)
        with write_folder_atomically(folder) as staged:
            manifest = write_cache(staged, source, lambda staged: encode_cache(staged, source, all_records, report))
    else:
        sample.clear()  # a part reads its own records
        manifest, is_joined = (
            prepare_part(source, shard, report) if shard is not None else (join_parts(source, report), True)
        )
        facts["joined"] = is_joined
        if not is_joined:
            return manifest, facts
    _report_template(source, manifest, report)
    report_problems(manifest, folder, report)
    return manifest, facts


def _describe_source(
    settings: PrepareSettings,
    base: Path,
    paths: list[str],
    files: list[Path],
    stdin: Digest,
    sample: list[RawRecord],
    in_use: bool,
    tokenizer_source: Path | None,
    setting: str,
) -> CacheSource:
    """Choose the vocabulary and the conversation template by the first records."""
    num_rows = _count_rows(settings, base)
    vocabulary = _choose_vocabulary(settings, base, tokenizer_source, num_rows, sample)
    # a run is resumed with the template that was the default when it was started
    template_folders = (tokenizer_source, base, settings.output_dir if in_use else None)
    saved_templates = [each / TEMPLATE_FILE for each in template_folders if each is not None]
    template = find_template(settings.conversation_template, saved_templates)
    default_template = None
    if template is None:
        default_template = choose_default_template(sample, files, settings)
        template = load_template(default_template)
    inputs = _describe_inputs(settings, files, vocabulary.tokenizer, template)
    checks = RecordChecks(
        data=f"{setting}: {join_first(files)}",
        purpose="evaluate on" if setting == "eval_data_path" else "train on",
        takes_only_pairs=default_template == PAIR_TEMPLATE,
        max_rejected_fraction=settings.max_rejected_fraction,
        num_data=settings.num_data,
    )
    return CacheSource(
        settings, setting, paths, files, stdin, vocabulary, num_rows, template, default_template, inputs, checks
    )


def _report_template(source: CacheSource, manifest: dict[str, Any], report: Report) -> None:
    num_pairs, num_records = manifest["pairs"], manifest["conversations"]
    if source.default_template is not None:
        report_default_template(source.default_template, num_pairs, format_count(num_records, "record"), report)
    elif source.settings.conversation_template is None and source.setting == "data_path" and num_pairs == num_records:
        report_models_template(source.template, report)


def _bring_data(settings: PrepareSettings, report: Report, setting: str) -> list[str]:
    """Replace the names of what isn't on this machine by paths; token caches are refused."""
    for path in settings.data_path:
        if is_cache(Path(path)):
            problem = f"{setting}: {path}: is already a token cache"
            raise DataError(problem, hint="prepare reads conversations; give the cache to train")
    names = [str(find_conversations_file()) if path == "pocket" else path for path in settings.data_path]
    choice = DatasetChoice(settings.data_subset, settings.data_split)
    if setting == "eval_data_path":
        choice = replace(choice, defaults=EVALUATION_SPLITS, setting="eval_data_split")
    return bring_data(names, choice, setting, settings.cache_dir, report)


def _count_rows(settings: PrepareSettings, base: Path) -> int:
    """Count the base's embedding rows; raise if the base isn't a supported model."""
    return find_architecture(read_config(base), base, settings.family).dimensions.num_rows


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
