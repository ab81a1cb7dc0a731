"""Folders and files that appear whole or not at all: written beside their place, synced, renamed.

with published_folder(Path("cache")) as folder:
    (folder / "manifest.json").write_text(...)
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from t5tune.errors import SettingsError, WriteError

CHUNK = 1 << 20
SECONDS_TO_WAIT = 2.0  # for a lock that t5tune holds for milliseconds
FULL = {errno.ENOSPC, errno.EDQUOT}
OF_THE_DISK = FULL | {errno.EIO, errno.EROFS, errno.EFBIG}


@contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` that takes its place when the block ends without an error.

    A folder that stood there is replaced as a whole; of a link, the folder that it leads to. A kill at any moment
    leaves the old folder or the new one, never a mixture; where folders can't be exchanged (only Linux can), a kill
    between two renames leaves none.

    Raises:
        SettingsError: no folder can be made there.
        WriteError: the disk is full or broken.
    """
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        raise SettingsError(f"{target}: a mount point can't be replaced", hint="name a folder in it")
    with writing(target), scratch_folder(target) as staged:
        yield staged
        sync_folder(staged)
        if target.exists() and _exchange(staged, target):
            pass  # what is staged now is the old one, and goes as such
        elif target.exists():
            old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
            target.rename(old)
            staged.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            staged.rename(target)
        sync(target.parent)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `target` that is gone when the block ends.

    What killed processes left of theirs is deleted first.

    Raises:
        SettingsError: no folder can be made there.
    """
    staged = target.with_name(f".{target.name}.new-{uuid.uuid4().hex[:8]}")
    descriptor = None
    try:  # from before it is there: Ctrl-C may come at any line
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # its parent is locked until the new folder is, so that nobody takes it for one that was left; where another
            # program holds it for longer, nobody sweeps
            parent = _locked(target.parent, SECONDS_TO_WAIT)
            try:
                if parent is not None:
                    _remove_abandoned(target)
                staged.mkdir()
                descriptor = _locked(staged)
            finally:
                _unlock(parent)
        except OSError as error:
            if error.errno in OF_THE_DISK:
                raise
            raise SettingsError(
                f"{target}: can't be made here: {error.strerror}", hint="name another folder"
            ) from error
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        _unlock(descriptor)


def sweep(target: Path) -> None:
    """Delete what killed processes left of their attempts at a folder that is in place."""
    target = Path(os.path.realpath(target))
    parent = _locked(target.parent, SECONDS_TO_WAIT)
    try:
        if parent is not None:
            _remove_abandoned(target)
    finally:
        _unlock(parent)


def _exchange(one: Path, other: Path) -> bool:
    """Give each the other's name in one step; False: this system or file system can't."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _locked(folder: Path, patience: float = 0.0) -> int | None:
    """A lock on the folder that ends with this process, however that may happen; None: none to be had in that time."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.01)
                continue
        except OSError:  # a file system without locks
            pass
        os.close(descriptor)
        return None


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    name = glob.escape(target.name)
    for old in target.parent.glob(f".{name}.old-*") if target.exists() else []:
        shutil.rmtree(old, ignore_errors=True)  # its successor is in place
    for staged in target.parent.glob(f".{name}.new-*"):
        if (descriptor := _locked(staged)) is not None:
            shutil.rmtree(staged, ignore_errors=True)
            os.close(descriptor)


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write `data`, whole or in parts, beside `path`, sync it, and rename it into place.

    Raises:
        WriteError: the disk is full or broken.
    """
    temporary = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """`write_file` of a file's bytes."""
    with open(source, "rb") as file:
        write_file(target, iter(lambda: file.read(CHUNK), b""))


def append_line(path: Path, text: str) -> None:
    """Append a line to a file of lines, of which a kill may have cut the last.

    Raises:
        WriteError: the disk is full or broken.
    """
    with writing(path), open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = f"\n{text}"
        file.write(f"{text}\n".encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where the disk refuses: the system itself names none when a write fails.

    Raises:
        WriteError: with the path and the system's reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        # what is written beside it is gone with this error
        named = path if error.filename is None else Path(os.fsdecode(error.filename))
        named = path if named.is_relative_to(path.parent) else named
        free = f"{shutil.disk_usage(place).free:,} bytes are free; make room, and give the same command again"
        raise WriteError(
            f"{named}: {error.strerror} (errno {error.errno})",
            hint=free if error.errno in FULL else None,
        ) from error


def write_json(path: Path, value: Any) -> None:
    """`write_file` of the value as indented JSON with a newline at its end."""
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The bytes that `write_json` writes; a name that is no Unicode has lone surrogates, which stand as `\\udcff`."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def sync(path: Path) -> None:
    """fsync a file or a folder by its path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """fsync every file and folder below `folder`, then `folder` itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
