"""`t5tune prepare`: encode conversations to a token cache.

result = prepare(PrepareSettings(model_name_or_path="pocket", data_path="chats.jsonl", output_dir="cache"))
result.cache, result.examples
"""

import hashlib
import json
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from t5tune import __version__
from t5tune.checkpoints.adapter import TEMPLATE_FILE
from t5tune.checkpoints.base import find_base, read_config
from t5tune.checkpoints.pocket import find_conversations_file
from t5tune.checkpoints.training_data import READER_SETTINGS, TrainingData, write_training_data
from t5tune.data.cache import (
    CACHE_CONTENTS,
    FORMAT_VERSION,
    MANIFEST_FILE,
    Cache,
    hash_files,
    is_cache,
    read_manifest,
    verify_files,
)
from t5tune.data.files import STDIN, Digest, find_files
from t5tune.data.formats import Conversation
from t5tune.data.pipeline import BYTES_PER_WORKER, Outcome, PipelineConfig, Record, convert_record, encode_records
from t5tune.data.readers import read_records
from t5tune.data.records import LABELED_BAD
from t5tune.data.templates import Template, find_template
from t5tune.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from t5tune.data.vocabulary import REPLACEMENT_CHARACTER, RoundTripCheck, extend_tokenizer
from t5tune.data.writer import REJECTED_FILE, CacheWriter
from t5tune.errors import DataError, SettingsError, T5TuneError
from t5tune.families import find_family
from t5tune.io.atomic import hash_file, make_scratch_folder, remove_abandoned, write_folder_atomically, write_json
from t5tune.io.yaml_file import to_yaml
from t5tune.progress import Note, Report, silent, track
from t5tune.settings import PrepareSettings
from t5tune.settings.data import ReadingSettings, SelectionSettings, SplitSettings

SAMPLE_BYTES = 8 << 20  # --add-tokens auto looks at the first records, up to this size
RECORD_OVERHEAD_BYTES = 512  # memory of a record in addition to its text
MAX_LISTED_CHARACTERS = 100  # lost characters in the manifest
MAX_REPORTED_CHARACTERS = 5  # lost characters in a note
MIN_RECORDS_TO_STOP = 1000  # max_rejected_fraction isn't checked while fewer records than this were read
LABELED_BAD_TEXT = "labeled bad (label: false, kto_tag: false)"


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
    settings: PrepareSettings, report: Report = silent, in_use: bool = False, tokenizer_source: Path | None = None
) -> PrepareResult:
    """Write the token cache of the conversations, or keep an existing one that was made from the same inputs.

    Args:
        in_use: a run was trained on the existing cache, so a cache of other inputs must not replace it.
        tokenizer_source: a cache or adapter whose tokenizer and conversation template replace the base's.

    Raises:
        T5TuneError: the disk is full, or a file can't be read or written.
        DataError: the data contains nothing to train on, or a file in the way isn't a token cache.
        ModelError: the base has no usable tokenizer, or too few unused embedding rows for the added tokens.
        SettingsError: there is no such conversation template.
    """
    try:
        return _prepare(settings, report, in_use, tokenizer_source, time.monotonic())
    except OSError as error:
        place = error.filename or settings.output_dir
        raise T5TuneError(f"{os.fsdecode(place)}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Vocabulary:
    """The cache's tokenizer.

    Args:
        added: tokens that the base's tokenizer doesn't have.
        left_out: tokens to add for which no unused embedding row was left.
        num_rows: number of the base's embedding rows.
    """

    tokenizer: Tokenizer
    added: list[str]
    left_out: list[str]
    num_rows: int


@dataclass(frozen=True)
class _CacheSource:
    """What a token cache is made from.

    Args:
        records: an iterator over all records; can be consumed once.
        stdin: the hash of standard input, once that has been read.
        inputs: the description of everything that the cache depends on, for its manifest.
        scratch: a folder for temporary files.
    """

    files: list[Path]
    records: Iterator[Record]
    stdin: Digest
    vocabulary: _Vocabulary
    template: Template
    inputs: dict[str, Any]
    scratch: Path


def _prepare(
    settings: PrepareSettings, report: Report, in_use: bool, tokenizer_source: Path | None, started: float
) -> PrepareResult:
    files = _find_data_files(settings, report)
    base = find_base(settings)
    saved_templates = [folder / TEMPLATE_FILE for folder in (tokenizer_source, base) if folder]
    template = find_template(settings.conversation_template, saved_templates)
    num_rows = _count_rows(settings, base)
    folder = settings.output_dir
    with make_scratch_folder(Path(tempfile.gettempdir(), "t5tune-prepare")) as scratch:
        scratch.chmod(0o700)
        stdin = Digest()
        records = read_records(files, settings.max_record_bytes, scratch, stdin)
        sample = deque(_take_sample(records, SAMPLE_BYTES))
        vocabulary = _choose_vocabulary(settings, base, tokenizer_source, num_rows, sample)
        inputs = _describe_inputs(settings, files, vocabulary.tokenizer, template)
        if manifest := _find_reusable_manifest(settings, files, inputs, in_use):
            return _make_result(folder, manifest, True, started)
        everything = chain(_pop_all(sample), records)
        source = _CacheSource(files, everything, stdin, vocabulary, template, inputs, scratch)
        with write_folder_atomically(folder) as staged:
            manifest = _write_cache(staged, settings, source, report)
    _report_losses(manifest, folder, report)
    return _make_result(folder, manifest, False, started)


def _count_rows(settings: PrepareSettings, base: Path) -> int:
    """Count the base's embedding rows; raise if the base isn't a supported model."""
    config = read_config(base)
    find_family(config, base, settings.family)
    return int(config.get("vocab_size", 0))


def _choose_vocabulary(
    settings: PrepareSettings, base: Path, tokenizer_source: Path | None, num_rows: int, sample: Iterable[Record]
) -> _Vocabulary:
    """Take the tokenizer of `tokenizer_source`, or extend the base's with what the sample of records needs."""
    if tokenizer_source is not None:
        tokenizer = load_tokenizer(tokenizer_source / "tokenizer" if is_cache(tokenizer_source) else tokenizer_source)
        return _Vocabulary(tokenizer, _list_added_tokens(tokenizer, load_tokenizer(base)), [], num_rows)
    converted = map(convert_record, sample, repeat(settings))
    conversations = (record for record in converted if isinstance(record, Conversation))
    return _Vocabulary(*extend_tokenizer(load_tokenizer(base), settings.add_tokens, num_rows, conversations), num_rows)


def _find_reusable_manifest(
    settings: PrepareSettings, files: list[Path], inputs: dict[str, Any], in_use: bool
) -> dict[str, Any] | None:
    """Return the manifest of the existing cache if it was made from these inputs; None: a new cache can be written.

    Raises:
        DataError: too many of its records were rejected, or a file in the way isn't a token cache.
        SettingsError: a run uses the existing cache, and its inputs differ.
    """
    folder = settings.output_dir
    if not is_cache(folder):
        _check_unoccupied(folder)
        return None
    if manifest := _read_matching_manifest(folder, inputs):
        num_records = manifest["conversations"] + manifest["rejected"]
        rejected, hint = Counter(manifest["rejected_by_reason"]), f"see {folder / REJECTED_FILE}"
        _check_rejected(rejected, num_records, settings, files, hint)
        remove_abandoned(folder)
        return manifest
    _check_replaceable(folder)
    if in_use:
        _check_inputs(folder, inputs)
    return None


def _check_unoccupied(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"output_dir: {folder}: exists and isn't a token cache", hint="choose another output_dir")


def _write_cache(staged: Path, settings: PrepareSettings, source: _CacheSource, report: Report) -> dict[str, Any]:
    """Write the files of a token cache to `staged`, and return its manifest."""
    files = source.files
    outcomes = _encode_records(staged, settings, source, report)
    scratch = source.scratch if settings.dedupe == "exact" else None
    with CacheWriter(staged, source.vocabulary.num_rows, scratch) as writer:
        is_complete = _write_examples(outcomes, writer, settings, files)
        unused = [str(file) for file in files if is_complete and not writer.usable[str(file)]]
        _check_used(unused, writer, settings)
        counts = writer.finish(settings.num_data)
    _write_reading_settings(staged, settings, writer, counts)
    for file in source.inputs["data"]:
        file["sha256"] = file["sha256"] or source.stdin.value
    manifest = _describe_cache(settings, source, writer, unused, counts)
    manifest["files"] = hash_files(staged)
    write_json(staged / MANIFEST_FILE, manifest)
    if settings.eval_fraction:
        Cache(staged, manifest).split_as_prepared()  # raises if eval_fraction leaves nothing to train on
    return manifest


def _encode_records(
    staged: Path, settings: PrepareSettings, source: _CacheSource, report: Report
) -> Generator[tuple[Record, Outcome], None, None]:
    """Write the tokenizer and the conversation template to `staged`, and encode the records with them."""
    save_tokenizer(source.vocabulary.tokenizer, staged / "tokenizer")
    (staged / TEMPLATE_FILE).write_text(to_yaml(dict(vars(source.template))), encoding="utf-8")
    pipeline = PipelineConfig(staged / "tokenizer", source.template, settings)
    records = track(source.records, "prepare", report, unit="records")
    return encode_records(records, pipeline, _choose_num_workers(settings, source.files))


def _write_reading_settings(
    staged: Path, settings: PrepareSettings, writer: CacheWriter, counts: dict[str, Any]
) -> None:
    """Write how records were read, for adapters that are trained on this cache."""
    reading = {name: getattr(settings, name) for name in READER_SETTINGS}
    reading["source_prefix"] = settings.source_prefix if writer.with_prefix else ""
    write_training_data(staged, TrainingData(counts["examples_with_earlier_turns"] > 0, **reading))


def _describe_cache(
    settings: PrepareSettings, source: _CacheSource, writer: CacheWriter, unused: list[str], counts: dict[str, Any]
) -> dict[str, Any]:
    """Make the manifest, except for the hashes of the files."""
    tokenizer, added = source.vocabulary.tokenizer, source.vocabulary.added
    return {
        "format": FORMAT_VERSION,
        "made_by": f"t5tune {__version__}",
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "added_tokens": added,
        "added_token_ids": tokenizer.convert_tokens_to_ids(added),
        "left_out_tokens": source.vocabulary.left_out,
        "eval_fraction": settings.eval_fraction,
        "seed": settings.seed,
        "inputs": source.inputs,
        "unused_files": unused,
        "conversations_with_prefix": writer.with_prefix,
        **counts,
        "lost_characters": _list_lost_characters(writer, RoundTripCheck(tokenizer)),
    }


def _list_added_tokens(tokenizer: Tokenizer, base: Tokenizer) -> list[str]:
    """List the tokens of a tokenizer that the base's doesn't have, by id."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary.keys() - base.get_vocab().keys(), key=vocabulary.__getitem__)


def _find_data_files(settings: PrepareSettings, report: Report) -> list[Path]:
    """Find the data files; token caches are refused."""
    for path in settings.data_path:
        if is_cache(Path(path)):
            problem = f"data_path: {path}: is already a token cache"
            raise DataError(problem, hint="prepare reads conversations; give the cache to train")
    return find_files(_list_paths(settings), report)


def _list_paths(settings: PrepareSettings) -> list[str]:
    return [str(find_conversations_file()) if path == "pocket" else path for path in settings.data_path]


def _check_used(unused: list[str], writer: CacheWriter, settings: PrepareSettings) -> None:
    """Raise if one of the given paths has no conversation; single files of a folder or a pattern may have none."""
    for path in _list_paths(settings) if unused else []:
        names = [str(file) for file in find_files([path])]
        if set(names) <= set(unused):
            bad = sum(writer.labeled_bad[name] for name in names)
            hint = _format_all_bad(bad) if bad else "it contains no record"
            if rejected := [writer.first_rejected[name] for name in names if name in writer.first_rejected]:
                hint = f"the first rejected record: {rejected[0]}"
            raise DataError(f"data_path: {path}: contains no conversation to train on", hint=hint)


def _check_replaceable(folder: Path) -> None:
    """Raise if the cache's folder contains files that prepare didn't write: replacing it would delete them."""
    if foreign := sorted({path.name for path in folder.iterdir()} - CACHE_CONTENTS):
        raise DataError(
            f"output_dir: {folder}: contains {', '.join(foreign)} in addition to a token cache",
            hint="move these files away, or choose another output_dir",
        )


def _write_examples(
    outcomes: Generator[tuple[Record, Outcome], None, None],
    writer: CacheWriter,
    settings: PrepareSettings,
    files: list[Path],
) -> bool:
    """Write the examples, at least `num_data` if that is set.

    Returns:
        Whether all records were read.

    Raises:
        DataError: too many records are rejected, or no example is left.
    """
    is_complete = True
    for record, outcome in outcomes:
        writer.add(record, outcome)
        if settings.num_data is not None and writer.num_examples >= settings.num_data:
            is_complete = False
            outcomes.close()
            break
        if writer.num_records - writer.rejected[LABELED_BAD] >= MIN_RECORDS_TO_STOP:
            _check_rejected(writer.rejected, writer.num_records, settings, files, _format_first_rejected(writer))
    _check_rejected(writer.rejected, writer.num_records, settings, files, _format_first_rejected(writer))
    if writer.num_examples == 0:
        raise _explain_no_examples(writer, _format_files(files))
    return is_complete


def _explain_no_examples(writer: CacheWriter, files: str) -> DataError:
    if writer.num_records and writer.rejected[LABELED_BAD] == writer.num_records:
        return DataError(
            f"data_path: {files}: {_format_all_bad(writer.num_records)}, so there is nothing to train on",
            hint="add records labeled good (label: true, kto_tag: true), or rename the key if it means something else",
        )
    if writer.dropped:
        hint = "every target was dropped by min_target_tokens or drop_truncated_targets"
    elif writer.first_rejected:
        hint = _format_first_rejected(writer)
    else:
        hint = "the data is empty; " if not writer.num_records else ""
        hint += 'expected {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'
    dropped = _format_counts(writer.rejected + writer.dropped)
    among = _format_record_count(writer.num_records) + (f" ({dropped})" if dropped else "")
    return DataError(f"data_path: {files}: no conversation to train on among {among}", hint=hint)


def _format_record_count(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"


def _format_all_bad(count: int) -> str:
    return f"its only record is {LABELED_BAD_TEXT}" if count == 1 else f"all {count} records are {LABELED_BAD_TEXT}"


def _format_first_rejected(writer: CacheWriter) -> str:
    return f"the first rejected record: {next(iter(writer.first_rejected.values()), None)}"


def _take_sample(records: Iterator[Record], size: int) -> Iterator[Record]:
    """Yield records until they take `size` bytes of memory."""
    while size > 0 and (record := next(records, None)) is not None:
        size -= RECORD_OVERHEAD_BYTES + record.size
        yield record


def _pop_all(records: deque[Record]) -> Iterator[Record]:
    """Yield each record and drop it from the deque, so that its memory is freed."""
    while records:
        yield records.popleft()


def _choose_num_workers(settings: PrepareSettings, files: list[Path]) -> int:
    if settings.num_workers is not None:
        return settings.num_workers
    cores = os.cpu_count() or 1
    # the size of standard input is unknown; encode_records starts a worker only when all others are busy
    return cores if STDIN in files else min(cores, 1 + sum(file.stat().st_size for file in files) // BYTES_PER_WORKER)


def _describe_inputs(
    settings: PrepareSettings, files: list[Path], tokenizer: Tokenizer, template: Template
) -> dict[str, Any]:
    """Describe everything that the cache depends on: the same inputs give the same bytes."""
    vocabulary = tokenizer.backend.to_str() if tokenizer.backend is not None else "bytes"
    chosen = {
        name: getattr(settings, name)
        for mixin in (ReadingSettings, SelectionSettings, SplitSettings)
        for name in mixin.model_fields
        if name not in {"num_workers", "max_rejected_fraction"}
    }
    return {
        # standard input can't be hashed before it is read, so a cache of it is never up to date
        "data": [{"file": file.name, "sha256": hash_file(file) if file != STDIN else None} for file in files],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        "model_max_length": settings.model_max_length,
        "num_data": settings.num_data,
        "add_tokens": settings.add_tokens,
        **chosen,
    }


def _read_matching_manifest(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest if the cache was made from these inputs and its files are unchanged, else None."""
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest["files"])
    except DataError:
        return None
    return manifest if manifest["inputs"] == inputs else None


def _check_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Check that the inputs are those of the cache.

    Raises:
        SettingsError: they differ; one line for each input that does.
    """
    before = read_manifest(folder)["inputs"]
    names = [name for name in inputs if before.get(name) != inputs[name]]
    if names:
        lines = [
            f"{name}: {_abbreviate(before.get(name))} in {folder}, now {_abbreviate(inputs[name])}" for name in names
        ]
        if "data" not in names:
            lines.append(f"data: the token cache {folder} would have to be rebuilt")
            names.append("data")
        raise SettingsError(
            *lines,
            hint="use the values that the run started with, resume anyway with "
            f"--allow-change {' '.join(names)}, or start over with --fresh",
        )


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _check_rejected(
    rejected: Counter[str], num_records: int, settings: PrepareSettings, files: list[Path], hint: str
) -> None:
    allowed, bad = settings.max_rejected_fraction, rejected[LABELED_BAD]
    # in a KTO dataset half of the records are labeled bad, which doesn't mean that the records are broken
    broken = Counter({reason: count for reason, count in rejected.items() if reason != LABELED_BAD})
    count, num_records = broken.total(), num_records - bad
    if allowed is not None and count > allowed * num_records:
        raise DataError(
            f"data_path: {_format_files(files)}: {count} of {num_records} records rejected "
            f"({_format_counts(broken)}), more than max_rejected_fraction {allowed}"
            f"{f'; {bad} more are labeled bad and not counted' if bad else ''}",
            hint=hint,
        )


def _format_files(files: Sequence[Path | str]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def _list_lost_characters(writer: CacheWriter, writable: RoundTripCheck) -> list[dict[str, Any]]:
    """List what the targets contain and the tokenizer can't encode, the most frequent first."""
    return [
        {"text": text, "becomes": writable.round_trip(text), "count": count, "answers": num_targets}
        for text, count, num_targets in islice(writer.lost.iterate_by_targets(), MAX_LISTED_CHARACTERS)
    ]


def _report_losses(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    """Report what was rejected, repaired, left out or truncated, and which characters can't be encoded."""
    _report_rejections(manifest, folder, report)
    if (prefix := manifest["inputs"]["source_prefix"]) and not manifest["conversations_with_prefix"]:
        report(Note(f"source_prefix: {prefix!r} has no effect: no record is a source/target pair", True))
    if unused := manifest["unused_files"]:
        report(Note(f"no conversation to train on in {_format_files(unused)}", True))
    if manifest["repaired"]:
        report(Note("repaired or left out: " + ", ".join(f"{kind} {n}" for kind, n in manifest["repaired"].items())))
    if manifest["dropped"]:
        report(Note("examples left out: " + ", ".join(f"{kind} {n}" for kind, n in manifest["dropped"].items())))
    for side in ("sources", "targets"):
        if count := manifest[f"truncated_{side}"]:
            limit = manifest["inputs"]["model_max_length"]
            shown_by = f"t5tune inspect {folder} --worst-cut shows the worst"
            report(Note(f"{count} {side} truncated to model_max_length {limit}; {shown_by}", True))
    _report_lost_characters(manifest["lost_characters"], report)
    _report_left_out_tokens(manifest["left_out_tokens"], report)


def _report_rejections(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    reasons = Counter(manifest["rejected_by_reason"])
    if bad := reasons.pop(LABELED_BAD, 0):
        records = f"{_format_record_count(bad)} {LABELED_BAD_TEXT}"
        report(Note(f"{records} left out of supervised training: {folder / REJECTED_FILE}", True))
    if reasons:
        report(Note(f"{reasons.total()} records rejected ({_format_counts(reasons)}): {folder / REJECTED_FILE}", True))


def _report_lost_characters(lost: list[dict[str, Any]], report: Report) -> None:
    for what, chosen in (
        ("not in the vocabulary", [item for item in lost if item["becomes"] == REPLACEMENT_CHARACTER]),
        ("changed by the tokenizer", [item for item in lost if item["becomes"] != REPLACEMENT_CHARACTER]),
    ):
        if chosen:
            worst = ", ".join(map(_format_lost, chosen[:MAX_REPORTED_CHARACTERS]))
            more = ", …" if len(chosen) > MAX_REPORTED_CHARACTERS else ""
            report(Note(f"{what}: {worst}{more}", True))


def _format_lost(item: dict[str, Any]) -> str:
    return f"{item['text']!r} (in {item['answers']} {'target' if item['answers'] == 1 else 'targets'})"


def _report_left_out_tokens(left_out: list[str], report: Report) -> None:
    if left_out:
        tokens = " ".join(map(repr, left_out[:MAX_REPORTED_CHARACTERS]))
        num_more = len(left_out) - MAX_REPORTED_CHARACTERS
        more = f" and {num_more} more tokens" if num_more > 0 else ""
        report(Note(f"no unused embedding row is left for {tokens}{more}", True))


def _make_result(folder: Path, manifest: dict[str, Any], up_to_date: bool, started: float) -> PrepareResult:
    return PrepareResult(
        cache=folder,
        conversations=manifest["conversations"],
        rejected=manifest["rejected"],
        examples=manifest["examples"],
        source_tokens=manifest["source_tokens"],
        target_tokens=manifest["target_tokens"],
        truncated_sources=manifest["truncated_sources"],
        truncated_targets=manifest["truncated_targets"],
        unknown_tokens=manifest["unknown_tokens"],
        added_tokens=len(manifest["added_tokens"]),
        up_to_date=up_to_date,
        seconds=round(time.monotonic() - started, 3),
    )
