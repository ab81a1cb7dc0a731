"""Find data files, and read them as streams of UTF-8, decompressing gzip and zstd.

    for path in find_files(["chats/*.jsonl.gz"]):
        for chunk in read_chunks(path):
            ...

A broken file is refused with its name and position: a damaged or incomplete archive, content that doesn't match the
file's name, or a text whose encoding isn't clear.
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

from t5tune.data.caches.cache import is_cache
from t5tune.data.reading.text_encoding import MARKS, UTF8, find_encoding, read_as_utf8
from t5tune.data.reading.workbooks import list_sheets, split_sheet
from t5tune.errors import DataError
from t5tune.file_names import (
    CHECKPOINT_MANIFEST_FILE,
    JSON_SUFFIXES,
    MIXTURE_FILE,
    PART_MANIFEST_FILE,
    REJECTED_SUFFIX,
    SETTINGS_FILE,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
)
from t5tune.io.reasons import join_first
from t5tune.progress import Note, Report, silent
from t5tune.settings.loading import SETTINGS_HEADER
from t5tune.settings.records_in_memory import is_stored

STDIN = Path("-")
TEXT_HINT = "--objective span-corruption trains on it, as in T5's pretraining"
PAIR_HINT = "--pair-lines reads two text files line by line, the sources and the targets"
SPREADSHEET_SUFFIXES = {".xlsx", ".xlsm", ".xls", ".xlsb", ".ods", ".numbers"}
BINARY_SUFFIXES = {".parquet", ".xlsx"}  # which compress internally
KNOWN_SUFFIXES = ", ".join(sorted(JSON_SUFFIXES | TABLE_SUFFIXES))
# patterns of the first bytes; zstd's second alternative is a skippable frame, which may come first
COMPRESSION_MAGIC = {".gz": rb"\x1f\x8b", ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"}
READ_CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8


def find_files(
    data_path: list[str], report: Report = silent, setting: str = "data_path", is_text: bool = False, pair: bool = False
) -> list[Path]:
    """Find the data files of `data_path`: files, folders, glob patterns, and `-` for standard input.

    The files of a folder or a pattern are sorted. `setting` is named in messages. `is_text`: raw text is data, too.
    `pair`: the paths are two text files of any name.
    """
    files: list[Path] = []
    if pair:
        given, hint = f"{setting}: {' '.join(data_path)}", "name the file of the sources, then the file of the targets"
        if len(data_path) != 2:
            raise DataError(f"{given}: pair_lines reads two text files", hint=hint)
        if missing := [name for name in data_path if not os.path.isfile(name)]:
            raise DataError(f"{setting}: {missing[0]}: no such file", hint="check the path's spelling")
        if os.path.samefile(*data_path):
            raise DataError(f"{given}: pair_lines reads two text files, and these are the same file", hint=hint)
        return [*map(Path, data_path)]
    for name in data_path:
        try:
            files += _resolve_path(name, report, setting, is_text)
        except OSError as error:
            raise DataError(f"{setting}: {name}: can't be read: {error.strerror}") from error
    if files.count(STDIN) > 1:
        raise DataError(f"{setting}: -: standard input can be read only once")
    return files


def _resolve_path(name: str, report: Report, setting: str, is_text: bool) -> list[Path]:
    path = Path(name)
    if not name:
        raise DataError(f"{setting}: empty", hint="name a file or a folder; `.` is the current folder")
    if path == STDIN:
        if sys.stdin is None:
            raise DataError(f"{setting}: -: standard input is closed")
        return [path]
    if split_sheet(path)[0].is_file():
        _check_suffix(path, setting, is_text)
        if path.suffix.lower() == ".xlsx" and len(sheets := list_sheets(path)) > 1:
            others = f"for {join_first(sheets[1:])}, add the name: '{path}:{sheets[1]}'"
            report(Note(f"{setting}: {path}: reading the sheet {sheets[0]}; {others}"))
        return [path]
    if path.is_dir():
        found = sorted(
            entry for entry in path.iterdir() if find_data_suffix(entry, is_text) or not entry.name.startswith(".")
        )
    elif path.exists():
        hint = "to read a pipe, redirect it to standard input and pass `-`"
        raise DataError(f"{setting}: {path}: not a regular file", hint=hint)
    elif glob.has_magic(name):
        found = sorted(set(map(Path, _expand_pattern(name))))
    else:
        problem = f"{setting}: {path}: no such file or folder"
        if is_stored(path):
            raise DataError(
                problem, hint="create the settings again: records in memory are lost when their process ends"
            )
        raise DataError(problem, hint=_explain_variables(name, setting) or "check the path's spelling")
    files = _select_data_files(path, found, report, setting, is_text)
    if not files:
        problem = f"{setting}: {path}: contains no {KNOWN_SUFFIXES} file"
        raise DataError(problem, hint=_suggest_export(found) or _explain_variables(name, setting))
    return files


def _explain_variables(name: str, setting: str) -> str | None:
    if "$" not in name:
        return None
    return f"only a shell expands variables, so use --{setting.replace('_', '-')} or T5TUNE_{setting.upper()}"


def _check_suffix(path: Path, setting: str, is_text: bool) -> None:
    if find_data_suffix(path, is_text) is not None:
        return
    suffix = "".join(path.suffixes[-2:]) or "no suffix"
    if find_data_suffix(path, is_text=True) is not None:
        raise DataError(f"{setting}: {path}: {suffix}: raw text", hint=f"{TEXT_HINT}; {PAIR_HINT}")
    expected = f"expected one of {KNOWN_SUFFIXES}, optionally with .gz or .zst (except .parquet)"
    raise DataError(f"{setting}: {path}: {suffix}: {expected}", hint=_suggest_export([path]) or PAIR_HINT)


def _suggest_export(paths: list[Path]) -> str | None:
    spreadsheet = next((path for path in paths if path.suffix.lower() in SPREADSHEET_SUFFIXES), None)
    if spreadsheet is not None and spreadsheet.suffix.lower() == ".xlsx":
        return f"name the workbook: {spreadsheet}"
    return f"save {spreadsheet.name} as .xlsx or CSV" if spreadsheet else None


def _select_data_files(path: Path, found: list[Path], report: Report, setting: str, is_text: bool) -> list[Path]:
    # a token cache in a data folder contains .json and .jsonl files that aren't data: rejected records, a tokenizer
    folders = {entry.parent for entry in found}
    caches = {folder for folder in folders if _is_prepared(folder) or is_cache(folder) or is_cache(folder.parent)}
    # metrics, samples and predictions aren't data either, unless the user names such a file
    outputs = {folder for folder in folders if _is_output(folder)}
    reasons = {
        entry: "part of a token cache"
        if entry.parent in caches
        else "t5tune wrote it"
        if entry.parent in outputs or entry.name.endswith(REJECTED_SUFFIX)
        else _explain_skipping(entry, is_text, path.suffix)
        for entry in found
    }
    files = [entry for entry, reason in reasons.items() if reason is None]
    if over := [f"{entry.name} ({reason})" for entry, reason in reasons.items() if reason is not None]:
        report(Note(f"{setting}: {path}: skipped: {join_first(over)}"))
    return files


def _is_output(folder: Path) -> bool:
    # the output of a command contains the settings that made it; a checkpoint has a manifest
    try:
        header = (folder / SETTINGS_FILE).read_bytes()[: len(SETTINGS_HEADER)]
    except OSError:
        return (folder / CHECKPOINT_MANIFEST_FILE).is_file()
    return header == SETTINGS_HEADER.encode()


def _is_prepared(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MIXTURE_FILE, PART_MANIFEST_FILE))


def _explain_skipping(path: Path, is_text: bool, pattern_suffix: str) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if find_data_suffix(path, is_text) is None:
        return "unknown suffix"
    if find_data_suffix(path) == ".xlsx" != pattern_suffix.lower():  # often a copy of other data
        return "a workbook, which is read only by its name"
    return None if path.is_file() else "not a regular file"


def _expand_pattern(pattern: str) -> Iterator[str]:
    # `**` doesn't follow links, which may form cycles
    head, *tail = re.split(r"(?:(?<=/)|^)\*\*(?:/|$)", pattern, maxsplit=1)
    if not tail:
        yield from glob.iglob(pattern)
        return
    for top in glob.iglob(head) if head else ["."]:
        for folder, folders, _ in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from _expand_pattern(os.path.join("" if folder == "." else glob.escape(folder), tail[0] or "*"))


def find_data_suffix(path: Path, is_text: bool = False) -> str | None:
    """Return a file's data suffix without its compression suffix (`.json`, `.csv`, …); None: not a data file."""
    if path == STDIN:
        return ".json"
    *_, before, last = "", "", *(suffix.lower() for suffix in split_sheet(path)[0].suffixes)
    kind = before if last in COMPRESSION_MAGIC and before not in BINARY_SUFFIXES else last
    known = JSON_SUFFIXES | TABLE_SUFFIXES | (TEXT_SUFFIXES if is_text else set())
    return kind if kind in known else None


class Digest:
    """The SHA-256 of a stream that can be read only once, and its encoding."""

    def __init__(self) -> None:
        self.encoding = UTF8
        self._hash = hashlib.sha256()
        self._is_whole = False

    def update(self, data: bytes) -> None:
        """Add the next bytes; empty bytes mark the end of the stream."""
        self._hash.update(data)
        self._is_whole = not data

    @property
    def value(self) -> str | None:
        """The hash in hexadecimal; None: the stream wasn't read to its end."""
        return self._hash.hexdigest() if self._is_whole else None


class _PeekableStream:
    """A file with its first bytes as `beginning`, even if it is a slow pipe that can't seek."""

    def __init__(self, file: BinaryIO, digest: Digest | None) -> None:
        self._file = file
        self._digest = digest
        self._first = b""
        self.beginning = self._first = self.read(4)

    def read(self, size: int) -> bytes:
        """Read like a file object."""
        first, self._first = self._first[:size], self._first[size:]
        data = self._file.read(size - len(first))
        if self._digest is not None and size > len(first):
            self._digest.update(data)
        return first + data


def read_chunks(path: Path, encoding: str | None = None, digest: Digest | None = None) -> Iterator[bytes]:
    """Yield the decompressed text of a file as UTF-8, in chunks of about 1 MiB.

    Args:
        encoding: of a file without a byte order mark; None: it is detected. Records in memory are UTF-8.
        digest: hashes the bytes as stored, and gets the encoding.
    """
    facts = Digest() if digest is None else digest

    def note(found: str) -> None:
        facts.encoding = found

    given = UTF8 if is_stored(path) else encoding
    return read_as_utf8(_read_bytes(path, digest), given, str(path), note)


def find_file_encoding(path: Path, given: str | None) -> str:
    """Find the encoding of a text file; `given` is the encoding of a file without a byte order mark."""
    return UTF8 if is_stored(path) else find_encoding(_read_bytes(path), given, str(path))


def find_encodings(files: list[Path], given: str | None, stdin: Digest, report: Report) -> dict[Path, str]:
    """Find the encoding of each text file that isn't UTF-8, and report it unless it is `given`."""
    texts = [file for file in files if find_data_suffix(file, is_text=True) not in BINARY_SUFFIXES]
    found = {file: stdin.encoding if file == STDIN else find_file_encoding(file, given) for file in texts}
    others = {file: encoding for file, encoding in found.items() if encoding != UTF8}
    for encoding in dict.fromkeys(others.values()):
        if encoding != given:
            names = join_first([file for file in others if others[file] == encoding])
            advice = "" if encoding in MARKS.values() else "; use --encoding if this is wrong"
            report(Note(f"read as {encoding}: {names}{advice}"))
    return others


def _read_bytes(path: Path, digest: Digest | None = None) -> Iterator[bytes]:
    try:
        with open(path, "rb") if path != STDIN else sys.stdin.buffer as file:
            stream = _PeekableStream(file, digest)
            compression = _detect_compression(path, stream.beginning)
            archive, damages = _open_archive(stream, compression)
            position = 0
            try:
                while chunk := archive.read(READ_CHUNK_BYTES):
                    position += len(chunk)
                    yield chunk
            except damages as error:
                problem = f"{path}: broken {compression} archive after {position} decompressed bytes: {error}"
                raise DataError(problem, "download or copy the file again", "data_path") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def is_compressed(path: Path) -> bool:
    """Whether a file's content is compressed."""
    try:
        with open(path, "rb") as file:
            return _detect_compression(path, file.read(4)) is not None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def read_byte_range(path: Path, start: int, end: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` to `end`, as stored, in chunks of about 1 MiB."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while chunk := file.read(READ_CHUNK_BYTES if end is None else min(READ_CHUNK_BYTES, end - start)):
                start += len(chunk)
                yield chunk
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error


def _detect_compression(path: Path, beginning: bytes) -> str | None:
    found = next((suffix for suffix, magic in COMPRESSION_MAGIC.items() if re.match(magic, beginning)), None)
    if path.suffix.lower() in COMPRESSION_MAGIC and found != path.suffix.lower():
        problem = f"{path}: the name ends in {path.suffix}, but the file begins with {beginning!r}"
        raise DataError(problem, "rename the file, or download it again", "data_path")
    return found


def _open_archive(stream: _PeekableStream, compression: str | None) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return (a file that reads decompressed bytes, its exceptions for damaged bytes)."""
    file = cast(BinaryIO, stream)
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb"), (EOFError, zlib.error, gzip.BadGzipFile)
    if compression == ".zst":
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        return zstd.ZstdFile(file, mode="rb"), (EOFError, zstd.ZstdError)
    return file, ()
