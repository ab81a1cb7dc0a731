"""Data files as streams of bytes: which files the paths mean, and gzip and zstd undone on the way.

for path in find_files(["chats/*.jsonl.gz"]):
    for chunk in read_chunks(path):
        ...

A file that can't be trusted is refused by name and position: a broken or cut-off archive, one that isn't what its
name says, UTF-16.
"""

import glob
import gzip
import hashlib
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from t5tune.data.cache import is_cache
from t5tune.errors import DataError
from t5tune.progress import Note, Report, silent

STDIN = Path("-")
TEXT = {".json", ".jsonl", ".ndjson"}
TABLES = {".csv", ".tsv", ".parquet"}
KNOWN = ", ".join(sorted(TEXT | TABLES))
# the first bytes; zstd's second kind is a frame to be skipped, which may come first
PACKED = {".gz": rb"\x1f\x8b", ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"}
CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"  # of UTF-8
WIDE = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # byte order marks of UTF-16 and UTF-32
NAMES_TOLD = 5  # of a folder's files that are passed over


def find_files(data_path: list[str], report: Report = silent) -> list[Path]:
    """The data files that the paths name: `-` is standard input, a folder or a pattern what it holds, sorted.

    Raises:
        DataError: a path can't be read, doesn't exist, has another suffix, or stands for no data file.
    """
    files: list[Path] = []
    for name in data_path:
        try:
            files += _files_of(name, report)
        except OSError as error:
            raise DataError(f"data_path: {name}: can't be read: {error.strerror}") from error
    if files.count(STDIN) > 1:
        raise DataError("data_path: -: standard input can be read once")
    return files


def _files_of(name: str, report: Report) -> list[Path]:
    path = Path(name)
    if not name:
        raise DataError("data_path: empty", hint="name a file or a folder; `.` is the one you are in")
    if path == STDIN:
        return [path]
    if path.is_file():
        if kind_of(path) is None:
            suffix = "".join(path.suffixes[-2:]) or "no suffix"
            raise DataError(f"data_path: {path}: {suffix}: expected one of {KNOWN}, with .gz or .zst (not .parquet)")
        return [path]
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if kind_of(entry) or not entry.name.startswith("."))
    elif path.exists():
        raise DataError(f"data_path: {path}: no regular file", hint="a pipe is read as standard input: `-`")
    elif glob.has_magic(name):
        found = sorted(set(map(Path, _matches(name))))
    else:
        raise DataError(f"data_path: {path}: no such file or folder", hint="check the path's spelling")
    # what prepare wrote below its data is none: refused records, a tokenizer
    caches = {folder for folder in {entry.parent for entry in found} if is_cache(folder) or is_cache(folder.parent)}
    reasons = {entry: "of a token cache" if entry.parent in caches else _unfit(entry) for entry in found}
    files = [entry for entry, reason in reasons.items() if reason is None]
    if over := [f"{entry.name} ({reason})" for entry, reason in reasons.items() if reason is not None]:
        more = f" and {len(over) - NAMES_TOLD} more" if len(over) > NAMES_TOLD else ""
        report(Note(f"data_path: {path}: passed over: {', '.join(over[:NAMES_TOLD])}{more}"))
    if not files:
        raise DataError(f"data_path: {path}: holds no {KNOWN} file")
    return files


def _unfit(path: Path) -> str | None:
    """Why an entry of a folder isn't read; None: it is."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if kind_of(path) is None:
        return "no data file by its name"
    return None if path.is_file() else "no regular file"


def _matches(pattern: str) -> Iterator[str]:
    """What a pattern matches. `**` goes through no links, which may lead in circles."""
    head, *tail = re.split(r"(?:(?<=/)|^)\*\*(?:/|$)", pattern, maxsplit=1)
    if not tail:
        yield from glob.iglob(pattern)
        return
    for top in glob.iglob(head) if head else ["."]:
        for folder, folders, _ in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from _matches(os.path.join("" if folder == "." else glob.escape(folder), tail[0] or "*"))


def kind_of(path: Path) -> str | None:
    """`.json`, `.csv`, `.parquet`, … by a file's name, without what it is packed in; None: no data file."""
    if path == STDIN:
        return ".json"
    *_, before, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    kind = before if last in PACKED and before != ".parquet" else last  # Parquet is packed inside
    return kind if kind in TEXT | TABLES else None


class Digest:
    """The SHA-256 of bytes that can be read once."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._is_whole = False

    def update(self, data: bytes) -> None:
        """Take the next bytes; none mean that they are over."""
        self._hash.update(data)
        self._is_whole = not data

    @property
    def value(self) -> str | None:
        """In hex; None: they weren't read to their end."""
        return self._hash.hexdigest() if self._is_whole else None


class _Stream:
    """A file whose first bytes can be looked at, however slowly they come."""

    def __init__(self, file: BinaryIO, digest: Digest | None) -> None:
        self._file = file
        self._digest = digest
        self._first = b""
        self.beginning = self._first = self.read(4)

    def read(self, size: int) -> bytes:
        """As a file's."""
        first, self._first = self._first[:size], self._first[size:]
        data = self._file.read(size - len(first))
        if self._digest is not None and size > len(first):
            self._digest.update(data)
        return first + data


def read_chunks(path: Path, digest: Digest | None = None) -> Iterator[bytes]:
    """The bytes of a file, unpacked, a mebibyte or so at a time; `digest` takes them as they stand.

    Raises:
        DataError: it can't be read, its archive is broken, or it is UTF-16.
    """
    try:
        with _open(path) as file:
            stream = _Stream(file, digest)
            packing = next((name for name, magic in PACKED.items() if re.match(magic, stream.beginning)), None)
            if path.suffix.lower() in PACKED and packing != path.suffix.lower():
                raise DataError(f"{path}: named {path.suffix}, but its bytes are something else: {stream.beginning!r}")
            for number, chunk in enumerate(_UNPACK[packing](path, stream)):
                if number == 0 and (chunk.startswith(WIDE) or b"\x00" in chunk[:2]):
                    raise DataError(f"{path}: byte 0: UTF-16 or UTF-32, not UTF-8", hint="save the file as UTF-8")
                yield chunk
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    if path != STDIN:
        return open(path, "rb")
    if sys.stdin is None:
        raise DataError("data_path: -: standard input is closed")
    return sys.stdin.buffer


def _plain(path: Path, file: _Stream) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _gzip(path: Path, file: _Stream) -> Iterator[bytes]:
    archive = gzip.GzipFile(fileobj=cast(BinaryIO, file), mode="rb")
    yield from _unpacked(path, archive, "gzip", (EOFError, zlib.error, gzip.BadGzipFile))


def _zstd(path: Path, file: _Stream) -> Iterator[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    archive = zstd.ZstdFile(cast(BinaryIO, file), mode="rb")
    yield from _unpacked(path, archive, "zstd", (EOFError, zstd.ZstdError))


def _unpacked(path: Path, archive: Any, packing: str, broken: tuple[type[Exception], ...]) -> Iterator[bytes]:
    """What an archive holds.

    Args:
        broken: what its library raises on wrong bytes.
    """
    position = 0
    try:
        with archive:
            while chunk := archive.read(CHUNK):
                position += len(chunk)
                yield chunk
    except broken as error:
        raise DataError(
            f"{path}: broken {packing} behind byte {position} of what it holds: {error}", hint="get the file again"
        ) from error


_UNPACK = {None: _plain, ".gz": _gzip, ".zst": _zstd}
