"""A part of a token cache, which `prepare --shard I/N` writes and `prepare` joins.

    NAME/          an ordinary token cache of the part's records of a dataset
    NAME.records   a row per record that is used, of RECORD_DTYPE
    part.json      format, inputs, and facts that the caches' manifests lack; written last

A folder with a part.json isn't searched for data.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.data.reading.raw_records import RawRecord
from t5tune.errors import DataError
from t5tune.file_names import PART_MANIFEST_FILE
from t5tune.io.atomic import write_json
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import parse_json_object
from t5tune.preparing.cache_writer import CacheWriter
from t5tune.preparing.pipeline import EncodedRecord

PART_FORMAT = 3
RECORD_DTYPE = np.dtype([
    ("key", "<u8", (2,)),  # hash of the texts, and of the learned turns
    ("conversations", "<u4"), ("examples", "<u4"), ("unknown", "<u4"),  # the record's numbers of these
    ("rejected", "<u4"),  # lines of the part's rejected.jsonl before it
    ("line", "<u8"), ("file", "<u4"),  # its place: line, and number of the file
    ("is_pair", "?"), ("has_prefix", "?"),
])  # fmt: skip


class PartWriter(CacheWriter):
    """Writes the files of a part's records, and a row for each record that is used.

    Args:
        files: of the data; the rows contain their numbers.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype[Any],
        rejects_duplicates: bool,
        label_names: Sequence[str],
        files: list[Path],
    ) -> None:
        super().__init__(folder, dtype, rejects_duplicates, label_names)
        self._numbers = {str(file): number for number, file in enumerate(files)}
        self._rows = open(get_records_path(folder), "wb")  # noqa: SIM115 (closed by __exit__)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._rows.close()

    def add(self, record: RawRecord, encoded: EncodedRecord) -> None:
        """Append a record."""
        counts, used = self.counts, self.counts.conversations
        conversations, examples, rejected = self.num_parts, counts.num_examples, counts.rejected.total()
        super().add(record, encoded)
        if counts.conversations == used:
            return
        added = (self.num_parts - conversations, counts.num_examples - examples, encoded.unknown, rejected)
        key = np.frombuffer(encoded.key, "<u8", 2)
        place = record.location.line, self._numbers[record.location.file]
        row = (key, *added, *place, encoded.is_pair, encoded.has_prefix)
        self._rows.write(np.array(row, RECORD_DTYPE).tobytes())


def get_records_path(cache: Path) -> Path:
    """Return the path of the rows of a part's cache, next to it."""
    return cache.with_name(f"{cache.name}.records")


def is_part(folder: Path) -> bool:
    """Whether a folder contains a complete part."""
    return os.path.isfile(folder / PART_MANIFEST_FILE)


def write_part_manifest(folder: Path, inputs: dict[str, Any], datasets: dict[str, Any]) -> dict[str, Any]:
    """Write part.json, and return it."""
    manifest = {"format": PART_FORMAT, "inputs": inputs, "datasets": datasets}
    write_json(folder / PART_MANIFEST_FILE, manifest)
    return manifest


def read_part_manifest(folder: Path) -> dict[str, Any]:
    """Read part.json."""
    path = folder / PART_MANIFEST_FILE
    try:
        manifest = parse_json_object(path.read_bytes())
        version = manifest["format"]
    except (OSError, ValueError, KeyError) as error:
        why = "it has no format" if isinstance(error, KeyError) else describe_error(error)
        hint = f"delete {folder} and prepare this part again"
        raise DataError(f"{path}: not the manifest of a part ({why})", hint=hint) from error
    if version != PART_FORMAT:
        problem = f"{path}: format {version}; this version of t5tune reads format {PART_FORMAT}"
        raise DataError(problem, hint=f"delete {folder.parent} and prepare all parts again")
    return manifest
