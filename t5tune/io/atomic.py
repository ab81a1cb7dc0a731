"""Write files and folders atomically: write to a temporary name next to the target, fsync, then rename.

with write_folder_atomically(Path("cache")) as folder:
    (folder / "manifest.json").write_text(...)
"""

import ctypes
import errno
import fcntl
import fnmatch
import glob
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from t5tune.errors import SettingsError, T5TuneError, WriteError
from t5tune.file_names import CHECKPOINT_MANIFEST_FILE

CHUNK_BYTES = 1 << 20
LOCK_TIMEOUT_SECONDS = 2.0  # generous: t5tune holds these locks for milliseconds
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
DISK_ERRNOS = DISK_FULL_ERRNOS | {errno.EIO, errno.EROFS, errno.EFBIG}


def check_replaceable(folder: Path, overwrite: bool, inputs: Iterable[Path | str] = ()) -> None:
    """Refuse an output folder that contains files, unless the user has asked to overwrite it.

    Args:
        inputs: paths or patterns that the command reads; names that aren't on this machine don't count.
    """
    if os.path.lexists(os.path.realpath(folder)) and not folder.is_dir():  # a link to itself stays a link
        raise SettingsError(f"output_dir: {folder}: is a file, not a folder", hint="choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        hint = "choose another folder, or use --overwrite to replace it"
        raise SettingsError(f"output_dir: {folder}: already contains files", hint=hint)
    if overwrite:
        check_overwrite(folder, inputs)


def check_free_space(folder: Path, needed: int) -> None:
    """Check that the disk of an output folder, which may not exist yet, has room for weights of this many bytes."""
    place = next(parent for parent in Path(os.path.realpath(folder)).parents if parent.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise SettingsError(
            f"output_dir: {folder}: {free:,} bytes are free; the weights need {needed:,}",
            hint="free some disk space, or choose a different output_dir",
        )


def check_overwrite(folder: Path, inputs: Iterable[Path | str]) -> None:
    """Refuse to overwrite the current folder, or a folder with an input, a run's checkpoint or a run in progress.

    A command calls this again when it knows the folders of its inputs (see `check_replaceable`).
    """
    if (needed := _find_needed(folder, inputs)) is not None:
        raise SettingsError(f"output_dir: {folder}: contains {needed}", hint="choose another folder")


def _find_needed(folder: Path, inputs: Iterable[Path | str]) -> str | None:
    place = Path(os.path.realpath(folder))
    for path in inputs:
        for found in glob.glob(str(path), recursive=True) or [str(path)]:
            if os.path.exists(found) and Path(os.path.realpath(found)).is_relative_to(place):
                return f"{found}, which this command reads"
    if (current := Path(os.getcwd())).is_relative_to(place):
        return f"the current folder, {current}"
    if is_locked(get_lock_path(place)):
        return f"a run in progress, {folder}"
    for root, folders, files in os.walk(folder):  # links aren't followed: only the links would be deleted
        if (used := _find_used_folder(root, files)) is not None:
            return f"a run in progress, {used}"
        if CHECKPOINT_MANIFEST_FILE in files:
            return f"a checkpoint of a run, {root}"
        for name in folders:
            if name.startswith("checkpoint-"):
                return f"a checkpoint of a run, {Path(root, name)}"
    return None


def find_used_folder(folder: Path) -> Path | None:
    """Find a folder that a run is using, at any depth below `folder`; links aren't followed."""
    found = (_find_used_folder(root, files) for root, _, files in os.walk(folder))
    return next((used for used in found if used is not None), None)


def _find_used_folder(parent: str, files: list[str]) -> Path | None:
    """Find the folder of a run by the lock next to it, among the files of its parent."""
    locks = (Path(parent, name) for name in fnmatch.filter(files, ".*.lock"))
    return next((lock.with_name(lock.stem.removeprefix(".")) for lock in locks if is_locked(lock)), None)


def get_lock_path(folder: Path) -> Path:
    """Get the path of the file that a run keeps locked while it uses a folder."""
    return folder.parent / f".{folder.name}.lock"


def find_unused_folder(folder: Path) -> Path:
    """Return the folder, or the first of folder.1, folder.2, … that doesn't exist."""
    number, free = 0, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}.{number}")
    return free


@contextmanager
def write_folder_atomically(target: Path, replaces: bool = True, is_shared: bool = False) -> Iterator[Path]:
    """Yield a new folder next to `target` that replaces it when the block ends without an error.

    An existing folder is replaced as a whole; if `target` is a link, the folder that it points to is replaced. If the
    process is killed at any moment, `target` is the old folder or the new folder, never a mixture. Where two folders
    can't be exchanged in one step (only Linux can), a kill between the two renames leaves no folder at `target`.

    Args:
        replaces: whether a folder with files is replaced. Otherwise, if `target` isn't free or empty at the end, the
            new folder gets an unused name, and the error says which.
        is_shared: whether other machines may write the same folder now. NFS shows no locks of folders, so killed
            processes' temporary folders are kept until a process that writes the folder alone deletes them.
    """
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        raise SettingsError(f"{target}: a mount point can't be replaced", hint="choose a folder inside it")
    with make_scratch_folder(target, is_shared) as staged:
        yield staged
        fsync_tree(staged)
        if replaces:
            _replace_folder(staged, target)
        else:
            _move_to_free_place(staged, target)
        fsync(target.parent)


def _move_to_free_place(staged: Path, target: Path) -> None:
    try:
        staged.rename(target)  # fails if the folder there isn't empty
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        free = find_unused_folder(target)
        staged.rename(free)
        problem = f"output_dir: {target}: another process wrote to it in the meantime"
        raise SettingsError(problem, hint=f"the result of this command is in {free}") from error


def _replace_folder(staged: Path, target: Path) -> None:
    if not target.exists():
        staged.rename(target)
    elif not _exchange(staged, target):  # otherwise `staged` is now the old folder, which make_scratch_folder deletes
        old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
        target.rename(old)
        staged.rename(target)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def make_scratch_folder(target: Path, is_shared: bool = False) -> Iterator[Path]:
    """Yield a new hidden folder next to `target` that is deleted when the block ends.

    Killed processes' temporary folders are deleted first, unless `is_shared`. Parents that are created are deleted
    at the end, if they are empty. Errors name the target in place of the hidden folder, which is gone by then.
    """
    staged = target.with_name(f".{target.name}.new-{uuid.uuid4().hex[:8]}")
    missing = [parent for parent in target.parents if not is_shared and not os.path.exists(parent)]
    with explain_write_errors(target), ExitStack() as cleanup:
        # registered before the folders exist, because Ctrl-C can arrive at any line
        cleanup.callback(_remove_empty, missing)
        cleanup.callback(shutil.rmtree, staged, ignore_errors=True)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # The parent is locked until the new folder is, so that no other process takes the new folder for an
            # abandoned folder. If a program holds the parent's lock for longer, abandoned folders are kept.
            with lock_folder(target.parent, LOCK_TIMEOUT_SECONDS) as is_locked:
                if is_locked and not is_shared:
                    _remove_abandoned_siblings(target)
                staged.mkdir(parents=True)  # a process that has just ended may have deleted the parent
                cleanup.enter_context(lock_folder(staged))
        except OSError as error:
            if error.errno in DISK_ERRNOS:
                raise
            problem = f"{target}: can't be created: {error.strerror}"
            raise SettingsError(problem, hint="choose another folder") from error
        try:
            yield staged
        except T5TuneError as error:
            error.replace_text(str(staged), str(target))
            raise


def _remove_empty(folders: Iterable[Path]) -> None:
    with suppress(OSError):  # the first that has an entry, and so its parents, too
        for folder in folders:
            folder.rmdir()


def remove_abandoned(target: Path) -> None:
    """Delete the temporary folders of killed processes next to `target`."""
    target = Path(os.path.realpath(target))
    with lock_folder(target.parent, LOCK_TIMEOUT_SECONDS) as is_locked:
        if is_locked:
            _remove_abandoned_siblings(target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step. Return False if this system or file system can't."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE in renameat2(2)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def lock_folder(folder: Path, patience: float = 0.0) -> AbstractContextManager[bool]:
    """Lock a folder, as `lock_file` does. On NFS, other machines don't see this lock."""
    return lock_file(folder, patience, os.O_RDONLY)


@contextmanager
def lock_file(path: Path, patience: float = 0.0, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[bool]:
    """Lock a file until the block or this process ends, and create it if it doesn't exist.

    Yield whether it could be locked in `patience` seconds; False too if the file system has no locks.
    """
    try:
        descriptor = os.open(path, flags, 0o666)  # NFS locks only files that are open for writing
    except OSError:
        yield False
        return
    try:
        yield _wait_for_lock(descriptor, patience)
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds `lock_file`'s lock; False too if there is no such file, or if there are no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: several processes may look at a time
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, patience: float) -> bool:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return False


def _remove_abandoned_siblings(target: Path) -> None:
    name = glob.escape(target.name)
    for old in target.parent.glob(f".{name}.old-*") if target.exists() else []:
        shutil.rmtree(old, ignore_errors=True)  # the new folder is in place already
    for staged in target.parent.glob(f".{name}.new-*"):
        with lock_folder(staged) as is_abandoned:  # its owner holds a lock on it, which ends with that process
            if is_abandoned:
                shutil.rmtree(staged, ignore_errors=True)


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write `data`, given whole or in chunks, to a temporary file next to `path`, fsync it, and rename it to `path`.

    Raises:
        WriteError: the disk is full or broken.
    """
    temporary = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
    with explain_write_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


def copy_atomically(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        write_file(target, iter(lambda: file.read(CHUNK_BYTES), b""))


def append_line(path: Path, text: str) -> None:
    """Append a line to a text file, on a new line even if a kill truncated the file's last line.

    Raises:
        WriteError: the disk is full or broken.
    """
    with explain_write_errors(path), open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = f"\n{text}"
        file.write(f"{text}\n".encode())


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn the disk errors of a block into a `WriteError` that names the file; the system's error doesn't."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        failed = path if error.filename is None else Path(os.fsdecode(error.filename))
        # a temporary file next to `path` is deleted by now, so its name would not help
        failed = path if failed.is_relative_to(path.parent) else failed
        free = f"{shutil.disk_usage(place).free:,} bytes are free; free up space and run the same command again"
        hint = free if error.errno in DISK_FULL_ERRNOS else None
        raise WriteError(f"{failed}: {error.strerror} (errno {error.errno})", hint=hint) from error


def write_json(path: Path, value: Any) -> None:
    """Write the value as indented JSON, atomically."""
    write_file(path, encode_json(value))


def encode_json(value: Any) -> bytes:
    """Encode a value as `write_json` does. Lone surrogates (from file names that aren't UTF-8) become `\\udcff`."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk, then `folder` itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync(Path(root, name))
        fsync(Path(root))


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
