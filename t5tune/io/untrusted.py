"""Read untrusted files: of bounded size, without links out of their folder, without running code.

Whatever opens a folder of weights uses `inside` for each file in it and `read_object` for its JSON.
"""

import json
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.io.reasons import reason_of

MAX_JSON = 32 << 20  # a tokenizer.json has 2 MB, an index of shards less


def inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder, once it is sure that it is one.

    A link may point to another file of the folder, and from a snapshot of the hub's cache to the blobs of the same
    model (`models--o--n/snapshots/<revision>/x -> ../../blobs/<hash>`).

    Raises:
        CheckpointError: the name or the link leads out of the folder, or to something that is no plain file.
        FileNotFoundError: there is no such file.
    """
    if not is_file_name(name):
        raise CheckpointError(f"{folder}: {name[:200]!r}: points outside the folder")
    path = folder / name
    check_inside(folder, path)
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link to nothing")
        raise FileNotFoundError(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: not a plain file")
    return path


def holds(folder: Path, name: str) -> bool:
    """Whether a file of this name stands in the folder.

    Raises:
        CheckpointError: as `inside`.
    """
    try:
        inside(folder, name)
    except FileNotFoundError:
        return False
    return True


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder.

    Raises:
        CheckpointError: not there as a plain file, too large, no JSON object, or one with a key twice.
        FileNotFoundError: there is no such file.
    """
    path = inside(folder, name)
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"{size} bytes; {MAX_JSON} is the most that is read")
        return parse_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read: {reason_of(error)}") from error


def parse_object(text: bytes) -> dict[str, Any]:
    """A JSON object; a key that stands there twice is refused, since readers differ in which one they take.

    Raises:
        ValueError: no JSON, none that can be relied on, or no object.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a path in a folder that a link leads out of it.

    The links of the hub's cache may: models--x/snapshots/REVISION/file -> models--x/blobs/HASH.

    Raises:
        CheckpointError: by the link's name.
    """
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CheckpointError(f"{path}: a link that leads nowhere: {reason_of(error)}") from error
    cached = home.parent.parent if home.parent.name == "snapshots" else None
    in_cache = cached is not None and cached.name.startswith("models--") and target.parent == cached / "blobs"
    if not (target.is_relative_to(home) or in_cache):
        raise CheckpointError(
            f"{path}: a link to {target}, outside of the folder", hint="put the file itself there, if you trust it"
        )


def check_all_inside(folder: Path) -> None:
    """`check_inside` for each entry of a folder.

    Raises:
        CheckpointError: by the link's name.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            check_inside(folder, path)


def is_file_name(name: str) -> bool:
    """Whether a text that somebody else wrote names an entry of a folder, and nothing beyond it."""
    return (
        0 < len(name.encode(errors="replace")) < 256
        and name.isprintable()
        and "/" not in name
        and name not in {".", ".."}
    )
