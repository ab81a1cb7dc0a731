"""Sealed checkpoints: a checkpoint-N is whole, or it isn't there.

All ranks write into a hidden folder beside it. When every rank has succeeded, rank 0 writes a manifest of
sizes and SHA-256, syncs it all and renames the folder to checkpoint-N. Resuming takes the newest that verifies.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.io.atomic import json_bytes, sha256, sync, sync_folder, write_json
from t5tune.io.untrusted import inside

MANIFEST = "t5tune_manifest.json"
EVALUATION = "t5tune_evaluation.json"
FORMAT = 3
STAGED = ".saving-"


def seal(folder: Path, step: int, world_size: int, made_of: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint's files, and sync all of it.

    Args:
        made_of: what the run is made of (see training/resume_guard.py).

    Raises:
        CheckpointError: the folder holds a link, which can't be sealed.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link inside a checkpoint")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    sync_folder(folder)
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "made_of": made_of, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": _digest(manifest)})


def verify(folder: Path) -> str | None:
    """What is wrong with a sealed checkpoint, or None."""
    try:
        manifest = _read_manifest(folder)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except CheckpointError as error:
        return error.message
    except (KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST}: missing or broken"
    for name, (size, digest) in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            return f"{path}: not a file of this folder"
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != size:
            return f"{path}: {path.stat().st_size} bytes, sealed with {size}"
        if sha256(path) != digest:
            return f"{path}: differs from what was sealed"
    return None


def made_of(folder: Path) -> dict[str, Any]:
    """What the run was made of that wrote a checkpoint.

    Raises:
        CheckpointError: its manifest is missing or broken.
    """
    found: dict[str, Any] = _read_manifest(folder)["made_of"]
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        data = inside(folder, MANIFEST).read_bytes()  # no pipe, which would never end
        manifest = json.loads(data)
        is_as_written = data == json_bytes(manifest)
        digest = manifest.pop("sha256")
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: missing or broken") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}, this release reads {FORMAT}")
    if not is_as_written or _digest(manifest) != digest:
        raise CheckpointError(f"{path}: differs from what was sealed")
    return dict(manifest)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint-N folders of a run, the newest first."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with the newer ones."""
    damaged: list[str] = []
    for path in checkpoints(run):
        problem = verify(path)
        if problem is None:
            return path, damaged
        damaged.append(problem)
    return None, damaged


def publish(staged: Path, run: Path, step: int, world_size: int, made_of: dict[str, Any]) -> Path:
    """Write the manifest of a staged checkpoint, and rename it into the run."""
    seal(staged, step, world_size, made_of)
    final = run / f"checkpoint-{step}"
    if final.exists():  # only one that doesn't verify can stand there: the run resumed from before it
        shutil.rmtree(final)
    staged.rename(final)
    sync(run)
    return final


def rotate(run: Path, keep: int | None, best: int | None) -> None:
    """Delete the checkpoints beyond the newest `keep` but that of step `best`; None keeps all."""
    for old in checkpoints(run)[keep:] if keep else []:
        if old.name != f"checkpoint-{best}":
            shutil.rmtree(old, ignore_errors=True)


def write_evaluation(folder: Path, line: dict[str, Any]) -> None:
    """Add to a complete checkpoint what evaluating it found, so that a resumed run needn't evaluate it again.

    Args:
        line: the evaluation's line of Trainer's log history.

    Raises:
        WriteError: it can't be written.
    """
    # it belongs to this very checkpoint: a later one of the same step has another manifest
    write_json(folder / EVALUATION, {"manifest": sha256(folder / MANIFEST), "line": line})


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What `write_evaluation` added, or None where it is missing, broken, or of another checkpoint."""
    try:
        found = json.loads(inside(folder, EVALUATION).read_bytes())
        if found["manifest"] == sha256(folder / MANIFEST) and "eval_loss" in found["line"]:
            return dict(found["line"])
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        pass
    return None


def remove_staged(run: Path) -> None:
    """Delete what an interrupted save left."""
    for path in run.glob(f"{STAGED}*"):
        shutil.rmtree(path, ignore_errors=True)


_NAME = re.compile(r"checkpoint-(\d+)")
