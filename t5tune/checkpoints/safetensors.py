"""Read and write safetensors files one tensor at a time (format: github.com/huggingface/safetensors).

A file consists of 8 bytes with the length of the header, a JSON header with names, dtypes, shapes and offsets, and the
data. A checkpoint is one such file, or several shards with `model.safetensors.index.json`, or the same with torch's
.bin files.
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

from t5tune.checkpoints.tensors import NUMPY_DTYPES, FileRange, Tensor
from t5tune.checkpoints.torch_format.file import read_torch_file
from t5tune.errors import CheckpointError
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import has_file, parse_json_object, read_json_object

MAX_HEADER_BYTES = 16 << 20  # T5-XXL's header is 70 KB long
HEADER_ALIGNMENT = 8
MAX_DIMENSIONS = 16
MAX_DIMENSION_SIZE = 1 << 48
UNSUPPORTED_SUFFIXES = {
    ".h5",
    ".msgpack",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".pkl",
    ".pth",
    ".pt",
    ".npz",
    ".safetensors",
    ".bin",
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's header entry: dtype, shape, and the range of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file whose header has been checked. Its tensors are mapped on access."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: the header is broken, or tensors overlap, leave gaps or exceed the file.
        """
        self.path = path
        self._map: weakref.ref[np.memmap[Any, np.dtype[np.uint8]]] | None = None
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else MAX_HEADER_BYTES + 1
                if length > min(MAX_HEADER_BYTES, size - 8):
                    raise CheckpointError(f"{path}: not a safetensors file: its header is {length} bytes long")
                header = parse_json_object(file.read(length))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: can't be read as safetensors: {describe_error(error)}") from error
        self.data_begin = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise CheckpointError(f"{path}: __metadata__: expected a mapping of names to strings")
        self.entries = {name: self._parse_entry(name, value, size) for name, value in header.items()}
        self._check_positions(size)

    def _check_positions(self, size: int) -> None:
        """Check that the tensors fill the file without overlaps and gaps."""
        position = self.data_begin
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                raise CheckpointError(f"{self.path}: {name}: begins at byte {entry.begin}, expected byte {position}")
            position = entry.end
        if position != size:
            raise CheckpointError(f"{self.path}: has {size} bytes, but the header describes {position}")

    def _parse_entry(self, name: str, value: Any, size: int) -> TensorEntry:
        try:
            begin, end = value["data_offsets"]
            dtype, shape = value["dtype"], tuple(value["shape"])
            storage = NUMPY_DTYPES[dtype]
            if not all(type(number) is int for number in (begin, end, *shape)):
                raise ValueError("expected integers")
            if len(shape) > MAX_DIMENSIONS or max(shape, default=0) >= MAX_DIMENSION_SIZE:
                raise ValueError("too many or too large dimensions")
            expected = math.prod(shape) * storage.itemsize
            if min(begin, *shape, 0) < 0 or end - begin != expected or end + self.data_begin > size:
                raise ValueError(f"{end - begin} bytes for {dtype} {list(shape)}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {name}: invalid header entry: {error!r}") from error
        return TensorEntry(dtype, shape, self.data_begin + begin, self.data_begin + end)

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
        """Map the file once for all live tensors, because each map keeps the file open."""
        mapped = self._map() if self._map is not None else None
        if mapped is None:
            mapped = np.memmap(self.path, np.uint8, "r")
            self._map = weakref.ref(mapped)
        return mapped


class LazyTensors(Mapping[str, Tensor]):
    """A file's tensors by name. The file is mapped on the first access, and unmapped when no tensor is in use."""

    def __init__(self, file: SafetensorsFile) -> None:
        self.file = file

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.entries)

    def __len__(self) -> int:
        return len(self.file.entries)


class Checkpoint:
    """All tensors of a model folder by name, whatever files contain them."""

    def __init__(self, folder: Path) -> None:
        """Open the folder's weight files and check them against the index.

        Raises:
            CheckpointError: there are no weights, a file can't be trusted, or the index doesn't match the files.
        """
        self.folder = folder
        self.files: list[SafetensorsFile] = []
        self.shards: list[tuple[Path, list[str]]] = []
        """Each weight file with the names of its tensors, in the order of their bytes."""
        self._files_by_name: dict[str, SafetensorsFile] = {}
        self._torch_tensors: dict[str, Tensor] = {}
        self.index, weight_map, paths = _find_weight_files(folder)
        for path in paths:
            if path.suffix == ".safetensors":
                file = SafetensorsFile(path)
                self.files.append(file)
                entries = file.entries
                names = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
            else:
                torch_tensors = _read_state_dict(path)
                names = list(torch_tensors)
            if duplicates := [name for name in names if name in self]:
                raise CheckpointError(f"{path}: {duplicates[0]}: is also in another file of this checkpoint")
            if path.suffix == ".safetensors":
                self._files_by_name |= dict.fromkeys(names, file)
            else:
                self._torch_tensors |= torch_tensors
            self.shards.append((path, names))
        found = {name: path.name for path, names in self.shards for name in names}
        for name, file_name in weight_map.items():
            if found.get(name) != file_name:
                raise CheckpointError(f"{self.index}: {name}: is not in {file_name}")

    def __contains__(self, name: str) -> bool:
        return name in self._files_by_name or name in self._torch_tensors

    def list_names(self) -> list[str]:
        """List the tensors' names, file by file."""
        return [*self._files_by_name, *self._torch_tensors]

    def get_dtype_and_shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return a tensor's dtype and shape without mapping it."""
        entry = self._files_by_name[name].entries[name] if name in self._files_by_name else self._torch_tensors[name]
        return entry.dtype, entry.shape

    def get_file_range(self, name: str) -> FileRange | None:
        """Return where the tensor's bytes are; None if they aren't contiguous."""
        if name in self._files_by_name:
            return FileRange(self._files_by_name[name].path, self._files_by_name[name].entries[name].begin)
        return self._torch_tensors[name].file_range

    def get_tensor(self, name: str) -> Tensor:
        """Return the tensor as a view of a mapped file."""
        return self._files_by_name[name].get_tensor(name) if name in self._files_by_name else self._torch_tensors[name]

    def is_tied(self) -> bool:
        """Whether the output head is tied to the embedding, as the weights show.

        config.json isn't reliable: transformers 5 writes `tie_word_embeddings: true` for any T5, whatever its weights.
        """
        if "lm_head.weight" not in self:
            return True
        if "shared.weight" not in self:
            raise CheckpointError(f"{self.folder}: shared.weight: missing from the weights")
        return _are_equal(self.get_tensor("lm_head.weight"), self.get_tensor("shared.weight"))


def _are_equal(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    pairs = zip(first.iter_blocks(), second.iter_blocks(), strict=True)
    return all(np.array_equal(a.array, b.array, equal_nan=True) for (_, a), (_, b) in pairs)


def _find_weight_files(folder: Path) -> tuple[Path | None, dict[str, str], list[Path]]:
    """Find (the index or None, its map of tensor names to files, the files with the weights)."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        # a single file takes precedence over an index, as in transformers
        if has_file(folder, name):
            return None, {}, [folder / name]
        if has_file(folder, f"{name}.index.json"):
            weight_map = _read_weight_map(folder, f"{name}.index.json")
            files = _resolve_indexed_files(folder / f"{name}.index.json", weight_map)
            return folder / f"{name}.index.json", weight_map, files
    unsupported = sorted(path.name for path in folder.glob("*") if path.suffix in UNSUPPORTED_SUFFIXES)
    raise CheckpointError(
        f"{folder}: no weights (model.safetensors or pytorch_model.bin)"
        + (f"; the format of {unsupported[0]} isn't supported" if unsupported else ""),
        hint="load the model with transformers and save it as safetensors"
        if unsupported
        else "give a folder that save_pretrained wrote, or the name of a model on the Hub",
    )


def _read_weight_map(folder: Path, name: str) -> dict[str, str]:
    weight_map = read_json_object(folder, name).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{folder / name}: not an index of weights: expected a weight_map from tensor names to files"
        )
    return weight_map


def _resolve_indexed_files(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in {"", ".", ".."}:
            raise CheckpointError(f"{index}: {name!r}: points outside the folder")
        if not name.endswith(suffix):
            raise CheckpointError(f"{index}: {name!r}: expected a file that ends in {suffix}")
        if not has_file(index.parent, name):
            raise CheckpointError(f"{index.parent / name}: missing, but listed in {index.name}")
    return [index.parent / name for name in names]


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    state = read_torch_file(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict with tensors only")
    return {str(name): value for name, value in state.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the order of their names, so that the same tensors always give the same bytes."""
    entries = {name: (tensors[name].dtype, tensors[name].shape) for name in sorted(tensors)}
    with open(path, "wb") as file:
        file.write(build_header(entries, metadata))
        for name in entries:
            file.write(tensors[name].tobytes())
        file.flush()
        os.fsync(file.fileno())


def build_header(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Build the beginning of a file, length and header, for tensors of these (dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(encoded)) + encoded


def sum_file_sizes(paths: Iterable[Path]) -> int:
    """Add up the sizes of files, in bytes."""
    return sum(path.stat().st_size for path in paths)
