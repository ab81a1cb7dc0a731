"""A part of a token cache that `prepare --shard I/N` writes, and from which the cache is joined.

    tokens.bin, conversations.bin, examples.bin   as in the cache, of the part's records; numbers count within the part
    rejected.bin   the part's rejected.jsonl; its line numbers count within the segment
    records.bin    a row per record, of RECORD_DTYPE
    details.bin    a line of JSON per record that has repairs, left out examples, lost characters or a key
    part.json      format, inputs, segments (see record_range.py), counts, and the SHA-256 of each file

The files' names have no suffix of data, and a folder with a part.json isn't searched for data.
"""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from t5tune.data.caches.cache import hash_files
from t5tune.data.reading.raw_records import RawRecord
from t5tune.data.reading.rejections import REJECTION_REASONS
from t5tune.data.tokens.span_corruption import SpanCorruption
from t5tune.data.tokens.tokenizer import SpecialIds
from t5tune.errors import DataError
from t5tune.file_names import CONVERSATIONS_FILE, EXAMPLES_FILE, PART_MANIFEST_FILE, REJECTED_FILE, TOKENS_FILE
from t5tune.io.atomic import hash_file, write_json
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import parse_json_object
from t5tune.preparing.cache_writer import CacheWriter
from t5tune.preparing.pipeline import EncodedRecord

PART_FORMAT = 2
RECORD_DTYPE = np.dtype([
    ("key", "<u8", (2,)),  # hash of the texts, and of what is learned of them
    ("line", "<u8"),  # within the segment, from 1
    ("offset", "<u8"), ("size", "<u8"),  # in bytes; the offset is that in the file
    ("details", "<u8"),  # offset of its line in details.bin, plus 1; 0 if it has none
    ("rejected_bytes", "<u8"),  # of its line in rejected.bin
    ("conversations", "<u8"), ("examples", "<u8"), ("tokens", "<u8"), ("unknown", "<u8"),  # how many of each it has
    ("reason", "u1"),  # in REASONS; 0 if it is usable
    ("is_pair", "?"), ("has_prefix", "?"),
])  # fmt: skip
REASONS = ("", *REJECTION_REASONS)
_REASON_CODES = {reason: code for code, reason in enumerate(REASONS)}
_ROW = struct.Struct("<16s9QB??")
FILES = (TOKENS_FILE, CONVERSATIONS_FILE, EXAMPLES_FILE, "rejected.bin", "records.bin", "details.bin")


class PartWriter(CacheWriter):
    """Writes the files of a part, except for its manifest. Duplicates are kept: the join finds them."""

    def __init__(
        self, folder: Path, num_rows: int, special: SpecialIds, corruption: SpanCorruption | None = None
    ) -> None:
        super().__init__(folder, num_rows, rejects_duplicates=False)
        self._special = special
        self._corruption = corruption
        self._rows = open(folder / "records.bin", "wb")  # noqa: SIM115 (closed by __exit__)
        self._details = open(folder / "details.bin", "wb")  # noqa: SIM115
        self._details_bytes = 0

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._rows.close()
        self._details.close()

    def add(self, record: RawRecord, encoded: EncodedRecord) -> None:
        """Append a record."""
        before = self._get_totals()
        super().add(record, encoded)
        added = [now - then for now, then in zip(self._get_totals(), before, strict=True)]
        location, reason = record.location, encoded.rejection.reason if encoded.rejection is not None else ""
        details = self._write_details(record, encoded) if not reason else 0
        numbers = (location.line, location.offset, record.size, details, *added, encoded.unknown)
        flags = (_REASON_CODES[reason], encoded.is_pair, encoded.has_prefix)
        self._rows.write(_ROW.pack(encoded.key, *numbers, *flags))

    def finish_part(self) -> dict[str, Any]:
        """Return the counts for the part's manifest, with those that a cache's manifest doesn't have."""
        self.finish(None)
        counts = self.counts.describe(self.dtype, self.folder / EXAMPLES_FILE, self._special, self._corruption)
        lost = {text: [count, targets] for text, count, targets in self.counts.lost.iterate_by_targets()}
        return {**counts, "records": self.counts.num_records, "lost": lost}

    def _get_totals(self) -> tuple[int, int, int, int]:
        return self.rejected_bytes, self.num_parts, self.counts.num_examples, self.num_tokens

    def _write_details(self, record: RawRecord, encoded: EncodedRecord) -> int:
        """Write what few records have, and return its offset plus 1; 0 if there is nothing."""
        found = {"repairs": encoded.repairs, "dropped": encoded.dropped, "lost": encoded.lost}
        details: dict[str, Any] = {name: dict(values) for name, values in found.items() if values}
        if record.location.key is not None:
            details["key"] = record.location.key
        if not details:
            return 0
        start = self._details_bytes + 1
        self._details_bytes += self._details.write(json.dumps(details).encode() + b"\n")
        return start


def write_part_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a part, with its format and the hashes of its files, and return it."""
    (folder / REJECTED_FILE).rename(folder / "rejected.bin")
    manifest = {"format": PART_FORMAT, **manifest, "files": hash_files(folder)}
    manifest["sha256"] = _hash_manifest(manifest)
    write_json(folder / PART_MANIFEST_FILE, manifest)
    return manifest


def read_part_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a part.

    Raises:
        DataError: it is broken, or of another format version.
    """
    path = folder / PART_MANIFEST_FILE
    try:
        manifest = parse_json_object(path.read_bytes())
        version = manifest["format"]
    except (OSError, ValueError, KeyError) as error:
        why = "it has no format" if isinstance(error, KeyError) else describe_error(error)
        raise DataError(f"{path}: not the manifest of a part ({why})", hint=_suggest_deleting(folder)) from error
    if version != PART_FORMAT:
        problem = f"{path}: format {version}; this version of t5tune reads format {PART_FORMAT}"
        raise DataError(problem, hint=_suggest_deleting(folder))
    if manifest.get("sha256") != _hash_manifest(manifest):
        raise DataError(f"{path}: differs from what prepare wrote", hint=_suggest_deleting(folder))
    return manifest


def _hash_manifest(manifest: dict[str, Any]) -> str:
    """Hash all of a manifest but its hash."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify_part(folder: Path, manifest: dict[str, Any]) -> None:
    """Verify the hashes of a part's files.

    Raises:
        DataError: a file is missing or has changed; the error names it.
    """
    for name in FILES:
        path = folder / name
        try:
            found = hash_file(path)
        except FileNotFoundError:  # it is missing, or another process has just taken the parts
            found = None
        if found is None or found != manifest["files"].get(name):
            what = "missing from the part" if found is None else "differs from what prepare wrote"
            raise DataError(f"{path}: {what}", hint=f"run prepare --shard {manifest['shard']} again")


def _suggest_deleting(folder: Path) -> str:
    return f"delete {folder} and prepare this part again"


class PartReader:
    """Reads the files of a part from their beginnings to their ends, a piece of each at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._positions = dict.fromkeys(FILES, 0)

    def read(self, name: str, size: int) -> bytes:
        """Read the next `size` bytes of a file."""
        data = self._open(name).read(size)
        self._positions[name] += size
        return data

    def skip(self, name: str, size: int) -> None:
        """Skip the next `size` bytes of a file."""
        if size:
            self._open(name).seek(size, 1)
            self._positions[name] += size

    def tell(self, name: str, size: int) -> int:
        """Return how many items of `size` bytes of a file were read."""
        return self._positions[name] // size

    def read_rows(self, name: str, dtype: np.dtype[Any], count: int) -> Any:
        """Read the next `count` rows of a file; the array can be changed."""
        return np.frombuffer(bytearray(self.read(name, count * dtype.itemsize)), dtype)

    def read_row(self, number: int) -> Any:
        """Return any row of records.bin."""
        size = RECORD_DTYPE.itemsize
        return np.frombuffer(os.pread(self._open("records.bin").fileno(), size, number * size), RECORD_DTYPE)[0]

    def read_details(self, offset: int) -> dict[str, Any]:
        """Return the details of any record, by `details` of its row."""
        if offset == 0:
            return {}
        file = self._open("details.bin")
        file.seek(offset - 1)
        return dict(json.loads(file.readline()))

    def close(self) -> None:
        """Close the files. The next read opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = open(self.folder / name, "rb")  # noqa: SIM115 (closed by `close`)
            self._files[name].seek(self._positions[name])
        return self._files[name]
