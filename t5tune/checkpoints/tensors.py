"""Tensors as they lie on disk: a dtype's name, a shape, and bytes.

numpy has no bfloat16, so a BF16 tensor's array holds its bits as uint16; `to_float32` and `from_float32`
are the only places that know.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.errors import CheckpointError

STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""safetensors' dtype names -> the numpy dtype that holds such a tensor's elements."""

FLOATS = {"F64", "F32", "F16", "BF16"}
BLOCK = 1 << 18
"""Elements that are read and computed at a time: a few arrays of them fit a processor's cache."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes begin in a file, in which they lie end to end."""

    path: Path
    begin: int


@dataclass(frozen=True)
class Tensor:
    """One tensor: `array` has the tensor's shape and the dtype STORAGE[dtype]; often a view of a mapped file."""

    dtype: str
    array: npt.NDArray[Any]
    place: Place | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize

    def rows(self, begin: int, end: int) -> "Tensor":
        """Some of its rows, in memory of their own, read from the file where its place is known.

        The pages of a map count as memory until it is closed; what is read here is gone with its array.

        Raises:
            CheckpointError: the file has become shorter.
        """
        if self.place is None:
            return Tensor(self.dtype, self.array[begin:end].copy())
        storage = STORAGE[self.dtype]
        shape = (end - begin, *self.shape[1:])
        stride = math.prod(self.shape[1:]) * storage.itemsize
        rows = np.empty(shape, storage)
        with open(self.place.path, "rb", buffering=0) as file:
            file.seek(self.place.begin + begin * stride)
            if file.readinto(rows.reshape(-1).view(np.uint8).data) != rows.nbytes:
                raise CheckpointError(f"{self.place.path}: ended before byte {self.place.begin + end * stride}")
        return Tensor(self.dtype, rows)

    def blocks(self) -> Iterator[tuple[int, "Tensor"]]:
        """(first row, rows), about BLOCK elements at a time."""
        if not self.shape or 0 in self.shape:
            yield 0, Tensor(self.dtype, self.array.copy())
            return
        step = max(1, BLOCK // math.prod(self.shape[1:]))
        for begin in range(0, self.shape[0], step):
            yield begin, self.rows(begin, min(begin + step, self.shape[0]))

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The values as fp32, in memory of their own: exact for BF16, F16 and F32."""
        is_mapped = self.place is not None and bool(self.shape)
        array = self.rows(0, self.shape[0]).array if is_mapped else self.array
        if self.dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=not is_mapped)

    def tobytes(self) -> bytes:
        return np.ascontiguousarray(self.array).tobytes()


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> Tensor:
    """fp32 values in another floating dtype, rounded once, to the nearest even; too large ones become infinite."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return Tensor(dtype, values.astype(STORAGE[dtype], copy=False))
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = bits >> 16
    nearest &= 1
    nearest += 0x7FFF
    nearest += bits
    # little-endian: the upper half of each word is its second
    rounded = nearest.view(np.uint16).reshape(-1)[1::2].copy()
    if (is_nan := np.isnan(values).reshape(-1)).any():
        rounded[is_nan] = 0x7FC0  # adding to a NaN's bits could make it an infinity
    return Tensor("BF16", rounded.reshape(values.shape))
