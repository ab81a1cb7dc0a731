"""Decide what happens to an output folder that exists: its token cache is kept, replaced or protected."""

import hashlib
import json
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from t5tune.data.caches.cache import CACHE_CONTENTS, is_cache, open_cache, read_manifest
from t5tune.data.caches.examples import is_left_over
from t5tune.errors import DataError, SettingsError
from t5tune.io.reasons import join_first


def find_reusable_manifest(
    folder: Path, inputs: dict[str, Any], in_use: bool, run: Path | None = None
) -> dict[str, Any] | None:
    """Return the manifest of the existing cache if it was made from these inputs; None: a new cache can be written.

    Args:
        in_use: a run was trained on the existing cache, so a cache of other inputs must not replace it.
        run: the run folder that the cache is for. A start with several datasets may have left some of them in it.

    Raises:
        DataError: what is in the way isn't a token cache, or contains more than one.
        SettingsError: a run uses the existing cache, and its inputs differ.
    """
    if not is_cache(folder):
        if folder.is_dir() and any(folder.iterdir()) and is_left_over(folder):
            if in_use:
                raise make_resume_error(folder, {"data": "data: it was several datasets before, and is one now"})
            if folder.parent != run:  # the user has named it, for example as preprocessed_path
                hint = "choose another output_dir or preprocessed_path, or delete it"
                raise DataError(f"{folder}: contains several token caches, and isn't one", hint=hint)
            shutil.rmtree(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"output_dir: {folder}: exists and isn't a token cache", hint="choose another output_dir")
        return None
    with suppress(DataError):  # it is damaged, or of another format version
        manifest = open_cache(folder).manifest
        if manifest["inputs"] == inputs:
            return manifest
    if foreign := sorted({path.name for path in folder.iterdir()} - CACHE_CONTENTS):
        # replacing the folder would delete these files
        problem = f"output_dir: {folder}: contains {', '.join(foreign)} in addition to a token cache"
        raise DataError(problem, hint="move these files away, or choose another output_dir")
    if in_use:
        _check_inputs(folder, inputs)
    return None


def _check_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Check that the inputs are those of the cache.

    Raises:
        SettingsError: they differ; one line for each input that does.
    """
    before = read_manifest(folder)["inputs"]
    if lines := describe_differences(before, inputs):
        lines.setdefault("data", f"data: the token cache {folder} would have to be rebuilt")
        raise make_resume_error(folder, lines)


def describe_differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Describe which inputs differ: name -> line with both values."""
    return {
        name: _describe_files(before.get(name), value)
        if name == "data"
        else f"{name}: {abbreviate_value(before.get(name))} before, {abbreviate_value(value)} now"
        for name, value in now.items()
        if before.get(name) != value
    }


def _describe_files(before: Any, now: Any) -> str:
    """Describe how lists of data files differ: the content of one with the same name, or which files they are."""
    names = [[entry["file"] for entry in files or []] for files in (before, now)]
    if names[0] == names[1]:
        changed = [then["file"] for then, file in zip(before, now, strict=True) if then != file]
        return f"data: {join_first(changed)}: another content now"
    return f"data: {join_first(names[0])} before, {join_first(names[1])} now"


def make_resume_error(changed: Path, differences: dict[str, str], fixed: Collection[str] = ()) -> SettingsError:
    """Make the error of a run that can't be resumed because of these differences: name -> description.

    Args:
        fixed: those that --allow-change can't allow, since the checkpoint `changed` wouldn't fit.
    """
    if fixed:
        advice = (
            f"--allow-change can't allow {', '.join(fixed)}, with which the checkpoint doesn't fit; to continue from "
            f"its weights, start a new run in another output_dir with --adapter {changed}, or on the base into which "
            "you merge it (t5tune merge)"
        )
    else:
        advice = f"to resume all the same, add --allow-change {' '.join(differences)}"
    return SettingsError(
        *differences.values(),
        heading=f"{changed}: the run can't be resumed with other settings or data:",
        choices=[
            "to resume, use the previous settings and data",
            advice,
            "to start over, add --fresh; the old run is kept under another name",
        ],
    )


def abbreviate_value(value: Any) -> str:
    """Write a value as JSON; a long one in part, with a hash of all of it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
