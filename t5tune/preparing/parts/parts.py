"""Prepare one part of the data, and join the parts when all are complete. Processes share only a file system."""

import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.tokens.encoders import choose_ids_dtype
from t5tune.data.tokens.tokenizer import save_tokenizer
from t5tune.errors import DataError, T5TuneError
from t5tune.io.atomic import write_folder_atomically
from t5tune.io.reasons import join_first
from t5tune.preparing.cache_files import MADE_BY, CacheSource, choose_num_workers, write_cache
from t5tune.preparing.cache_reuse import find_reusable_manifest
from t5tune.preparing.counts import RecordCounts
from t5tune.preparing.parts.join import Join
from t5tune.preparing.parts.part import PartWriter, read_part_manifest, verify_part, write_part_manifest
from t5tune.preparing.parts.parts_folder import PartsFolder, PartsTakenError
from t5tune.preparing.parts.record_range import ShardReader
from t5tune.preparing.pipeline import EncodedRecord, Pipeline
from t5tune.preparing.record_checks import keep_rejected
from t5tune.preparing.worker import encode_records
from t5tune.progress import Note, Report, track
from t5tune.settings.groups.shard import Shard

ADDED_INPUTS = {"made_by", "dtype"}  # on which parts must agree in addition to the inputs of the cache


def find_parts(source: CacheSource) -> PartsFolder:
    """Return the folder of the parts of a cache, which need not exist."""
    dtype = choose_ids_dtype(source.num_rows).str
    return PartsFolder(source.settings.output_dir, {"made_by": MADE_BY, **source.inputs, "dtype": dtype})


def prepare_part(
    source: CacheSource, shard: Shard, report: Report, before_replacing: Callable[[], None]
) -> tuple[dict[str, Any], bool]:
    """Encode a part, unless it is complete already, and join the parts if all are complete.

    Args:
        before_replacing: called before the cache gets its place.

    Returns:
        The manifest of the cache if the parts are joined, otherwise that of the part; and whether they are.

    Raises:
        DataError: the data can't be used.
        SettingsError: other parts were made from other inputs.
    """
    parts = find_parts(source)
    parts.check_place()
    parts.take_back()
    parts.check_parts(shard.count)
    manifest = parts.read_part(shard) or parts.read_taken_part(shard)
    if manifest is not None:
        report(Note(f"part {shard} was complete already, so it isn't encoded again"))
    else:
        try:
            with parts.write_part(shard) as staged, keep_rejected(staged, source.checks.rejected_file):
                manifest = _encode_part(staged, source, shard, parts.description, report)
        except PartsTakenError:
            manifest = parts.read_taken_part(shard)
        parts.check_parts(shard.count)
    missing = parts.list_missing(shard.count)
    if not missing:
        joined = _join(source, parts, shard.count, report, before_replacing)
    else:  # another process may have prepared the same part, so that all are joined by now
        joined = find_reusable_manifest(source.settings.output_dir, source.inputs, in_use=False)
    if joined is not None:
        parts.remove()
        return joined, True
    if manifest is None:
        problem = f"{parts.folder}: was moved or deleted while part {shard} was prepared"
        raise T5TuneError(problem, hint="run the same command again")
    if not missing or parts.is_being_joined():
        report(Note(f"part {shard} is complete; another process is joining the parts"))
    else:
        shards = join_first(list(map(str, missing)))
        how = "the process that completes the last one joins them"
        report(Note(f"part {shard} is complete in {parts.folder}; still missing: {shards}; {how}"))
    return manifest, False


def find_joined(cache: Path, part: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a cache if its parts have been joined by now, otherwise None.

    Args:
        part: the manifest of one of the parts.
    """
    inputs = {name: value for name, value in part["inputs"].items() if name not in ADDED_INPUTS}
    return find_reusable_manifest(cache, inputs, in_use=False)


def join_parts(source: CacheSource, report: Report, before_replacing: Callable[[], None]) -> dict[str, Any]:
    """Join the parts, and return the manifest of the cache.

    Args:
        before_replacing: called before the cache gets its place.

    Raises:
        DataError: a part is missing or damaged, or the data can't be used.
        SettingsError: the parts were made from other inputs.
    """
    parts = find_parts(source)
    parts.check_place()
    parts.take_back()
    complete = list(parts.list_parts())
    if not complete:
        being_joined = "; another process is joining them" if parts.is_being_joined() else ""
        hint = "prepare each part with --shard I/N first"
        raise DataError(f"join: {parts.folder}: contains no complete part{being_joined}", hint=hint)
    count = complete[0].count
    parts.check_parts(count)
    if missing := parts.list_missing(count):
        problem = f"join: {parts.folder}: still missing: {join_first(list(map(str, missing)))}"
        raise DataError(problem, hint=f"prepare each of them, such as with --shard {missing[0]}")
    manifest = _join(source, parts, count, report, before_replacing)
    if manifest is None:
        raise DataError(f"join: {parts.folder}: another process is joining the parts")
    parts.remove()
    return manifest


def _join(
    source: CacheSource, parts: PartsFolder, count: int, report: Report, before_replacing: Callable[[], None]
) -> dict[str, Any] | None:
    """Join the parts; None if another process does it."""
    settings = source.settings
    try:
        with parts.take_parts() as taken:
            if taken is None:
                return None
            if len(taken) < count:  # another process has begun to put them back, to join them itself
                raise PartsTakenError
            loaded = [(folder, read_part_manifest(folder)) for folder in taken.values()]
            for folder, manifest in loaded:
                _verify_taken(folder, manifest, parts)

            def write_records(staged: Path) -> tuple[RecordCounts, bool]:
                id_size = choose_ids_dtype(source.num_rows).itemsize
                join = Join(loaded, source.files, staged, source.checks, id_size, settings)
                return join.counts, join.run(settings.dedupe == "exact", report)

            with (
                write_folder_atomically(settings.output_dir) as staged,
                keep_rejected(staged, source.checks.rejected_file),
            ):
                manifest = write_cache(staged, source, write_records)
                before_replacing()
            return manifest
    except PartsTakenError:
        return None


def _verify_taken(folder: Path, manifest: dict[str, Any], parts: PartsFolder) -> None:
    """Verify a part that was taken to be joined; an error names it as it will be called again."""
    try:
        verify_part(folder, manifest)
    except DataError as error:
        raise DataError(error.message.replace(str(folder.parent), str(parts.folder)), hint=error.hint) from error


def _encode_part(
    staged: Path, source: CacheSource, shard: Shard, inputs: dict[str, Any], report: Report
) -> dict[str, Any]:
    """Write the files of a part, and return its manifest."""
    settings, tokenizer = source.settings, staged / "tokenizer"
    save_tokenizer(source.vocabulary.tokenizer, tokenizer)
    pipeline = Pipeline(tokenizer, source.template, settings)
    reader = ShardReader(source.files, shard, settings)
    records = track(reader, "prepare", report, unit="records")
    results = encode_records(records, pipeline, choose_num_workers(source, shard.count))
    error = None
    with PartWriter(staged, source.num_rows, source.vocabulary.tokenizer.special_ids, source.corruption) as writer:
        try:
            _write_records(results, writer, reader, source)
        except DataError as raised:
            error = _keep_error(raised, source)
        place = reader.split_at(writer.counts.num_records)
        counts = writer.finish_part()
    shutil.rmtree(tokenizer)
    return write_part_manifest(
        staged,
        {
            "shard": str(shard),
            "inputs": inputs,
            "segments": [list(vars(segment).values()) for segment in reader.segments],
            "error": error and {"place": place, **error},
            "added_tokens": source.vocabulary.added,
            **counts,
        },
    )


def _write_records(
    results: Generator[tuple[RawRecord, EncodedRecord], None, None],
    writer: PartWriter,
    reader: ShardReader,
    source: CacheSource,
) -> None:
    """Write the records of a part; if there are enough examples in it alone, not all."""
    checks, counts, keeps_all = source.checks, writer.counts, source.settings.dedupe == "none"
    for record, encoded in results:
        # the join makes all checks; at the beginning of the data they can be made at once
        is_checked = keeps_all and reader.is_at_beginning(counts.num_records + 1)
        if is_checked:
            checks.check_kind(record, encoded, counts)
        writer.add(record, encoded)
        if keeps_all and checks.num_data is not None and counts.num_examples >= checks.num_data:
            results.close()
            return
        if is_checked:
            checks.check_rejected_so_far(counts)


def _keep_error(error: DataError, source: CacheSource) -> dict[str, Any]:
    """Return the message of an error that the join raises, if one process would read so far.

    Without num_data it would, so the error is raised at once; as is an error of the file system.
    """
    if source.checks.num_data is None or getattr(error.__cause__, "errno", None) is not None:
        raise error
    return {"message": error.message, "hint": error.hint}
