"""Prepare one part of the data, and join the parts when all are complete. Processes share only a file system.

Each part is a folder in `cache.parts`, next to the cache, with an ordinary token cache for each dataset; it is renamed
into place when it is complete. The process that finds all parts complete joins them and renames the result into place.
Two processes that join at the same time write the same bytes.
"""

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from t5tune.data.caches.cache import open_cache
from t5tune.data.caches.manifest import read_manifest
from t5tune.errors import DataError, SettingsError
from t5tune.io.atomic import hash_file, remove_abandoned, write_folder_atomically
from t5tune.io.reasons import join_first
from t5tune.preparing.cache_files import MADE_BY, CacheSource, choose_num_workers, write_cache
from t5tune.preparing.cache_reuse import describe_differences
from t5tune.preparing.counts import RecordCounts
from t5tune.preparing.parts.join import join_tables
from t5tune.preparing.parts.part import (
    PartWriter,
    get_records_path,
    is_part,
    read_part_manifest,
    write_part_manifest,
)
from t5tune.preparing.parts.record_range import read_range
from t5tune.preparing.worker import encode_records
from t5tune.progress import Note, Report, track
from t5tune.settings.groups.shard import Shard

_PART_NAME = re.compile(r"part-(\d+)-of-(\d+)")
_TEMPORARY_NAME = re.compile(r"\.(part-\d+-of-\d+)\.(new|old)-[0-9a-f]+")


class Parts:
    """The folder of the parts of a cache, which need not exist.

    Args:
        cache: the folder of the cache.
        sources: by the names of the datasets; existing token caches have no parts.
    """

    def __init__(self, cache: Path, sources: Mapping[str, CacheSource]) -> None:
        self._cache = cache.resolve()
        self.folder = self._cache.with_name(f"{self._cache.name}.parts")
        self.sources = sources
        self._inputs = {"made_by": MADE_BY, **{name: source.inputs for name, source in sources.items()}}

    def list_complete(self) -> dict[Shard, Path]:
        """List the complete parts, in their order."""
        found = {}
        for path in _list_entries(self.folder):
            if (match := _PART_NAME.fullmatch(path.name)) and is_part(path):
                found[Shard(int(match[1]), int(match[2]))] = path
        return dict(sorted(found.items()))

    def list_missing(self, count: int) -> list[Shard]:
        """List the parts that aren't complete."""
        complete = self.list_complete()
        return [shard for index in range(count) if (shard := Shard(index, count)) not in complete]

    def check(self, count: int) -> None:
        """Check that the folder contains only parts, made from these inputs, and that there are `count` of them."""
        if os.path.ismount(self._cache):  # before anything is encoded
            raise SettingsError(f"{self._cache}: a mount point can't be replaced", hint="choose a folder inside it")
        hint = "move it away, or choose another output_dir"
        problem = f"output_dir: {self.folder}: the parts are written there, but "
        if self.folder.is_symlink():
            raise SettingsError(f"{problem}it is a link", hint=hint)
        if self.folder.exists() and not self.folder.is_dir():
            raise SettingsError(f"{problem}it is a file", hint=hint)
        if foreign := sorted(path.name for path in _list_entries(self.folder) if not _is_own(path)):
            raise SettingsError(f"{problem}it contains {join_first(foreign)}", hint=hint)
        for shard, part in self.list_complete().items():
            self._check_part(shard, part, count)

    def _check_part(self, shard: Shard, part: Path, count: int) -> None:
        manifest = read_part_manifest(part)
        before, now = _flatten(manifest["inputs"]), _flatten(self._inputs)
        before["shard"], now["shard"] = f"one of {shard.count} parts", f"one of {count} parts"
        if lines := describe_differences(before, now):
            choices = ["to continue, use the previous settings, data and version"]
            if lines.keys() == {"shard"}:  # a job array of some tasks, which --shard auto counts
                choices = [f"to prepare one of those {shard.count} parts, name it: --shard I/{shard.count}"]
            raise SettingsError(
                *lines.values(),
                heading=f"{part}: was made from different inputs:",
                choices=[*choices, f"to start over, delete {self.folder}"],
            )

    def write(self, shard: Shard, report: Report) -> list[dict[str, Any]]:
        """Encode a part, unless it is complete already; return the manifest of each dataset."""
        part = self.folder / f"part-{shard.index}-of-{shard.count}"
        if is_part(part) and not _find_damage(part, list(self.sources)):
            report(Note(f"part {shard} was complete already, so it isn't encoded again"))
            return [read_manifest(part / name) for name in self.sources]
        with write_folder_atomically(part, is_shared=True) as staged:
            written = {name: _write_dataset(staged / name, each, shard, report) for name, each in self.sources.items()}
            write_part_manifest(staged, self._inputs, {name: facts for name, (_, facts) in written.items()})
        return [manifest for manifest, _ in written.values()]

    def join(self, name: str, count: int, staged: Path, report: Report) -> dict[str, Any]:
        """Write the cache of a dataset from its parts to `staged`, and return its manifest."""
        parts = [self.folder / f"part-{index}-of-{count}" for index in range(count)]
        for index, part in enumerate(parts):
            if damage := _find_damage(part, [name]):
                raise DataError(damage, hint=f"run prepare --shard {index}/{count} again")
        lost = [read_part_manifest(part)["datasets"][name]["lost"] for part in parts]
        source, caches = self.sources[name], [part / name for part in parts]
        return write_cache(staged, source, lambda staged: join_tables(caches, lost, staged, source, report))

    def remove(self) -> None:
        """Delete the parts that were made from these inputs, once joined, and the leftovers of killed processes."""
        for part in self.list_complete().values():
            with suppress(DataError, FileNotFoundError):  # another process deletes it, too
                if read_part_manifest(part)["inputs"] == self._inputs:
                    old = part.with_name(f".{part.name}.old-{uuid.uuid4().hex[:8]}")
                    part.rename(old)  # a folder with a part of a part would be in the way
                    shutil.rmtree(old, ignore_errors=True)
        for path in _list_entries(self.folder):
            if (match := _TEMPORARY_NAME.fullmatch(path.name)) and match[2] == "old":
                shutil.rmtree(path, ignore_errors=True)
            elif match:
                remove_abandoned(self.folder / match[1])
        with suppress(OSError):  # it contains something else, such as parts in progress
            self.folder.rmdir()


def _list_entries(folder: Path) -> list[Path]:
    """List a folder; empty if it doesn't exist, or another process deletes it at this moment."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []


def _is_own(path: Path) -> bool:
    """Whether an entry of the folder is a part, including a part that is unfinished or being deleted."""
    if _PART_NAME.fullmatch(path.name):
        return is_part(path) or not path.exists()
    return _TEMPORARY_NAME.fullmatch(path.name) is not None


def _flatten(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the inputs of a single dataset by their names, and of several as `dataset: name`."""
    datasets = {name: value for name, value in inputs.items() if name != "made_by"}
    flat: dict[str, Any] = {"made_by": inputs.get("made_by")}
    for name, values in datasets.items():
        flat |= {f"{name}: {key}" if len(datasets) > 1 else key: value for key, value in values.items()}
    return flat


def _find_damage(part: Path, names: list[str]) -> str | None:
    try:
        datasets = read_part_manifest(part)["datasets"]
        for name in names:
            open_cache(part / name)
            records = get_records_path(part / name)
            if not records.is_file() or hash_file(records) != datasets[name]["records_sha256"]:
                return f"{records}: missing from the part, or differs from what prepare wrote"
    except DataError as error:
        return error.message
    return None


def _write_dataset(
    staged: Path, source: CacheSource, shard: Shard, report: Report
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the cache of a part's records of a dataset; return its manifest, and facts that the manifest lacks."""
    staged.mkdir()
    found: list[RecordCounts] = []

    def write_records(staged: Path) -> tuple[RecordCounts, bool]:
        found.append(_encode(staged, source, shard, report))
        return found[0], False

    manifest = write_cache(staged, source, write_records, is_part=True)
    lost = {text: [count, targets] for text, count, targets in found[0].lost.iterate_by_targets()}
    return manifest, {"lost": lost, "records_sha256": hash_file(get_records_path(staged))}


def _encode(staged: Path, source: CacheSource, shard: Shard, report: Report) -> RecordCounts:
    dataset, num_data = source.dataset, source.checks.num_data
    pipeline = source.make_pipeline(staged / "tokenizer")
    records = track(read_range(source.files, shard, dataset), "prepare", report, unit="records")
    results = encode_records(records, pipeline, choose_num_workers(source, shard.count))
    rejects_duplicates = dataset.dedupe == "exact"
    with PartWriter(staged, source.ids_dtype, rejects_duplicates, source.label_names, source.files) as writer:
        for record, encoded in results:
            writer.add(record, encoded)
            # duplicates of other parts don't count, so with dedupe this part may need all of its records
            if num_data is not None and not rejects_duplicates and writer.counts.num_examples >= num_data:
                results.close()
                break
        writer.finish(None)
    return writer.counts
