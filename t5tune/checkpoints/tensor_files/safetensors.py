"""Read and write safetensors files one tensor at a time (format: github.com/huggingface/safetensors).

A file consists of 8 bytes with the length of the header, a JSON header with names, dtypes, shapes and offsets, and the
data.
"""

import json
import os
import struct
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.tensor_files.tensors import (
    MAX_DIMENSIONS,
    NUMPY_DTYPES,
    FileRange,
    PartitionedTensor,
    Tensor,
    count_tensor_bytes,
)
from t5tune.errors import CheckpointError
from t5tune.formatting import shorten
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import parse_json_object

MAX_HEADER_BYTES = 16 << 20  # T5-XXL's header is 70 KB long
HEADER_ALIGNMENT = 8
MAX_DIMENSION_SIZE = 1 << 48
ENTRY_KEYS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's header entry; `begin` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file with a checked header: tensors don't overlap, leave no gaps, and fill the file."""

    def __init__(self, path: Path) -> None:
        """Read and check the header."""
        self.path = path
        self._map: weakref.ref[np.memmap[Any, np.dtype[np.uint8]]] | None = None
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                if size < 8:
                    problem = f"{path}: not a safetensors file: it has {size} bytes"
                    raise CheckpointError(problem, hint="copy or download it again")
                length = struct.unpack("<Q", file.read(8))[0]
                if length > min(MAX_HEADER_BYTES, size - 8):
                    raise CheckpointError(f"{path}: not a safetensors file: its header is {length} bytes long")
                header = parse_json_object(file.read(length))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: can't be read as safetensors: {describe_error(error)}") from error
        self.data_begin = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise CheckpointError(f"{path}: __metadata__: expected a mapping of names to strings")
        entries = {name: self._parse_entry(name, value, size) for name, value in header.items()}
        self.entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        """By name, in the order of their bytes."""
        self._check_positions(size)

    def _check_positions(self, size: int) -> None:
        position = self.data_begin
        for name, entry in self.entries.items():
            if entry.begin != position:
                raise CheckpointError(f"{self.path}: {name}: begins at byte {entry.begin}, expected byte {position}")
            position = entry.end
        if position != size:
            raise CheckpointError(f"{self.path}: has {size} bytes, but the header describes {position}")

    def _parse_entry(self, name: str, value: Any, size: int) -> TensorEntry:
        if problem := _find_problem(value, size - self.data_begin):
            raise CheckpointError(f"{self.path}: {name}: {problem}")
        begin, end = value["data_offsets"]
        return TensorEntry(value["dtype"], tuple(value["shape"]), self.data_begin + begin, self.data_begin + end)

    def read_header(self) -> bytes:
        """Read the bytes before the data: the header's length and the header."""
        with open(self.path, "rb") as file:
            return file.read(self.data_begin)

    def get_tensor(self, name: str) -> Tensor:
        """Return the tensor as a read-only view of the mapped file."""
        entry = self.entries[name]
        if entry.begin == entry.end:
            return Tensor(entry.dtype, np.zeros(entry.shape, NUMPY_DTYPES[entry.dtype]))
        count = (entry.end - entry.begin) // NUMPY_DTYPES[entry.dtype].itemsize
        # an offset needn't be a multiple of the item size: map bytes, then reinterpret them
        array = np.frombuffer(self._map_file()[entry.begin : entry.end], NUMPY_DTYPES[entry.dtype], count)
        return Tensor(entry.dtype, array.reshape(entry.shape), FileRange(self.path, entry.begin))

    def _map_file(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        mapped = self._map() if self._map is not None else None
        if mapped is None:
            mapped = np.memmap(self.path, np.uint8, "r")
            self._map = weakref.ref(mapped)
        return mapped


def _find_problem(entry: Any, data_size: int) -> str | None:
    if not isinstance(entry, dict):
        return f"expected an object with {', '.join(ENTRY_KEYS)}"
    if missing := [key for key in ENTRY_KEYS if key not in entry]:
        return f"{missing[0]} is missing"
    dtype, shape, offsets = (entry[key] for key in ENTRY_KEYS)
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        return f"dtype {shorten(str(dtype))} is unknown; expected one of {', '.join(NUMPY_DTYPES)}"
    if not _is_integers(shape):
        return "shape isn't a list of non-negative integers"
    if len(shape) > MAX_DIMENSIONS:
        return f"shape has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed"
    if max(shape, default=0) >= MAX_DIMENSION_SIZE:
        return f"shape has a dimension of {MAX_DIMENSION_SIZE} or more"
    if not _is_integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "data_offsets isn't a list of two ascending non-negative integers"
    if offsets[1] > data_size:
        return f"data_offsets ends at byte {offsets[1]}, but the file has {data_size} bytes of data"
    found, needed = offsets[1] - offsets[0], count_tensor_bytes(dtype, tuple(shape))
    if found != needed:
        return f"data_offsets has {found} bytes, but dtype {dtype} and shape {shape} need {needed}"
    return None


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor | PartitionedTensor],
    metadata: Mapping[str, str] | None = None,
    advance: Callable[[int], None] = lambda size: None,
) -> None:
    """Write tensors in the order of their names, so that the same tensors always give the same bytes.

    `advance` is called after each chunk, with its size in bytes.
    """
    entries = {name: (tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)}
    with open(path, "wb") as file:
        file.write(build_header(entries, metadata))
        for name in entries:
            for chunk in tensors[name].iter_chunks():
                file.write(chunk)
                advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def build_header(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Build the beginning of a file, length and header, for tensors of these (dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in entries.items():
        size = count_tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(encoded)) + encoded
