"""Decide what happens to an output folder that exists: its token cache is kept, replaced or protected."""

import hashlib
import json
from pathlib import Path
from typing import Any

from t5tune.data.cache import CACHE_CONTENTS, is_cache, read_manifest, verify_files
from t5tune.errors import DataError, SettingsError


def find_reusable_manifest(folder: Path, inputs: dict[str, Any], in_use: bool) -> dict[str, Any] | None:
    """Return the manifest of the existing cache if it was made from these inputs; None: a new cache can be written.

    Args:
        in_use: a run was trained on the existing cache, so a cache of other inputs must not replace it.

    Raises:
        DataError: what is in the way isn't a token cache, or contains more than one.
        SettingsError: a run uses the existing cache, and its inputs differ.
    """
    if not is_cache(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"output_dir: {folder}: exists and isn't a token cache", hint="choose another output_dir")
        return None
    if manifest := _read_matching_manifest(folder, inputs):
        return manifest
    if foreign := sorted({path.name for path in folder.iterdir()} - CACHE_CONTENTS):
        raise DataError(  # replacing the folder would delete these files
            f"output_dir: {folder}: contains {', '.join(foreign)} in addition to a token cache",
            hint="move these files away, or choose another output_dir",
        )
    if in_use:
        _check_inputs(folder, inputs)
    return None


def _read_matching_manifest(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest if the cache was made from these inputs and its files are unchanged, else None."""
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest["files"])
    except DataError:
        return None
    return manifest if manifest["inputs"] == inputs else None


def _check_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Check that the inputs are those of the cache.

    Raises:
        SettingsError: they differ; one line for each input that does.
    """
    before = read_manifest(folder)["inputs"]
    names = [name for name in inputs if before.get(name) != inputs[name]]
    if names:
        lines = [
            f"{name}: {_abbreviate(before.get(name))} in {folder}, now {_abbreviate(inputs[name])}" for name in names
        ]
        if "data" not in names:
            lines.append(f"data: the token cache {folder} would have to be rebuilt")
            names.append("data")
        raise SettingsError(
            *lines,
            hint="use the values that the run started with, resume anyway with "
            f"--allow-change {' '.join(names)}, or start over with --fresh",
        )


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
