"""Atomic, verified checkpoints: a checkpoint-N is either complete or absent.

All ranks write to a hidden folder next to it. When every rank has succeeded, rank 0 writes a manifest of sizes and
SHA-256 hashes, fsyncs everything and renames the folder to checkpoint-N. A run resumes from the newest
checkpoint that passes verification.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.file_names import CHECKPOINT_MANIFEST_FILE
from t5tune.io.atomic import encode_json, fsync, fsync_tree, hash_file, write_json
from t5tune.io.untrusted import resolve_inside

EVALUATION_FILE = "t5tune_evaluation.json"
MANIFEST_FORMAT = 3
STAGING_PREFIX = ".saving-"


def write_manifest(folder: Path, step: int, world_size: int, run_identity: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint's files, and fsync everything.

    Args:
        run_identity: the configuration that the run depends on (see training/resume_guard.py); its key is `made_of`.

    Raises:
        CheckpointError: the folder contains a symbolic link, whose target a hash can't vouch for.
    """
    files = _describe_files(folder)
    fsync_tree(folder)
    manifest = {
        "format": MANIFEST_FORMAT,
        "step": step,
        "world_size": world_size,
        "made_of": run_identity,
        "files": files,
    }
    write_json(folder / CHECKPOINT_MANIFEST_FILE, {**manifest, "sha256": _hash_manifest(manifest)})


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of each file, by its path in the folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link inside a checkpoint")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    return files


def verify(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest. Return what is wrong, or None."""
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
    return None


def read_run_identity(folder: Path) -> dict[str, Any]:
    """Read the configuration of the run that wrote a checkpoint (see training/resume_guard.py).

    Raises:
        CheckpointError: its manifest is missing or broken.
    """
    found: dict[str, Any] = _read_manifest(folder)["made_of"]
    return found


def count_bytes(folder: Path) -> int:
    """Add up the bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / CHECKPOINT_MANIFEST_FILE
    try:
        # refuses a named pipe, whose reading would never end
        data = resolve_inside(folder, CHECKPOINT_MANIFEST_FILE).read_bytes()
        manifest = json.loads(data)
        is_as_written = data == encode_json(manifest)
        digest = manifest.pop("sha256")
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: missing or broken") from error
    if version != MANIFEST_FORMAT:
        raise CheckpointError(f"{path}: format {version}; this version of t5tune reads format {MANIFEST_FORMAT}")
    if not is_as_written or _hash_manifest(manifest) != digest:
        raise CheckpointError(f"{path}: differs from what was written")
    return dict(manifest)


def _hash_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def list_checkpoints(run: Path) -> list[Path]:
    """List the checkpoint-N folders of a run, newest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def find_newest(run: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that passes verification. Return it, and what is wrong with each newer one."""
    damaged: list[str] = []
    for path in list_checkpoints(run):
        problem = verify(path)
        if problem is None:
            return path, damaged
        damaged.append(problem)
    return None, damaged


def publish(staged: Path, run: Path, step: int, world_size: int, run_identity: dict[str, Any]) -> Path:
    """Write the manifest of a staged checkpoint, and rename the checkpoint into the run folder."""
    write_manifest(staged, step, world_size, run_identity)
    final = run / f"checkpoint-{step}"
    if final.exists():  # only a damaged one can exist: the run resumed from an earlier one
        shutil.rmtree(final)
    staged.rename(final)
    fsync(run)
    return final


def rotate(run: Path, keep: int | None, best: int | None) -> None:
    """Delete all checkpoints except the newest `keep` and that of step `best`. With `keep` None, delete none."""
    for old in list_checkpoints(run)[keep:] if keep else []:
        if old.name != f"checkpoint-{best}":
            shutil.rmtree(old, ignore_errors=True)


def write_evaluation(folder: Path, line: dict[str, Any]) -> None:
    """Add the evaluation's result to a complete checkpoint, so that a resumed run needn't evaluate it again.

    Args:
        line: the evaluation's entry in the Trainer's log history.

    Raises:
        WriteError: the file can't be written.
    """
    # the hash ties it to this checkpoint: a later checkpoint of the same step has another manifest
    write_json(folder / EVALUATION_FILE, {"manifest": hash_file(folder / CHECKPOINT_MANIFEST_FILE), "line": line})


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Read what `write_evaluation` added; None if that is missing, broken or belongs to another checkpoint."""
    try:
        found = json.loads(resolve_inside(folder, EVALUATION_FILE).read_bytes())
        if found["manifest"] == hash_file(folder / CHECKPOINT_MANIFEST_FILE) and "eval_loss" in found["line"]:
            return dict(found["line"])
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        pass
    return None


def remove_staged(run: Path) -> None:
    """Delete the folders that interrupted saves left."""
    for path in run.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


_NAME = re.compile(r"checkpoint-(\d+)")
