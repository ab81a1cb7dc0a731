"""Data files as streams of bytes: which files the paths mean, and gzip and zstd undone on the way.

for path in find_files(["chats/*.jsonl.gz"]):
    for chunk in read_chunks(path):
        ...

A file that can't be trusted is refused by name and position: a broken or cut-off archive, one that isn't what its
name says, UTF-16.
"""

import glob
import gzip
import sys
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

from t5tune.errors import DataError

STDIN = Path("-")
TEXT = {".json", ".jsonl", ".ndjson"}
TABLES = {".csv", ".tsv", ".parquet"}
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"  # of UTF-8
WIDE = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # byte order marks of UTF-16 and UTF-32


def find_files(data_path: list[str]) -> list[Path]:
    """The data files that the paths name: `-` is standard input, a folder or a pattern what it holds, sorted.

    Raises:
        DataError: a path doesn't exist, has another suffix, or stands for no data file.
    """
    files: list[Path] = []
    for name in data_path:
        path = Path(name)
        if path == STDIN or path.is_file():
            found = [path]
            if path != STDIN and kind_of(path) is None:
                known = ", ".join(sorted(TEXT | TABLES))
                raise DataError(
                    f"data_path: {path}: {path.suffix or 'no suffix'}: expected one of {known}, with .gz or .zst or "
                    "without"
                )
        elif path.is_dir():
            found = sorted(entry for entry in path.iterdir() if kind_of(entry) and entry.is_file())
        elif glob.has_magic(name):
            found = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
            found = [match for match in found if kind_of(match) and match.is_file()]
        else:
            raise DataError(f"data_path: {path}: no such file or folder", hint="check the path's spelling")
        if not found:
            known = ", ".join(sorted(TEXT | TABLES))
            raise DataError(f"data_path: {path}: holds no {known} file")
        files += found
    if files.count(STDIN) > 1:
        raise DataError("data_path: -: standard input can be read once")
    return files


def kind_of(path: Path) -> str | None:
    """`.json`, `.csv`, `.parquet`, … by a file's name, without what it is packed in; None: no data file."""
    if path == STDIN:
        return ".json"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else None
    return kind if kind in TEXT | TABLES else None


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked, a mebibyte or so at a time.

    Raises:
        DataError: it can't be read, its archive is broken, or it is UTF-16.
    """
    try:
        with cast(BufferedReader, sys.stdin.buffer) if path == STDIN else open(path, "rb") as file:
            beginning = file.peek(4)[:4]
            packing = next((name for name, magic in PACKED.items() if beginning.startswith(magic)), None)
            if path.suffix.lower() in PACKED and packing != path.suffix.lower():
                raise DataError(f"{path}: named {path.suffix}, but its bytes are something else: {beginning!r}")
            chunks = _UNPACK[packing](path, file)
            for number, chunk in enumerate(chunks):
                if number == 0 and (chunk.startswith(WIDE) or b"\x00" in chunk[:2]):
                    raise DataError(f"{path}: byte 0: UTF-16 or UTF-32, not UTF-8", hint="save the file as UTF-8")
                yield chunk
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def _plain(path: Path, file: Any) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _gzip(path: Path, file: Any) -> Iterator[bytes]:
    yield from _unpacked(path, gzip.GzipFile(fileobj=file, mode="rb"), "gzip", (EOFError, zlib.error, gzip.BadGzipFile))


def _zstd(path: Path, file: Any) -> Iterator[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    yield from _unpacked(path, zstd.ZstdFile(file, mode="rb"), "zstd", (EOFError, zstd.ZstdError))


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
