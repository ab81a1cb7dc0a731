"""A tensor partitioned across the memory-mapped files of a training run's ranks."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.tensors import Tensor
from t5tune.checkpoints.torch_format.zip import drop_pages

CHUNK_ELEMENTS = 4 << 20
"""Number of elements in memory at a time while a tensor is copied."""


@dataclass(frozen=True)
class PartitionedTensor:
    """A tensor's dtype, shape and partitions: flat arrays whose concatenation is the tensor."""

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

    def iter_chunks(self) -> Iterator[bytes]:
        """Iterate over the tensor's bytes in order, a few MiB at a time."""
        for array in self.arrays:
            for begin in range(0, len(array), CHUNK_ELEMENTS):
                yield np.ascontiguousarray(array[begin : begin + CHUNK_ELEMENTS]).tobytes()
                _drop_array_pages(array)


def _drop_array_pages(array: npt.NDArray[Any]) -> None:
    """Drop the pages of the mapped file that this array is a view of, if any."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap):
        drop_pages(owner)
