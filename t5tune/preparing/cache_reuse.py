"""Decide what happens to an output folder that exists: its token cache is kept, replaced or protected."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from t5tune.data.caches.cache import CACHE_CONTENTS, is_cache, open_cache
from t5tune.data.caches.examples import PREPARED_CONTENTS
from t5tune.data.caches.prepared import is_prepared, list_caches
from t5tune.errors import DataError, SettingsError
from t5tune.file_names import ADAPTER_CONFIG_FILE, MIXTURE_FILE
from t5tune.formatting import describe_change
from t5tune.io.reasons import join_first


def find_reusable(
    folder: Path, inputs: Mapping[str, dict[str, Any]], names: Sequence[str], checkpoint: Path | None
) -> dict[str, dict[str, Any]]:
    """Find the datasets whose caches in the folder were made from these inputs, and return their manifests.

    Args:
        inputs: of the cache of each dataset that isn't a token cache elsewhere.
        names: all datasets, in their order.
        checkpoint: of a run that was trained on this folder's data, which must stay.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    _check_replaceable(folder)
    if checkpoint is not None and not is_prepared(folder):
        problem = f"{folder}: prepared by an older version of t5tune, without {MIXTURE_FILE}"
        raise DataError(problem, hint="resume the run with that version, or start a new run in a different output_dir")
    if checkpoint is not None and (before := [*list_caches(folder)]) != names:
        line = f"data: the datasets were {', '.join(before)} before, and are {', '.join(names)} now"
        raise make_resume_error(checkpoint, [line])
    found = {}
    for name, expected in inputs.items():
        with suppress(DataError):  # it is missing, damaged, or has an older format
            manifest = open_cache(folder / name).manifest
            if manifest["inputs"] == expected:
                found[name] = manifest
            elif checkpoint is not None:
                _check_inputs(checkpoint, manifest["inputs"], expected)
    return found


def _check_replaceable(folder: Path) -> None:
    """Check that the folder contains a token cache and nothing else, since it is replaced as a whole."""
    if not folder.is_dir() or not (is_prepared(folder) or is_cache(folder)):
        raise DataError(f"output_dir: {folder}: exists and isn't a token cache", hint="choose another output_dir")
    caches = {path.name: path for path in folder.iterdir() if is_cache(path)}
    with suppress(DataError):  # there is no readable mixture.json that says which caches are of this folder
        caches = {path.name: path for path in list_caches(folder).values() if path.parent == folder and is_cache(path)}
    foreign = {path.name for path in folder.iterdir()} - caches.keys() - PREPARED_CONTENTS - CACHE_CONTENTS
    for cache in caches.values():
        foreign |= {f"{cache.name}/{path.name}" for path in cache.iterdir() if path.name not in CACHE_CONTENTS}
    if foreign:
        problem = f"output_dir: {folder}: contains {join_first(sorted(foreign))} in addition to a token cache"
        raise DataError(problem, hint="move these files away, or choose another output_dir")


def _check_inputs(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if lines := describe_differences(before, now):
        raise make_resume_error(checkpoint, lines.values())


def describe_differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Describe which inputs differ: name -> line with both values."""
    return {
        name: _describe_files(before.get(name), value)
        if name == "data"
        else describe_change(name, before.get(name), value)
        for name, value in now.items()
        if before.get(name) != value
    }


def _describe_files(before: Any, now: Any) -> str:
    """Describe how lists of data files differ: in their names, or in the content of a file."""
    names = [[entry["file"] for entry in files or []] for files in (before, now)]
    if names[0] == names[1]:
        changed = [then["file"] for then, file in zip(before, now, strict=True) if then != file]
        return f"data: {join_first(changed)}: the content has changed"
    return f"data: {join_first(names[0])} before, {join_first(names[1])} now"


def make_resume_error(checkpoint: Path, lines: Iterable[str], allows: Sequence[str] = ()) -> SettingsError:
    """Make the error of a run that can't be resumed, since its settings or its data have changed.

    Args:
        checkpoint: which the run would resume from.
        lines: the differences.
        allows: settings to allow with --allow-change, if nothing else differs.
    """
    allow = [f"to resume anyway, add --allow-change {' '.join(allows)}"] if allows else []
    return SettingsError(
        *lines,
        heading=f"{checkpoint}: the run can't be resumed with different settings or data:",
        choices=[
            "to resume, use the previous settings and data",
            *allow,
            f"to start a new run from these weights, use {format_weights_flag(checkpoint)} and a new output_dir",
            "to start over, add --fresh; the old run is kept under a new name",
        ],
    )


def format_weights_flag(folder: Path) -> str:
    """Write the flag that starts a new run from the weights in a checkpoint or a run folder."""
    is_adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
    return f"{'--adapter' if is_adapter else '--model-name-or-path'} {folder}"
