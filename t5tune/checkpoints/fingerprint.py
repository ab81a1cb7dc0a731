"""Identify an adapter's base by two hashes, which the metadata of the adapter's file contains under `t5tune`.

The fingerprint is a SHA-256 of each tensor's name, dtype, shape and 4 KiB of its bytes. It doesn't depend on how the
tensors are divided into files. The second hash, `sha256`, covers all of their bytes.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.io.atomic import write_json
from t5tune.io.processes import count_cores
from t5tune.io.untrusted import parse_json_object

FINGERPRINT_BYTES = 2 << 10  # from each end of a tensor
HASH_CACHE_FORMAT = 1
SECONDS_TO_SETTLE = 2.0  # two changes within one tick of the file system's clock get the same ctime

FileStats = dict[str, list[int]]
"""File name -> [device, inode, bytes, mtime, ctime], times in nanoseconds. While they are the same, so is the hash.

Every change to a file updates its ctime, which, unlike the mtime, can't be set back. A copy on another machine is
hashed again.
"""


def describe_base(base: Checkpoint, name: str, sha256: str | None = None) -> dict[str, str]:
    """Describe a base for an adapter's file: its name and both hashes; `sha256` is the full hash if already known."""
    return {"base": name, "fingerprint": compute_fingerprint(base), "sha256": sha256 or compute_full_hash(base)}


def is_trained_base(metadata: Mapping[str, Any], base: Checkpoint) -> bool:
    """Whether an adapter whose file has this metadata was trained on the base; true if the file doesn't say."""
    return metadata.get("fingerprint") in (None, compute_fingerprint(base))


def compute_fingerprint(base: Checkpoint) -> str:
    """Hash 4 KiB of each tensor."""
    digest = hashlib.sha256()
    for name in _list_tensor_names(base):
        tensor = base.get_tensor(name)
        digest.update(_describe_tensor(name, tensor))
        rows = max(1, FINGERPRINT_BYTES * (tensor.shape[0] if tensor.shape else 1) // max(1, tensor.array.nbytes))
        if not tensor.shape or 2 * rows >= tensor.shape[0]:
            digest.update(tensor.array.tobytes())
        else:
            digest.update(tensor.read_rows(0, rows).tobytes()[:FINGERPRINT_BYTES])
            digest.update(tensor.read_rows(tensor.shape[0] - rows, tensor.shape[0]).tobytes()[-FINGERPRINT_BYTES:])
    return digest.hexdigest()


def compute_full_hash(base: Checkpoint) -> str:
    """Hash all bytes of all tensors, several tensors at a time."""
    names = _list_tensor_names(base)
    with ThreadPoolExecutor(min(16, count_cores())) as pool:
        parts = pool.map(lambda name: _hash_tensor(name, base.get_tensor(name)), names)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _list_tensor_names(base: Checkpoint) -> list[str]:
    """List the tensors in order, without copies of a shared tensor, which only some files contain."""
    copies = base.architecture.list_shared(base.is_tied())
    return sorted(name for name in base.list_names() if name not in copies)


def _hash_tensor(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(_describe_tensor(name, tensor))
    for _, block in tensor.iter_blocks():
        digest.update(block.tobytes())
    return digest.digest()


def _describe_tensor(name: str, tensor: Tensor) -> bytes:
    return json.dumps([name, tensor.dtype, list(tensor.shape)]).encode()


def read_file_stats(folder: Path) -> FileStats | None:
    """Read the identity of a checkpoint's weight files. Call it before hashing them, so that no change is missed.

    None: a file was changed so recently that a second change could keep the same ctime.
    """
    stats = read_stats(path for path, _ in Checkpoint(folder).shards)
    return stats if are_settled(stats, time.time()) else None


def read_stats(files: Iterable[Path]) -> FileStats:
    found = {path.name: path.stat() for path in files}
    return {
        name: [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        for name, stat in sorted(found.items())
    }


def are_settled(stats: FileStats, now: float) -> bool:
    """Whether a change after `now` (seconds since the epoch) changes the ctime of its file."""
    return now - max(ctime for *_, ctime in stats.values()) / 1e9 > SECONDS_TO_SETTLE


def load_hash(cache_file: Path, stats: FileStats | None) -> str | None:
    """Load the full hash of files with these stats; None: not stored."""
    try:
        return match_hash(parse_json_object(cache_file.read_bytes()), stats)
    except (OSError, ValueError):
        return None


def store_hash(cache_file: Path, stats: FileStats | None, sha256: str) -> None:
    """Store the hash of files that had these stats before they were hashed."""
    if stats is not None and load_hash(cache_file, stats) != sha256:
        write_json(cache_file, describe_hash(stats, sha256))


def describe_hash(stats: FileStats | None, sha256: str) -> dict[str, Any] | None:
    """Describe the hash of files that had these stats before they were hashed; None if there are no stats."""
    return None if stats is None else {"format": HASH_CACHE_FORMAT, "sha256": sha256, "files": stats}


def match_hash(known: Any, stats: FileStats | None) -> str | None:
    """Return the hash that `describe_hash` described; None: its files had different stats.

    A run folder stores it, so that resuming doesn't read tens of gigabytes again.
    """
    is_known = isinstance(known, dict) and known.get("format") == HASH_CACHE_FORMAT and known.get("files") == stats
    return str(known["sha256"]) if is_known else None
