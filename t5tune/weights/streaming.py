"""Read and write safetensors a tensor at a time (format: github.com/huggingface/safetensors).

A file is 8 bytes with the header's length, a JSON header of names, dtypes, shapes and offsets, and the data.
A checkpoint is one such file, or several with `model.safetensors.index.json`, or the same with torch's .bin.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from t5tune.errors import CheckpointError
from t5tune.weights.tensors import STORAGE, Tensor
from t5tune.weights.torch_file import read_torch_file

MAX_HEADER = 100 << 20
ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands: dtype, shape, and the range of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file: its header checked, its tensors mapped when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises: CheckpointError: the header is broken, or tensors overlap, leave holes or pass the end."""
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else MAX_HEADER + 1
                if length > min(MAX_HEADER, size - 8):
                    raise CheckpointError(f"{path}: not a safetensors file: its header is {length} bytes long")
                header = json.loads(file.read(length))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: can't be read as safetensors: {error}") from error
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object")
        self.data_begin = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries = {name: self._entry(name, value, size) for name, value in header.items()}
        position = self.data_begin
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                raise CheckpointError(f"{path}: {name}: begins at byte {entry.begin}, expected {position}")
            position = entry.end
        if position != size:
            raise CheckpointError(f"{path}: {size} bytes, but the header describes {position}")

    def _entry(self, name: str, value: Any, size: int) -> Entry:
        try:
            begin, end = value["data_offsets"]
            dtype, shape = value["dtype"], tuple(value["shape"])
            storage = STORAGE[dtype]
            expected = math.prod(shape) * storage.itemsize
            if min((begin, *shape), default=0) < 0 or end - begin != expected or end + self.data_begin > size:
                raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name}: bad header entry: {error!r}") from error
        return Entry(dtype, shape, self.data_begin + begin, self.data_begin + end)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a read-only view of the mapped file."""
        entry = self.entries[name]
        if entry.begin == entry.end:
            return Tensor(entry.dtype, np.zeros(entry.shape, STORAGE[entry.dtype]))
        count = (entry.end - entry.begin) // STORAGE[entry.dtype].itemsize
        # an offset need not be a multiple of the item's size: map bytes, then view them
        mapped = np.memmap(self.path, np.uint8, "r", entry.begin, (entry.end - entry.begin,))
        array = np.frombuffer(mapped, STORAGE[entry.dtype], count).reshape(entry.shape)
        return Tensor(entry.dtype, array)


class Checkpoint:
    """All tensors of a folder with weights: name -> Tensor, whatever files they lie in."""

    def __init__(self, folder: Path) -> None:
        """Raises: CheckpointError: no weights, or an index that names a file outside the folder."""
        self.folder = folder
        self.files: list[SafetensorsFile] = []
        self._where: dict[str, SafetensorsFile] = {}
        self._torch_tensors: dict[str, Tensor] = {}
        self.index, paths = _weight_files(folder)
        for path in paths:
            if path.suffix == ".safetensors":
                file = SafetensorsFile(path)
                self.files.append(file)
                self._where |= dict.fromkeys(file.entries, file)
            else:
                self._torch_tensors |= _torch_tensors(path)
        if self.index is not None and (missing := sorted(set(_weight_map(self.index)) - set(self.names()))):
            raise CheckpointError(f"{self.index}: {missing[0]}: no file of the checkpoint holds it")

    def __contains__(self, name: str) -> bool:
        return name in self._where or name in self._torch_tensors

    def names(self) -> list[str]:
        """The tensors' names, file by file."""
        return [*self._where, *self._torch_tensors]

    def tensor(self, name: str) -> Tensor:
        """The tensor, as a view of a mapped file."""
        return self._where[name].tensor(name) if name in self._where else self._torch_tensors[name]

    def is_tied(self) -> bool:
        """Whether the head is the embedding: the file decides, not config.json.

        transformers 5 says `tie_word_embeddings: true` of every T5, whatever its file holds.
        """
        if "lm_head.weight" not in self:
            return True
        if "shared.weight" not in self:
            raise CheckpointError(f"{self.folder}: shared.weight: missing from the weights")
        head, shared = self.tensor("lm_head.weight"), self.tensor("shared.weight")
        return head.dtype == shared.dtype and np.array_equal(head.array, shared.array, equal_nan=True)


def _weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """(the index, where it is one that tells, and the files with the weights)."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        # a single file wins over an index, as in transformers
        if (folder / name).is_file():
            return None, [folder / name]
        if index.is_file():
            return index, _indexed_files(index)
    raise CheckpointError(
        f"{folder}: no weights (model.safetensors or pytorch_model.bin)",
        hint="name a folder that save_pretrained wrote, or a model id",
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not an index of weights: {error!r}") from error


def _indexed_files(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()), key=str)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r}: points outside the folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: missing; {index.name} names it")
    return [index.parent / name for name in names]


def _torch_tensors(path: Path) -> dict[str, Tensor]:
    state = read_torch_file(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors")
    return {str(name): value for name, value in state.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the order of their names; the same tensors give the same bytes."""
    entries = {name: (tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)}
    with open(path, "wb") as file:
        file.write(header_of(entries, metadata))
        for name in entries:
            file.write(tensors[name].tobytes())
        file.flush()
        os.fsync(file.fileno())


def header_of(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and the header of a file that holds (dtype, shape) by name, in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * STORAGE[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    return struct.pack("<Q", len(encoded)) + encoded


def copy_range(source: IO[bytes], target: IO[bytes], begin: int, end: int) -> Iterator[int]:
    """Append source[begin:end] to the target, inside the kernel where it can; yields the bytes of each step."""
    while begin < end:
        step = min(end - begin, 64 << 20)
        if hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(source.fileno(), target.fileno(), step, begin)
            except OSError:  # some file systems can't
                copied = _copy(source, target, begin, step)
        else:
            copied = _copy(source, target, begin, step)
        if copied == 0:
            raise CheckpointError(f"{source.name}: ended at byte {begin}, expected {end}")
        begin += copied
        yield copied


def _copy(source: IO[bytes], target: IO[bytes], begin: int, step: int) -> int:
    return os.write(target.fileno(), os.pread(source.fileno(), step, begin))


def total_bytes(paths: Iterable[Path]) -> int:
    """The size of the files together."""
    return sum(path.stat().st_size for path in paths)
