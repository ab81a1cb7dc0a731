"""Read untrusted files: bounded size, no links out of the folder, no code."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.formatting import shorten
from t5tune.io.reasons import describe_error

MAX_JSON_BYTES = 32 << 20  # a typical tokenizer.json has 2 MB, an index of shards less


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file in the folder; a link must lead to a file of the folder (see `check_inside`).

    Raises:
        CheckpointError: the name or the link leads out of the folder, or to something other than a regular file.
        FileNotFoundError: there is no such file.
    """
    if not is_file_name(name):
        raise CheckpointError(f"{folder}: {shorten(name)!r}: points outside the folder")
    path = folder / name
    check_inside(folder, path)
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path}: a broken link")
        raise FileNotFoundError(path)
    if not path.is_file():  # a pipe would block, a device may never end
        raise CheckpointError(f"{path}: not a regular file")
    return path


def has_file(folder: Path, name: str) -> bool:
    """Whether the folder contains a file of this name; raises a CheckpointError as `resolve_inside` does."""
    try:
        resolve_inside(folder, name)
    except FileNotFoundError:
        return False
    return True


def read_json_object(folder: Path, name: str) -> dict[str, Any]:
    """Read the JSON object in a file of the folder.

    Raises:
        CheckpointError: not a regular file, too large, not a JSON object, or a key occurs twice.
        FileNotFoundError: there is no such file.
    """
    path = resolve_inside(folder, name)
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes; the limit is {MAX_JSON_BYTES} bytes")
        return parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read: {describe_error(error)}") from error


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; raises ValueError as `parse_json` does."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def parse_json(text: bytes) -> Any:
    """Parse JSON, rejecting NaN, infinity, and duplicate keys, since parsers differ in the value that they keep.

    Raises:
        ValueError: not valid JSON, or ambiguous.
    """
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_reject_duplicate_keys, parse_constant=_reject_constant
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {shorten(name)!r}")
    return result


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a path that a link leads out of its folder.

    Links in the Hugging Face Hub cache are allowed: models--x/snapshots/REVISION/file -> models--x/blobs/HASH.
    """
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # for example a link to itself
        raise CheckpointError(f"{path}: a broken link: {describe_error(error)}") from error
    cached = home.parent.parent if home.parent.name == "snapshots" else None
    in_cache = cached is not None and cached.name.startswith("models--") and target.parent == cached / "blobs"
    if not (target.is_relative_to(home) or in_cache):
        hint = "if you trust that file, replace the link with a copy"
        raise CheckpointError(f"{path}: a link to {target}, outside the folder", hint=hint)


def check_all_inside(folder: Path) -> None:
    """Run `check_inside` on each entry of a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            check_inside(folder, path)


def is_file_name(name: str) -> bool:
    """Whether an untrusted text is a plain file name, not a path."""
    has_valid_length = 0 < len(name.encode(errors="replace")) < 256
    return has_valid_length and name.isprintable() and "/" not in name and name not in {".", ".."}
