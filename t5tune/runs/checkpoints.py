"""Atomic, verified checkpoints: a checkpoint-N is either complete or absent.

All ranks write to a hidden folder next to it. When every rank has succeeded, rank 0 writes a manifest of sizes and
SHA-256 hashes, fsyncs everything and renames the folder to checkpoint-N. A run resumes from the newest
checkpoint that passes verification.
"""

import json
import shutil
from pathlib import Path
from typing import Any, TypeVar

from t5tune.checkpoints.tensor_files.torch_file import read_torch_file
from t5tune.errors import CheckpointError
from t5tune.file_names import (
    ADAPTER_CONFIG_FILE,
    CHECKPOINT_MANIFEST_FILE,
    CONFIG_FILE,
    RESULT_FILE,
    RUN_FILE,
    SETTINGS_FILE,
)
from t5tune.io.atomic import encode_json, fsync_tree, get_lock_path, hash_file, hash_json, is_locked, write_json
from t5tune.io.untrusted import check_inside, resolve_inside
from t5tune.progress import Note, Report
from t5tune.settings.groups.base import InferenceSettings

CHECKPOINT_FORMAT = 1
STAGING_PREFIX = ".saving-"
Inference = TypeVar("Inference", bound=InferenceSettings)


def write_manifest(folder: Path, step: int, world_size: int, run_identity: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint's files, and fsync everything.

    Args:
        run_identity: the configuration that the run depends on (see runs/resume_guard.py); its key is `made_of`.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link inside a checkpoint")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    fsync_tree(folder)
    manifest: dict[str, Any] = {"format": CHECKPOINT_FORMAT, "step": step, "world_size": world_size}
    manifest |= {"made_of": run_identity, "files": files}
    write_json(folder / CHECKPOINT_MANIFEST_FILE, {**manifest, "sha256": hash_json(manifest)})


def verify(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest, and look for code in its pickles. Return the first problem, or None."""
    try:
        manifest = _read_manifest(folder)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except CheckpointError as error:
        return error.message
    except (KeyError, TypeError, AttributeError):
        return f"{folder / CHECKPOINT_MANIFEST_FILE}: missing or broken"
    for name, (size, digest) in files.items():
        path = folder / name
        # a manifest may have been tampered with, and must not lead out of the folder
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            return f"{path}: not a file of this folder"
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != size:
            return f"{path}: {path.stat().st_size} bytes, but {size} in the manifest"
        if hash_file(path) != digest:
            return f"{path}: differs from what was written (SHA-256)"
        if name.endswith("_states.pt"):
            try:
                read_torch_file(path)  # DeepSpeed unpickles it, and a pickle can call any function
            except CheckpointError as error:
                return error.message
    return None


def read_run_identity(folder: Path) -> dict[str, Any]:
    """Read the configuration of the run that wrote a checkpoint (see runs/resume_guard.py)."""
    return dict(_read_manifest(folder)["made_of"])


def count_bytes(folder: Path) -> int:
    """Add up the bytes of the files in a folder, at any depth."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / CHECKPOINT_MANIFEST_FILE
    try:
        # resolve_inside refuses a named pipe: reading it would never end
        data = resolve_inside(folder, CHECKPOINT_MANIFEST_FILE).read_bytes()
        manifest = json.loads(data)
        is_as_written = data == encode_json(manifest)
        digest = manifest.pop("sha256")
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: missing or broken") from error
    if version != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: format {version}; this version of t5tune reads format {CHECKPOINT_FORMAT}")
    if not is_as_written or hash_json(manifest) != digest:
        raise CheckpointError(f"{path}: differs from what was written")
    return dict(manifest)


def list_checkpoints(run: Path) -> list[Path]:
    """List the checkpoint-N folders of a run, newest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=get_step, reverse=True)


def get_step(checkpoint: Path) -> int:
    """Get the step that a checkpoint-N folder is named for."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_newest(run: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that passes verification. Return it, and the damage of each newer checkpoint."""
    damaged: list[str] = []
    for path in list_checkpoints(run):
        problem = verify(path)
        if problem is None:
            return path, damaged
        damaged.append(problem)
    return None, damaged


def has_complete_checkpoints(folder: Path) -> bool:
    """Whether the folder is a run's, with at least one checkpoint that t5tune saved; it may be damaged by now."""
    return any((checkpoint / CHECKPOINT_MANIFEST_FILE).is_file() for checkpoint in list_checkpoints(folder))


def find_complete_checkpoint(run: Path, setting: str, report: Report) -> Path:
    """Find the newest complete checkpoint of a run, and report damaged checkpoints.

    Args:
        setting: the setting that names the run, for messages.
    """
    found, damaged = find_newest(run)
    for problem in damaged:
        report(Note(f"skipped a damaged checkpoint: {problem}", warning=True))
    if found is None:
        raise CheckpointError(f"{run}: none of its checkpoints is complete: {damaged[0]}", setting=setting)
    check_inside(run, found)
    return found


def find_trained_folder(path: Path, setting: str, report: Report) -> Path:
    """Return the newest complete checkpoint of a run that was stopped, and any other path unchanged.

    Raises:
        CheckpointError: a run has no checkpoint yet, or none is complete.
    """
    # a run that was killed while its result was copied, file by file, has only some of these files; result.json is last
    is_unfinished_run = (path / SETTINGS_FILE).is_file() and not (path / RESULT_FILE).is_file()
    has_model = any((path / name).is_file() for name in (ADAPTER_CONFIG_FILE, CONFIG_FILE))
    if has_model and not is_unfinished_run:
        return path
    if not has_complete_checkpoints(path):
        if not has_model:
            check_has_begun_to_save(path, setting)
        return path
    checkpoint = find_complete_checkpoint(path, setting, report)
    report(Note(f"{path}: this run hasn't finished; using its newest complete checkpoint, {checkpoint}"))
    return checkpoint


def check_has_begun_to_save(folder: Path, setting: str) -> None:
    """Raise CheckpointError if the folder is a run's, without a result and without a checkpoint.

    Args:
        setting: the setting that names the folder, for the message.
    """
    is_unfinished_run = (folder / RUN_FILE).is_file() and not (folder / RESULT_FILE).is_file()
    if not is_unfinished_run or list_checkpoints(folder):
        return
    if is_locked(get_lock_path(folder.resolve())):
        hint = "try again when the run has saved its first checkpoint"
        raise CheckpointError(f"{folder}: still training; no checkpoint yet", hint, setting)
    hint = f"start it again: t5tune train --config {folder / SETTINGS_FILE}"
    raise CheckpointError(f"{folder}: this run was stopped before its first checkpoint", hint, setting)


def replace_stopped_runs(settings: Inference, report: Report) -> Inference:
    """Replace each run that was stopped by its newest complete checkpoint, as `find_trained_folder` finds it."""
    found = {"model_name_or_path": Path(settings.model_name_or_path), "adapter": settings.adapter}
    changes: dict[str, str | Path] = {}
    for setting, path in found.items():
        if path is not None and (folder := find_trained_folder(path, setting, report)) != path:
            changes[setting] = folder if setting == "adapter" else str(folder)
    return settings.model_copy(update=changes)


def remove_staged(run: Path) -> None:
    """Delete the folders that interrupted saves left."""
    for path in run.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
