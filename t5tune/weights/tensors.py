"""Tensors as they lie on disk: a dtype's name, a shape, and bytes.

numpy has no bfloat16, so a BF16 tensor's array holds its bits as uint16; `to_float32` and `from_float32`
are the only places that know.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class Tensor:
    """One tensor: `array` has the tensor's shape and the dtype STORAGE[dtype]; often a view of a mapped file."""

    dtype: str
    array: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The values as fp32: exact for BF16, F16 and F32."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)

    def tobytes(self) -> bytes:
        return np.ascontiguousarray(self.array).tobytes()


def from_float32(values: npt.NDArray[np.float32], dtype: str) -> Tensor:
    """fp32 values in another floating dtype, rounded once, to the nearest even."""
    if dtype != "BF16":
        return Tensor(dtype, values.astype(STORAGE[dtype]))
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    # adding to a NaN's bits could make it an infinity: keep it a NaN
    rounded = np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return Tensor("BF16", rounded.reshape(values.shape))
