"""Which base was an adapter trained on? Its fingerprint stands in the adapter file's metadata, under `t5tune`.

The fingerprint is a SHA-256 over each tensor's name, dtype, shape and 4 KiB of its bytes, so it is the same whatever
files hold the tensors. The second hash is over all of their bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor

KEY = "t5tune"
SAMPLE = 2 << 10  # bytes from a tensor's begin, and as many from its end
COPIES = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}


def base_facts(folder: Path, name: str, sha256: str | None = None) -> dict[str, str]:
    """What an adapter's file tells of its base: its name and both hashes, of which the second may be known."""
    base = Checkpoint(folder)
    return {"base": name, "fingerprint": fingerprint(base), "sha256": sha256 or full_hash(base)}


def fingerprint(base: Checkpoint) -> str:
    """Reads 4 KiB of each tensor."""
    digest = hashlib.sha256()
    for name in _names(base):
        tensor = base.tensor(name)
        digest.update(_description(name, tensor))
        rows = max(1, SAMPLE * (tensor.shape[0] if tensor.shape else 1) // max(1, tensor.nbytes))
        if not tensor.shape or 2 * rows >= tensor.shape[0]:
            digest.update(tensor.array.tobytes())
        else:
            digest.update(tensor.rows(0, rows).tobytes()[:SAMPLE])
            digest.update(tensor.rows(tensor.shape[0] - rows, tensor.shape[0]).tobytes()[-SAMPLE:])
    return digest.hexdigest()


def full_hash(base: Checkpoint) -> str:
    """Reads everything, several tensors at a time."""
    names = _names(base)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        parts = pool.map(lambda name: _hash(name, base.tensor(name)), names)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def encoded(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts as an entry of safetensors' metadata."""
    return {KEY: json.dumps(dict(facts), sort_keys=True)} if facts else {}


def decoded(metadata: dict[str, str]) -> dict[str, Any]:
    """The facts in a file's metadata; nothing where t5tune didn't write it."""
    try:
        facts = json.loads(metadata.get(KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _names(base: Checkpoint) -> list[str]:
    """Sorted, without the copies of a shared tensor that some files hold and others don't."""
    copies = COPIES | ({"lm_head.weight"} if base.is_tied() else set())
    return sorted(name for name in base.names() if name not in copies)


def _hash(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(_description(name, tensor))
    for _, block in tensor.blocks():
        digest.update(block.tobytes())
    return digest.digest()


def _description(name: str, tensor: Tensor) -> bytes:
    return json.dumps([name, tensor.dtype, list(tensor.shape)]).encode()
