"""Identify the base of an adapter by hashes, which are stored in the metadata of the adapter's file under `t5tune`.

The fingerprint is a SHA-256 of each tensor's name, dtype, shape and 4 KiB of its bytes. It doesn't depend on how the
tensors are divided into files. The second hash, `sha256`, covers all of their bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from t5tune.checkpoints.checkpoint import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.families import EMBEDDING_COPIES, HEAD_WEIGHT
from t5tune.io.untrusted import parse_json_object

METADATA_KEY = "t5tune"
FINGERPRINT_BYTES = 2 << 10  # bytes from the beginning of a tensor, and as many from its end


def describe_base(folder: Path, name: str, sha256: str | None = None) -> dict[str, str]:
    """Describe a base for an adapter's file: its name and both hashes; `sha256` is the full one if already known."""
    base = Checkpoint(folder)
    return {"base": name, "fingerprint": compute_fingerprint(base), "sha256": sha256 or compute_full_hash(base)}


def compute_fingerprint(base: Checkpoint) -> str:
    """Hash 4 KiB of each tensor."""
    digest = hashlib.sha256()
    for name in _list_tensor_names(base):
        tensor = base.get_tensor(name)
        digest.update(_describe_tensor(name, tensor))
        rows = max(1, FINGERPRINT_BYTES * (tensor.shape[0] if tensor.shape else 1) // max(1, tensor.nbytes))
        if not tensor.shape or 2 * rows >= tensor.shape[0]:
            digest.update(tensor.array.tobytes())
        else:
            digest.update(tensor.read_rows(0, rows).tobytes()[:FINGERPRINT_BYTES])
            digest.update(tensor.read_rows(tensor.shape[0] - rows, tensor.shape[0]).tobytes()[-FINGERPRINT_BYTES:])
    return digest.hexdigest()


def compute_full_hash(base: Checkpoint) -> str:
    """Hash all bytes of all tensors, several tensors at a time."""
    names = _list_tensor_names(base)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        parts = pool.map(lambda name: _hash_tensor(name, base.get_tensor(name)), names)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def encode_base_metadata(base_metadata: Mapping[str, Any]) -> dict[str, str]:
    """Encode what identifies a base as an entry of a safetensors file's metadata."""
    return {METADATA_KEY: json.dumps(dict(base_metadata), sort_keys=True)} if base_metadata else {}


def decode_base_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """Decode what a file's metadata says about the base; empty if t5tune didn't write it."""
    try:
        return parse_json_object(metadata.get(METADATA_KEY, "{}").encode())
    except ValueError:
        return {}


def _list_tensor_names(base: Checkpoint) -> list[str]:
    """List the tensors in order, without copies of a shared tensor, which only some files contain."""
    copies = {*EMBEDDING_COPIES, HEAD_WEIGHT} if base.is_tied() else {*EMBEDDING_COPIES}
    return sorted(name for name in base.list_names() if name not in copies)


def _hash_tensor(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(_describe_tensor(name, tensor))
    for _, block in tensor.iter_blocks():
        digest.update(block.tobytes())
    return digest.digest()


def _describe_tensor(name: str, tensor: Tensor) -> bytes:
    return json.dumps([name, tensor.dtype, list(tensor.shape)]).encode()
