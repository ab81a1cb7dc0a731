"""Read and write safetensors a tensor at a time (format: github.com/huggingface/safetensors).

A file is 8 bytes with the header's length, a JSON header of names, dtypes, shapes and offsets, and the data.
A checkpoint is one such file, or several with `model.safetensors.index.json`, or the same with torch's .bin.
"""

import json
import math
import os
import struct
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.tensors import STORAGE, Place, Tensor
from t5tune.checkpoints.torch_format.file import read_torch_file
from t5tune.errors import CheckpointError
from t5tune.io.reasons import reason_of
from t5tune.io.untrusted import holds, parse_object, read_object

MAX_HEADER = 16 << 20  # T5-XXL's header has 70 KB
ALIGNMENT = 8
MAX_DIMENSIONS = 16
MAX_SIZE = 1 << 48
FOREIGN = {".h5", ".msgpack", ".ckpt", ".gguf", ".onnx", ".pkl", ".pth", ".pt", ".npz", ".safetensors", ".bin"}


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
        self._map: weakref.ref[np.memmap[Any, np.dtype[np.uint8]]] | None = None
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else MAX_HEADER + 1
                if length > min(MAX_HEADER, size - 8):
                    raise CheckpointError(f"{path}: not a safetensors file: its header is {length} bytes long")
                header = parse_object(file.read(length))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: can't be read as safetensors: {reason_of(error)}") from error
        self.data_begin = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise CheckpointError(f"{path}: __metadata__: expected texts by name")
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
            if not all(type(number) is int for number in (begin, end, *shape)):
                raise ValueError("expected whole numbers")
            if len(shape) > MAX_DIMENSIONS or max(shape, default=0) >= MAX_SIZE:
                raise ValueError("a shape that no array has")
            expected = math.prod(shape) * storage.itemsize
            if min(begin, *shape, 0) < 0 or end - begin != expected or end + self.data_begin > size:
                raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name}: bad header entry: {error!r}") from error
        return Entry(dtype, shape, self.data_begin + begin, self.data_begin + end)

    def read_header(self) -> bytes:
        """The bytes before the data: the header's length and the header."""
        with open(self.path, "rb") as file:
            return file.read(self.data_begin)

    def tensor(self, name: str) -> Tensor:
        """The tensor as a read-only view of the mapped file."""
        entry = self.entries[name]
        if entry.begin == entry.end:
            return Tensor(entry.dtype, np.zeros(entry.shape, STORAGE[entry.dtype]))
        count = (entry.end - entry.begin) // STORAGE[entry.dtype].itemsize
        # an offset need not be a multiple of the item's size: map bytes, then view them
        array = np.frombuffer(self._mapped()[entry.begin : entry.end], STORAGE[entry.dtype], count)
        return Tensor(entry.dtype, array.reshape(entry.shape), Place(self.path, entry.begin))

    def _mapped(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        """The file's bytes, mapped once for all tensors that live: each map would hold the file open."""
        mapped = self._map() if self._map is not None else None
        if mapped is None:
            mapped = np.memmap(self.path, np.uint8, "r")
            self._map = weakref.ref(mapped)
        return mapped


class Tensors(Mapping[str, Tensor]):
    """A file's tensors by name, mapped when one is asked for and let go with the last use of any."""

    def __init__(self, file: SafetensorsFile) -> None:
        self.file = file

    def __getitem__(self, name: str) -> Tensor:
        return self.file.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.entries)

    def __len__(self) -> int:
        return len(self.file.entries)


class Checkpoint:
    """All tensors of a folder with weights: name -> Tensor, whatever files they lie in."""

    def __init__(self, folder: Path) -> None:
        """Raises: CheckpointError: no weights, files that can't be trusted, or an index that doesn't fit them."""
        self.folder = folder
        self.files: list[SafetensorsFile] = []
        self.parts: list[tuple[Path, list[str]]] = []
        """Each file with the names of its tensors, in the order of their bytes."""
        self._where: dict[str, SafetensorsFile] = {}
        self._torch_tensors: dict[str, Tensor] = {}
        self.index, weight_map, paths = _weight_files(folder)
        for path in paths:
            if path.suffix == ".safetensors":
                file = SafetensorsFile(path)
                self.files.append(file)
                entries = file.entries
                names = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
            else:
                torch_tensors = _torch_tensors(path)
                names = list(torch_tensors)
            if doubled := [name for name in names if name in self]:
                raise CheckpointError(f"{path}: {doubled[0]}: another file of the checkpoint holds it too")
            if path.suffix == ".safetensors":
                self._where |= dict.fromkeys(names, file)
            else:
                self._torch_tensors |= torch_tensors
            self.parts.append((path, names))
        held = {name: path.name for path, names in self.parts for name in names}
        for name, file_name in weight_map.items():
            if held.get(name) != file_name:
                raise CheckpointError(f"{self.index}: {name}: {file_name} doesn't hold it")

    def __contains__(self, name: str) -> bool:
        return name in self._where or name in self._torch_tensors

    def names(self) -> list[str]:
        """The tensors' names, file by file."""
        return [*self._where, *self._torch_tensors]

    def dtype_and_shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """What the tensor is, without mapping it."""
        described = self._where[name].entries[name] if name in self._where else self._torch_tensors[name]
        return described.dtype, described.shape

    def place(self, name: str) -> Place | None:
        """Where the tensor's bytes lie; None: not end to end."""
        if name in self._where:
            return Place(self._where[name].path, self._where[name].entries[name].begin)
        return self._torch_tensors[name].place

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
        return _same(self.tensor("lm_head.weight"), self.tensor("shared.weight"))


def _same(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    pairs = zip(first.blocks(), second.blocks(), strict=True)
    return all(np.array_equal(a.array, b.array, equal_nan=True) for (_, a), (_, b) in pairs)


def _weight_files(folder: Path) -> tuple[Path | None, dict[str, str], list[Path]]:
    """(the index, where it is one that tells; its tensors' files; the files with the weights)."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        # a single file wins over an index, as in transformers
        if holds(folder, name):
            return None, {}, [folder / name]
        if holds(folder, f"{name}.index.json"):
            weight_map = _weight_map(folder, f"{name}.index.json")
            files = _indexed_files(folder / f"{name}.index.json", weight_map)
            return folder / f"{name}.index.json", weight_map, files
    foreign = sorted(path.name for path in folder.glob("*") if path.suffix in FOREIGN)
    raise CheckpointError(
        f"{folder}: no weights (model.safetensors or pytorch_model.bin)"
        + (f"; {foreign[0]} is in a format that isn't read" if foreign else ""),
        hint="load and save it once with transformers, as safetensors"
        if foreign
        else "name a folder that save_pretrained wrote, or a model id",
    )


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    weight_map = read_object(folder, name).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(f"{folder / name}: not an index of weights: expected weight_map with files by tensor")
    return weight_map


def _indexed_files(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in {"", ".", ".."}:
            raise CheckpointError(f"{index}: {name!r}: points outside the folder")
        if not name.endswith(suffix):
            raise CheckpointError(f"{index}: {name!r}: expected a file that ends in {suffix}")
        if not holds(index.parent, name):
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


def total_bytes(paths: Iterable[Path]) -> int:
    """The size of the files together."""
    return sum(path.stat().st_size for path in paths)
