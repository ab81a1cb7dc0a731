"""Tensors as they are stored on disk: the name of a dtype, a shape, and bytes.

numpy has no bfloat16, so a BF16 tensor's array contains its bits as uint16. Only `to_float32` and `from_float32`
interpret them.
"""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.errors import CheckpointError

# safetensors' name of a dtype -> torch's name, which --dtype and config.json use, the numpy dtype of an array, and
# the class of a storage in torch's files
_DTYPES = {
    "F64": ("float64", "<f8", "DoubleStorage"),
    "F32": ("float32", "<f4", "FloatStorage"),
    "F16": ("float16", "<f2", "HalfStorage"),
    "BF16": ("bfloat16", "<u2", "BFloat16Storage"),
    "I64": ("int64", "<i8", "LongStorage"),
    "I32": ("int32", "<i4", "IntStorage"),
    "I16": ("int16", "<i2", "ShortStorage"),
    "I8": ("int8", "i1", "CharStorage"),
    "U8": ("uint8", "u1", "ByteStorage"),
    "BOOL": ("bool", "?", "BoolStorage"),
}
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(stored) for name, (_, stored, _) in _DTYPES.items()}
TORCH_NAMES = {name: torch_name for name, (torch_name, _, _) in _DTYPES.items()}
DTYPES_BY_TORCH_NAME = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
STORAGE_DTYPES = {storage: name for name, (_, _, storage) in _DTYPES.items()} | {"UntypedStorage": "U8"}
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
MAX_DIMENSIONS = 16
BLOCK_ELEMENTS = 1 << 18  # processed at a time: a few arrays of this size fit into a processor's cache
CHUNK_ELEMENTS = 4 << 20  # in memory at a time while a partitioned tensor is copied


@dataclass(frozen=True)
class FileRange:
    """The file and offset of a tensor's contiguous bytes."""

    path: Path
    begin: int


@dataclass(frozen=True)
class Tensor:
    """One tensor. `array` has its shape and the dtype NUMPY_DTYPES[dtype], and is often a view of a mapped file."""

    dtype: str
    array: npt.NDArray[Any]
    file_range: FileRange | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def read_rows(self, begin: int, end: int) -> "Tensor":
        """Copy rows [begin, end) into memory, read from the file if its location is known.

        Pages of a memory map count as used memory until the map is closed; memory read here is freed with its array.
        """
        if self.file_range is None:
            return Tensor(self.dtype, self.array[begin:end].copy())
        storage = NUMPY_DTYPES[self.dtype]
        shape = (end - begin, *self.shape[1:])
        stride = math.prod(self.shape[1:]) * storage.itemsize
        rows = np.empty(shape, storage)
        path, offset = self.file_range.path, self.file_range.begin + begin * stride
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            if file.readinto(rows.reshape(-1).view(np.uint8).data) != rows.nbytes:
                raise CheckpointError(f"{path}: file ends before byte {offset + rows.nbytes}")
        return Tensor(self.dtype, rows)

    def iter_blocks(self) -> Iterator[tuple[int, "Tensor"]]:
        """Iterate over (index of the first row, rows), about BLOCK_ELEMENTS elements at a time."""
        if not self.shape or 0 in self.shape:
            yield 0, Tensor(self.dtype, self.array.copy())
            return
        step = max(1, BLOCK_ELEMENTS // math.prod(self.shape[1:]))
        for begin in range(0, self.shape[0], step):
            yield begin, self.read_rows(begin, min(begin + step, self.shape[0]))

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Copy the values as fp32. Exact for BF16, F16 and F32."""
        is_mapped = self.file_range is not None and bool(self.shape)
        array = self.read_rows(0, self.shape[0]).array if is_mapped else self.array
        if self.dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=not is_mapped)

    def tobytes(self) -> bytes:
        return np.ascontiguousarray(self.array).tobytes()

    def iter_chunks(self) -> Iterator[bytes]:
        """Iterate over the tensor's bytes, in a single chunk."""
        yield self.tobytes()


@dataclass(frozen=True)
class SelectedRows(Tensor):
    """Some rows of a tensor, in a new order; `array` and `source` have all rows.

    Only reading the rows copies them, so the selection takes no memory.
    """

    source: Tensor = field(kw_only=True)
    rows: npt.NDArray[np.int64] = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.source.shape[1:])

    def read_rows(self, begin: int, end: int) -> Tensor:
        rows = self.rows[begin:end]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)  # of consecutive rows
        parts = [self.source.read_rows(int(run[0]), int(run[-1]) + 1).array for run in runs]
        return Tensor(self.dtype, np.concatenate(parts))


@dataclass(frozen=True)
class PartitionedTensor:
    """A tensor in the mapped files of several ranks: the concatenation of flat arrays."""

    dtype: str
    shape: tuple[int, ...]
    arrays: tuple[npt.NDArray[Any], ...]

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "PartitionedTensor":
        return cls(tensor.dtype, tensor.shape, (tensor.array.reshape(-1),))

    def to_tensor(self) -> Tensor:
        """Copy the whole tensor into memory."""
        joined = np.concatenate(self.arrays) if self.arrays else np.zeros(0, np.float32)
        for array in self.arrays:
            _drop_array_pages(array)
        return Tensor(self.dtype, joined.reshape(self.shape))

    def read(self, begin: int, end: int) -> npt.NDArray[np.float32]:
        """Copy elements [begin, end) of the flat tensor into memory, as fp32."""
        values = np.empty(end - begin, np.float32)
        offset = 0
        for array in self.arrays:
            part = array[max(0, begin - offset) : max(0, end - offset)]
            if len(part):
                start = max(0, offset - begin)
                values[start : start + len(part)] = Tensor(self.dtype, part).to_float32()
                _drop_array_pages(array)
            offset += len(array)
        return values

    def iter_chunks(self) -> Iterator[bytes]:
        """Iterate over the tensor's bytes in order, a few MiB at a time."""
        for array in self.arrays:
            for begin in range(0, len(array), CHUNK_ELEMENTS):
                yield np.ascontiguousarray(array[begin : begin + CHUNK_ELEMENTS]).tobytes()
                _drop_array_pages(array)


def _drop_array_pages(array: npt.NDArray[Any]) -> None:
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap):
        drop_pages(owner)


def drop_pages(mapped: mmap.mmap) -> None:
    """Drop the pages of a mapped file from this process's memory, where they would stay until the map is closed."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def count_tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * NUMPY_DTYPES[dtype].itemsize


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> Tensor:
    """Convert fp32 values to a floating-point dtype, rounding once, to nearest even.

    Values that are too large become infinite.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return Tensor(dtype, values.astype(NUMPY_DTYPES[dtype], copy=False))
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = bits >> 16
    nearest &= 1
    nearest += 0x7FFF
    nearest += bits
    # little-endian: the upper half of each 32-bit word comes second
    rounded = nearest.view(np.uint16).reshape(-1)[1::2].copy()
    if (is_nan := np.isnan(values).reshape(-1)).any():
        rounded[is_nan] = 0x7FC0  # adding to a NaN's bits could turn it into infinity
    return Tensor("BF16", rounded.reshape(values.shape))
