"""Files of a folder that somebody else made: they must lie in it."""

from pathlib import Path

from t5tune.errors import CheckpointError
from t5tune.reasons import reason_of


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
