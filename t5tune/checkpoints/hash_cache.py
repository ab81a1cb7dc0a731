"""Cache of a base's SHA-256 in the run folder, so that resuming doesn't read tens of gigabytes again.

    stats = read_file_stats(base)
    sha256 = load_hash(run / "base.json", stats) or compute_full_hash(Checkpoint(base))
    store_hash(run / "base.json", stats, sha256)

The cached hash is valid as long as each file has the same device, inode, size and times. Every change to a file updates
its ctime, which, unlike the mtime, can't be set back. A copy on another machine is read again.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from t5tune.checkpoints.checkpoint import Checkpoint
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import parse_json_object

HASH_CACHE_FORMAT = 1
# two changes within one tick of the file system's clock get the same ctime
SECONDS_TO_SETTLE = 2.0


@dataclass(frozen=True)
class FileStats:
    """Identity of the weight files.

    Args:
        files: file name -> [device, inode, bytes, mtime, ctime], times in nanoseconds.
        is_settled: no file was changed so recently that another change could keep the same ctime.
    """

    files: dict[str, list[int]]
    is_settled: bool


def read_file_stats(folder: Path) -> FileStats:
    """Read the identity of a checkpoint's weight files. Call it before hashing them, so that no change is missed."""
    found = {path.name: path.stat() for path, _ in Checkpoint(folder).shards}
    newest = max(stat.st_ctime for stat in found.values())
    files = {
        name: [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for name, stat in sorted(found.items())
    }
    return FileStats(files, time.time() - newest > SECONDS_TO_SETTLE)


def load_hash(cache_file: Path, stats: FileStats) -> str | None:
    """Load the hash of files with these stats; None if it isn't cached."""
    try:
        known = parse_json_object(cache_file.read_bytes())
        if known["format"] == HASH_CACHE_FORMAT and known["files"] == stats.files:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    return None


def store_hash(cache_file: Path, stats: FileStats, sha256: str) -> None:
    """Store the hash of files that had these stats before they were hashed."""
    if stats.is_settled and load_hash(cache_file, stats) != sha256:
        write_json(cache_file, {"format": HASH_CACHE_FORMAT, "sha256": sha256, "files": stats.files})
