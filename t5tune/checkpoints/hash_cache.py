"""A base's hash, remembered in a run folder, so that going on needn't read tens of gigabytes once more.

    states = file_states(base)
    sha256 = recall(run / "base.json", states) or full_hash(Checkpoint(base))
    remember(run / "base.json", states, sha256)

It counts as long as each file is the very one that was read: of the same device, inode, size and times. A file's ctime
moves with every change of it, and unlike its mtime nobody can set it back. A copy on another machine is read again.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.io.atomic import write_json

FORMAT = 1
SECONDS_TO_SETTLE = 2.0  # a second change within a tick of the file system's clock leaves the ctime as it was


@dataclass(frozen=True)
class States:
    """Of each file that holds weights: its device, inode, bytes, mtime and ctime in nanoseconds.

    Args:
        settled: none of them was changed so lately that one more change might not show.
    """

    files: dict[str, list[int]]
    settled: bool


def file_states(folder: Path) -> States:
    """What to compare before the files are read."""
    found = {path.name: path.stat() for path, _ in Checkpoint(folder).parts}
    newest = max(state.st_ctime for state in found.values())
    files = {
        name: [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        for name, state in sorted(found.items())
    }
    return States(files, time.time() - newest > SECONDS_TO_SETTLE)


def recall(memo: Path, states: States) -> str | None:
    """The hash of the files that are in these states; None: nobody remembers it."""
    try:
        known = json.loads(memo.read_bytes())
        if known["format"] == FORMAT and known["files"] == states.files:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def remember(memo: Path, states: States, sha256: str) -> None:
    """Keep the hash of files that were in these states before they were read."""
    if states.settled and recall(memo, states) != sha256:
        write_json(memo, {"format": FORMAT, "sha256": sha256, "files": states.files})
