"""The folder of the parts of a token cache, next to the cache: `cache.parts/part-0-of-3`, …

Processes on several machines share it, maybe on a file system without locks. So each step is a rename, which only one
process can do: of a part when it is complete, and of the whole folder when its parts are joined. The lock of a file in
the folder only shows whether a process that took the parts to join them was killed. On a file system without locks, a
process that starts takes the parts from one that joins. That one notices it and gives up; neither changes the files of
a part.
"""

import errno
import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from t5tune.errors import DataError, SettingsError
from t5tune.file_names import PART_MANIFEST_FILE
from t5tune.io.atomic import (
    LOCK_TIMEOUT_SECONDS,
    explain_creation_errors,
    explain_write_errors,
    fsync,
    fsync_tree,
    is_locked,
    lock_file,
)
from t5tune.io.reasons import join_first
from t5tune.preparing.cache_reuse import describe_differences
from t5tune.preparing.parts.part import read_part_manifest, verify_part
from t5tune.settings.groups.shard import Shard

LOCK_FILE = "joining.lock"
UNIQUE_CHARACTERS = 8  # at the end of a temporary name
MAX_NAME_BYTES = 255  # of a file, in all usual file systems
_PART_NAME = re.compile(r"part-(\d+)-of-(\d+)")
_UNFINISHED_NAME = re.compile(r"\.part-\d+-of-\d+\.new-[0-9a-f]+")


class PartsTakenError(Exception):
    """Another process has taken the parts while this one wrote or joined them."""


class PartsFolder:
    """The parts of a cache.

    Args:
        cache: the folder of the cache, which need not exist.
        description: what all parts must agree on, by name.
    """

    def __init__(self, cache: Path, description: dict[str, Any]) -> None:
        cache = Path(os.path.realpath(cache))
        self._cache = cache
        self.folder = cache.with_name(f"{cache.name}.parts")
        self._joining_prefix = f".{cache.name}.joining-"
        self.description = description

    def list_parts(self) -> dict[Shard, Path]:
        """List the complete parts, in their order."""
        return _list_parts(self.folder)

    def check_place(self) -> None:
        """Check, before anything is encoded, that the parts and the cache can be written.

        Raises:
            SettingsError: the folder is a link or contains something else, or the cache can't get its name.
        """
        if os.path.ismount(self._cache):
            problem = f"{self._cache}: a mount point can't be replaced"
            raise SettingsError(problem, hint="choose a folder inside it")
        longest = f"{self._joining_prefix}{'0' * UNIQUE_CHARACTERS}"
        if len(os.fsencode(longest)) > MAX_NAME_BYTES:
            problem = f"output_dir: {self._cache.name}: too long a name for a cache that is prepared in parts"
            raise SettingsError(problem, hint=f"shorten it to {MAX_NAME_BYTES - 20} bytes")
        problem = f"output_dir: {self.folder}: the parts are written there, but "
        hint = "move it away, or choose another output_dir"
        if self.folder.is_symlink():
            raise SettingsError(f"{problem}it is a link", hint=hint)
        if foreign := [entry.name for entry in _list_entries(self.folder) if not _is_own(entry)]:
            raise SettingsError(f"{problem}it contains {join_first(sorted(foreign))}", hint=hint)

    def are_left(self) -> bool:
        """Whether there are complete parts, and nothing else."""
        return bool(self.list_parts()) and all(map(_is_own, _list_entries(self.folder)))

    def check_parts(self, count: int | None) -> None:
        """Check that the complete parts were made from the same inputs, and are of `count` parts.

        Raises:
            SettingsError: they differ; one line for each input that does.
            DataError: a part's manifest is broken.
        """
        for shard, part in self.list_parts().items():
            if (manifest := _read_manifest(part)) is None:
                continue
            before, now = dict(manifest["inputs"]), dict(self.description)
            if count is not None:
                before["shard"], now["shard"] = f"one of {shard.count} parts", f"one of {count} parts"
            if lines := describe_differences(before, now):
                choices = ["to continue, use the previous settings, data and version"]
                if lines.keys() == {"shard"}:  # a job array of some tasks, which --shard auto counts
                    choices = [f"to prepare one of those {shard.count} parts, name it: --shard I/{shard.count}"]
                raise SettingsError(
                    *lines.values(),
                    heading=f"{part}: was made from other inputs than this part:",
                    choices=[*choices, f"to start over, delete {self.folder}"],
                )

    def read_part(self, shard: Shard) -> dict[str, Any] | None:
        """Return the manifest of a part that is complete, and delete one that is damaged."""
        part = self.list_parts().get(shard)
        manifest = None if part is None else _read_manifest(part)
        if part is None or manifest is None:
            return None
        try:
            verify_part(part, manifest)
        except DataError:
            if part.is_dir():  # otherwise another process has taken the parts meanwhile
                self._remove(part)
            return None
        return manifest

    def read_taken_part(self, shard: Shard) -> dict[str, Any] | None:
        """Return the manifest of a part that another process joins."""
        for taken in self._list_taken():
            with suppress(DataError, KeyError):
                manifest = read_part_manifest(_list_parts(taken)[shard])
                if manifest["inputs"] == self.description:
                    return manifest
        return None

    @contextmanager
    def write_part(self, shard: Shard) -> Iterator[Path]:
        """Yield a new folder that becomes the part when the block ends, unless another process has completed it.

        Raises:
            PartsTakenError: another process has completed it, and has taken all parts.
            SettingsError: no folder can be created there.
        """
        name = f"part-{shard.index}-of-{shard.count}"
        staged = self.folder / f".{name}.new-{uuid.uuid4().hex[:UNIQUE_CHARACTERS]}"
        try:
            with explain_write_errors(self.folder):
                with explain_creation_errors(self.folder):
                    _make_folder(staged)
                try:
                    yield staged
                    fsync_tree(staged)
                    try:
                        staged.rename(self.folder / name)
                    except OSError as error:  # the part exists
                        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                            raise
                except Exception as error:
                    # if the new folder was taken with the parts, the error may be any that a missing file leads to,
                    # such as that the folder has no tokenizer
                    if staged.is_dir():
                        raise
                    raise PartsTakenError from error
                with suppress(FileNotFoundError):  # another process has taken the parts, and this one with them
                    fsync(self.folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            with suppress(OSError):  # if this is the only part, and failed, the folder is empty
                self.folder.rmdir()

    def list_missing(self, count: int) -> list[Shard]:
        """List the parts of `count` that aren't complete."""
        complete = self.list_parts()
        return [shard for shard in (Shard(index, count) for index in range(count)) if shard not in complete]

    @contextmanager
    def take_parts(self) -> Iterator[dict[Shard, Path] | None]:
        """Take all parts, to join them; None if another process has taken them. `remove` deletes them afterwards.

        If the block fails, the parts are put back.

        Raises:
            PartsTakenError: another process has taken them meanwhile, so that the block failed.
        """
        taken = self.folder.with_name(f"{self._joining_prefix}{uuid.uuid4().hex[:UNIQUE_CHARACTERS]}")
        parts: dict[Shard, Path] = {}
        try:
            # The lock moves with the folder, so that no process finds the folder without it. Whether there are locks
            # makes no difference here: without them, another process may take the parts, and this one gives up.
            with lock_file(self.folder / LOCK_FILE, LOCK_TIMEOUT_SECONDS):
                try:
                    self.folder.rename(taken)
                except FileNotFoundError:
                    yield None
                    return
                parts = _list_parts(taken)
                yield parts
        except BaseException as error:
            is_mine = all(part.is_dir() for part in parts.values())
            self._put_back(taken)
            if is_mine or not isinstance(error, Exception):
                raise
            raise PartsTakenError from error

    def take_back(self) -> None:
        """Put back the parts that a process took which was killed while it joined them."""
        for taken in self._list_taken():
            if not is_locked(taken / LOCK_FILE):
                self._put_back(taken)

    def is_being_joined(self) -> bool:
        """Whether another process has taken the parts to join them."""
        return bool(self._list_taken())

    def remove(self) -> None:
        """Delete all parts of a cache that is complete, if they were made from the same inputs.

        A folder without a complete part is left alone if parts are in progress there, since their inputs are unknown.
        """
        for folder in (self.folder, *self._list_taken()):
            is_ours = folder.is_dir() and not folder.is_symlink() and all(map(_is_own, _list_entries(folder)))
            if is_ours and not is_locked(folder / LOCK_FILE) and self._has_same_inputs(folder):
                self._remove(folder)

    def _list_taken(self) -> list[Path]:
        return sorted(self.folder.parent.glob(f"{glob.escape(self._joining_prefix)}*"))

    def _has_same_inputs(self, folder: Path) -> bool:
        parts = [part for part in _list_parts(folder).values() if (part / PART_MANIFEST_FILE).is_file()]
        if not parts:
            return [entry.name for entry in _list_entries(folder)] == [LOCK_FILE]
        with suppress(DataError):
            return all(read_part_manifest(part)["inputs"] == self.description for part in parts)
        return False

    def _remove(self, folder: Path) -> None:
        """Delete a folder; if that is interrupted, the next prepare deletes the rest."""
        old = self._cache.with_name(f".{self._cache.name}.old-{uuid.uuid4().hex[:UNIQUE_CHARACTERS]}")
        with suppress(FileNotFoundError):  # another process has deleted it
            folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def _put_back(self, taken: Path) -> None:
        entries = [entry for entry in _list_entries(taken) if entry.name != LOCK_FILE]
        if entries:
            self.folder.mkdir(exist_ok=True)
        for entry in entries:
            with suppress(OSError):  # it is there already, or another process has put it back
                entry.rename(self.folder / entry.name)
        if _list_parts(taken).keys() <= self.list_parts().keys():
            shutil.rmtree(taken, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    """Make a folder in one that may not exist, and that another process may delete or rename at this moment."""
    try:
        folder.mkdir(parents=True)
    except FileNotFoundError:
        folder.mkdir(parents=True)


def _read_manifest(part: Path) -> dict[str, Any] | None:
    """Read the manifest of a part; None if another process has taken the parts since they were listed.

    Raises:
        DataError: it is broken.
    """
    try:
        return read_part_manifest(part)
    except DataError:
        if part.is_dir():
            raise
        return None


def _is_own(entry: Path) -> bool:
    """Whether an entry of the folder is a part, one that a process is writing, or the lock."""
    if entry.name == LOCK_FILE:
        return True
    if _UNFINISHED_NAME.fullmatch(entry.name):
        return True
    is_part = _PART_NAME.fullmatch(entry.name) is not None
    # another process may take a part away at this moment
    return is_part and ((entry / PART_MANIFEST_FILE).is_file() or not os.path.lexists(entry))


def _list_parts(folder: Path) -> dict[Shard, Path]:
    """List the parts in a folder, in their order."""
    matches = ((_PART_NAME.fullmatch(entry.name), entry) for entry in _list_entries(folder))
    found = {Shard(int(match[1]), int(match[2])): entry for match, entry in matches if match is not None}
    return dict(sorted(found.items()))


def _list_entries(folder: Path) -> list[Path]:
    """List a folder; nothing if it doesn't exist, or if another process takes or deletes it at this moment."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []
