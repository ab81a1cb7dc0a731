"""`t5tune prepare`: conversations -> a token cache.

result = prepare(PrepareSettings(model_name_or_path="pocket", data_path="chats.jsonl", output_dir="cache"))
result.cache, result.examples
"""

import hashlib
import json
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from t5tune import __version__
from t5tune.checkpoints.adapter import TEMPLATE
from t5tune.checkpoints.base import find_base, read_config
from t5tune.checkpoints.pocket import conversations_file
from t5tune.checkpoints.training_data import READING, TrainingData, write_training_data
from t5tune.data.cache import CONTENTS, FORMAT, MANIFEST, Cache, hash_files, is_cache, read_manifest, verify_files
from t5tune.data.files import STDIN, Digest, find_files
from t5tune.data.formats import Conversation
from t5tune.data.pipeline import BYTES_PER_WORKER, Outcome, Recipe, Record, encode_records, read_record
from t5tune.data.readers import read_records
from t5tune.data.records import LABELED_BAD
from t5tune.data.templates import Template, find_template
from t5tune.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from t5tune.data.vocabulary import UNKNOWN, Writable, extend_tokenizer
from t5tune.data.writer import REJECTED, Writer
from t5tune.errors import DataError, SettingsError, T5TuneError
from t5tune.families import family_of
from t5tune.io.atomic import published_folder, scratch_folder, sha256, sweep, write_json
from t5tune.io.yaml_file import to_yaml
from t5tune.progress import Note, Report, silent, track
from t5tune.settings import PrepareSettings
from t5tune.settings.data import ReadingSettings, SelectionSettings, SplitSettings

SAMPLE = 8 << 20  # bytes of records that --add-tokens auto looks at
RECORD_BYTES = 512  # that a record takes beside its text
MOST_LOST = 100  # characters that the manifest lists, and
TOLD = 5  # that are told
CHECK_REJECTED = 1000  # records before max_rejected_fraction stops a run that isn't over
BAD = "labeled bad (label: false, kto_tag: false)"


@dataclass(frozen=True)
class Prepared:
    """What prepare made. Counts are of records, examples and tokens; `truncated_*` counts examples."""

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
    settings: PrepareSettings, report: Report = silent, in_use: bool = False, like: Path | None = None
) -> Prepared:
    """Write the token cache of the conversations, or leave it be where it is what these inputs give.

    Args:
        in_use: a run was trained on the cache that stands there, so that of other inputs must not take its place.
        like: a cache or an adapter, whose tokens and layout these conversations get too.

    Raises:
        T5TuneError: the disk is full, or a file can't be read or written.
        DataError: a file can't be trusted, or nothing in the data can be trained on.
        ModelError: the base has no usable tokenizer, or too few spare rows for the added tokens.
        SettingsError: there is no such conversation template.
    """
    try:
        return _prepared(settings, report, in_use, like, time.monotonic())
    except OSError as error:
        place = error.filename or settings.output_dir
        raise T5TuneError(f"{os.fsdecode(place)}: {error.strerror or error}") from error


def _prepared(settings: PrepareSettings, report: Report, in_use: bool, like: Path | None, started: float) -> Prepared:
    files = _files(settings, report)
    base = find_base(settings)
    template = find_template(settings.conversation_template, [folder / TEMPLATE for folder in (like, base) if folder])
    config = read_config(base)
    family_of(config, base, settings.family)
    num_rows = int(config.get("vocab_size", 0))
    folder = settings.output_dir
    with scratch_folder(Path(tempfile.gettempdir(), "t5tune-prepare")) as scratch:
        scratch.chmod(0o700)
        stdin = Digest()
        records = read_records(files, settings.max_record_bytes, scratch, stdin)
        sample = deque(_first_bytes(records, SAMPLE))
        read = (record for record in map(read_record, sample, repeat(settings)) if isinstance(record, Conversation))
        if like is None:
            tokenizer, added, left_out = extend_tokenizer(load_tokenizer(base), settings.add_tokens, num_rows, read)
        else:
            tokenizer, left_out = load_tokenizer(like / "tokenizer" if is_cache(like) else like), []
            added = _added(tokenizer, load_tokenizer(base))
        inputs = _inputs(settings, files, tokenizer, template)
        if is_cache(folder):
            if manifest := _up_to_date(folder, inputs):
                facts = Counter(manifest["rejected_by_reason"]), manifest["conversations"] + manifest["rejected"]
                _check_rejected(*facts, settings, files, f"see {folder / REJECTED}")
                sweep(folder)
                return _result(folder, manifest, True, started)
            _check_replaceable(folder)
            if in_use:
                _check_inputs(folder, inputs)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"output_dir: {folder}: holds something that is no token cache", hint="name another folder")
        with published_folder(folder) as staged:
            save_tokenizer(tokenizer, staged / "tokenizer")
            (staged / TEMPLATE).write_text(to_yaml(dict(vars(template))), encoding="utf-8")
            recipe = Recipe(staged / "tokenizer", template, settings)
            everything = track(chain(_taken(sample), records), "prepare", report, unit="records")
            outcomes = encode_records(everything, recipe, _num_workers(settings, files))
            with Writer(staged, num_rows, scratch if settings.dedupe == "exact" else None) as writer:
                is_whole = _write(outcomes, writer, settings, files)
                unused = [str(file) for file in files if is_whole and not writer.usable[str(file)]]
                _check_used(unused, writer, settings)
                counts = writer.counts(settings.num_data)
            reading = {name: getattr(settings, name) for name in READING}
            reading["source_prefix"] = settings.source_prefix if writer.with_prefix else ""
            write_training_data(staged, TrainingData(counts["examples_with_earlier_turns"] > 0, **reading))
            for file in inputs["data"]:
                file["sha256"] = file["sha256"] or stdin.value
            manifest = {
                "format": FORMAT,
                "made_by": f"t5tune {__version__}",
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "added_tokens": added,
                "added_token_ids": tokenizer.ids_of(added),
                "left_out_tokens": left_out,
                "eval_fraction": settings.eval_fraction,
                "seed": settings.seed,
                "inputs": inputs,
                "unused_files": unused,
                "conversations_with_prefix": writer.with_prefix,
                **counts,
                "lost_characters": _lost(writer, Writable(tokenizer)),
                "files": hash_files(staged),
            }
            write_json(staged / MANIFEST, manifest)
            if settings.eval_fraction:
                Cache(staged, manifest).parts()  # refuses an eval_fraction that leaves nothing
    _tell(manifest, folder, report)
    return _result(folder, manifest, False, started)


def _added(tokenizer: Tokenizer, base: Tokenizer) -> list[str]:
    """What a tokenizer has beyond the base's, in the order of the ids."""
    vocabulary = tokenizer.vocabulary()
    return sorted(vocabulary.keys() - base.vocabulary().keys(), key=vocabulary.__getitem__)


def _files(settings: PrepareSettings, report: Report) -> list[Path]:
    """The data files, none of which is a token cache."""
    for path in settings.data_path:
        if is_cache(Path(path)):
            raise DataError(
                f"data_path: {path}: is a token cache already",
                hint="prepare reads conversations; train reads the cache",
            )
    return find_files(_paths(settings), report)


def _paths(settings: PrepareSettings) -> list[str]:
    return [str(conversations_file()) if path == "pocket" else path for path in settings.data_path]


def _check_used(unused: list[str], writer: Writer, settings: PrepareSettings) -> None:
    """Refuse a path that gave no conversation; of a folder's or a pattern's files some may give none."""
    for path in _paths(settings) if unused else []:
        names = [str(file) for file in find_files([path])]
        if set(names) <= set(unused):
            bad = sum(writer.labeled_bad[name] for name in names)
            raise DataError(
                f"data_path: {path}: no conversation to train on in it",
                hint=next(
                    (f"the first: {writer.first_rejected[name]}" for name in names if name in writer.first_rejected),
                    _all_bad(bad) if bad else "it holds no record",
                ),
            )


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace a cache into which somebody put files of their own."""
    if foreign := sorted({path.name for path in folder.iterdir()} - CONTENTS):
        raise DataError(
            f"output_dir: {folder}: beside a token cache it holds {', '.join(foreign)}",
            hint="move that, or name another folder",
        )


def _write(
    outcomes: Generator[tuple[Record, Outcome], None, None],
    writer: Writer,
    settings: PrepareSettings,
    files: list[Path],
) -> bool:
    """Write what comes of the records, as far as num_data asks for them; whether that was all of them."""
    is_whole = True
    for record, outcome in outcomes:
        writer.add(record, outcome)
        if settings.num_data is not None and writer.num_examples >= settings.num_data:
            is_whole = False
            outcomes.close()
            break
        if writer.num_records - writer.rejected[LABELED_BAD] >= CHECK_REJECTED:
            _check_rejected(writer.rejected, writer.num_records, settings, files, _first(writer))
    _check_rejected(writer.rejected, writer.num_records, settings, files, _first(writer))
    if writer.num_examples == 0:
        dropped = _reasons(writer.rejected + writer.dropped)
        if writer.num_records and writer.rejected[LABELED_BAD] == writer.num_records:
            raise DataError(
                f"data_path: {_named(files)}: {_all_bad(writer.num_records)}, so none is left to learn from",
                hint="add examples labeled good (label: true, kto_tag: true), or rename a key with another meaning",
            )
        if writer.dropped:
            hint = "its answers were left out by min_target_tokens or drop_truncated_targets"
        elif writer.first_rejected:
            hint = _first(writer)
        else:
            hint = "it is empty; " if not writer.num_records else ""
            hint += 'expected {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}'
        raise DataError(
            f"data_path: {_named(files)}: no conversation to train on among {_records(writer.num_records)}"
            f"{f' ({dropped})' if dropped else ''}",
            hint=hint,
        )
    return is_whole


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"


def _examples(count: int) -> str:
    return "1 example" if count == 1 else f"{count} examples"


def _all_bad(count: int) -> str:
    return f"its only example is {BAD}" if count == 1 else f"all {count} examples are {BAD}"


def _first(writer: Writer) -> str:
    return f"the first: {next(iter(writer.first_rejected.values()), None)}"


def _first_bytes(records: Iterator[Record], size: int) -> Iterator[Record]:
    """As many records as take `size` bytes of memory."""
    while size > 0 and (record := next(records, None)) is not None:
        size -= RECORD_BYTES + record.size
        yield record


def _taken(records: deque[Record]) -> Iterator[Record]:
    """Each once: none is held any longer."""
    while records:
        yield records.popleft()


def _num_workers(settings: PrepareSettings, files: list[Path]) -> int:
    if settings.num_workers is not None:
        return settings.num_workers
    cores = os.cpu_count() or 1
    # of standard input nobody knows the size; a worker is started when all others are busy
    return cores if STDIN in files else min(cores, 1 + sum(file.stat().st_size for file in files) // BYTES_PER_WORKER)


def _inputs(settings: PrepareSettings, files: list[Path], tokenizer: Tokenizer, template: Template) -> dict[str, Any]:
    """What the cache depends on: if all of this is the same, so is every byte of it."""
    vocabulary = tokenizer.backend.to_str() if tokenizer.backend is not None else "bytes"
    chosen = {
        name: getattr(settings, name)
        for mixin in (ReadingSettings, SelectionSettings, SplitSettings)
        for name in mixin.model_fields
        if name not in {"num_workers", "max_rejected_fraction"}
    }
    return {
        # standard input can't be looked at before it is used, so a cache of it is never up to date
        "data": [{"file": file.name, "sha256": sha256(file) if file != STDIN else None} for file in files],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        "model_max_length": settings.model_max_length,
        "num_data": settings.num_data,
        "add_tokens": settings.add_tokens,
        **chosen,
    }


def _up_to_date(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, where the cache is what the inputs give and none of its files was touched since."""
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest["files"])
    except DataError:
        return None
    return manifest if manifest["inputs"] == inputs else None


def _check_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Refuse other inputs than those of the cache.

    Raises:
        SettingsError: naming what differs.
    """
    before = read_manifest(folder)["inputs"]
    names = [name for name in inputs if before.get(name) != inputs[name]]
    if names:
        lines = [f"{name}: {_short(before.get(name))} in {folder}, {_short(inputs[name])} now" for name in names]
        if "data" not in names:
            lines.append(f"data: {folder} would be another")
            names.append("data")
        raise SettingsError(
            *lines,
            hint=f"give what the run began with, go on all the same with --allow-change {' '.join(names)}, or begin "
            "anew with --fresh",
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _check_rejected(
    rejected: Counter[str], num_records: int, settings: PrepareSettings, files: list[Path], hint: str
) -> None:
    allowed, bad = settings.max_rejected_fraction, rejected[LABELED_BAD]
    # half of a KTO set is labeled bad, and nothing is wrong with it
    broken = Counter({reason: count for reason, count in rejected.items() if reason != LABELED_BAD})
    count, num_records = broken.total(), num_records - bad
    if allowed is not None and count > allowed * num_records:
        raise DataError(
            f"data_path: {_named(files)}: {count} of {num_records} records refused "
            f"({_reasons(broken)}), more than max_rejected_fraction {allowed}"
            f"{f'; {bad} more are labeled bad, which does not count' if bad else ''}",
            hint=hint,
        )


def _named(files: Sequence[Path | str]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def _lost(writer: Writer, writable: Writable) -> list[dict[str, Any]]:
    """What the answers hold and the tokenizer can't write, what stands in the most answers first."""
    return [
        {"text": text, "becomes": writable.becomes(text), "count": count, "answers": answers}
        for text, count, answers in islice(writer.lost.worst(), MOST_LOST)
    ]


def _tell(manifest: dict[str, Any], folder: Path, report: Report) -> None:
    """Say what was refused, mended, left out, cut, or can't be written."""
    reasons = Counter(manifest["rejected_by_reason"])
    if bad := reasons.pop(LABELED_BAD, 0):
        report(Note(f"{_examples(bad)} {BAD} left out of supervised training: {folder / REJECTED}", True))
    if reasons:
        report(Note(f"{reasons.total()} records refused ({_reasons(reasons)}): {folder / REJECTED}", True))
    if (prefix := manifest["inputs"]["source_prefix"]) and not manifest["conversations_with_prefix"]:
        report(Note(f"source_prefix: {prefix!r} changed nothing: no record is a pair of source and target", True))
    if unused := manifest["unused_files"]:
        report(Note(f"no conversation to train on in {_named(unused)}", True))
    if manifest["repaired"]:
        report(Note("mended or left out: " + ", ".join(f"{kind} {n}" for kind, n in manifest["repaired"].items())))
    if manifest["dropped"]:
        report(Note("examples left out: " + ", ".join(f"{kind} {n}" for kind, n in manifest["dropped"].items())))
    for side in ("sources", "targets"):
        if count := manifest[f"truncated_{side}"]:
            limit = manifest["inputs"]["model_max_length"]
            report(Note(f"{count} {side} cut to model_max_length {limit}; t5tune inspect {folder} --worst-cut", True))
    lost = manifest["lost_characters"]
    for what, chosen in (
        ("the vocabulary can't write", [item for item in lost if item["becomes"] == UNKNOWN]),
        ("the tokenizer writes otherwise", [item for item in lost if item["becomes"] != UNKNOWN]),
    ):
        if chosen:
            worst = ", ".join(f"{item['text']!r} in {item['answers']}" for item in chosen[:TOLD])
            report(Note(f"{what}, in answers: {worst}{', …' if len(chosen) > TOLD else ''}", True))
    if left := manifest["left_out_tokens"]:
        more = f" and {len(left) - TOLD} more characters" if len(left) > TOLD else ""
        report(Note(f"no spare row of the embedding is left for {' '.join(map(repr, left[:TOLD]))}{more}", True))


def _result(folder: Path, manifest: dict[str, Any], up_to_date: bool, started: float) -> Prepared:
    return Prepared(
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
