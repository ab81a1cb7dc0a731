"""A tensor that lies in pieces in mapped files, as the ranks of a training run left it."""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.tensors import Tensor
from t5tune.checkpoints.torch_format.zip import let_go

CHUNK = 4 << 20
"""Elements that are in memory at a time while a tensor is copied."""


@dataclass(frozen=True)
class Pieces:
    """A tensor's dtype and shape, and its values: flat arrays, end to end."""

    dtype: str
    shape: tuple[int, ...]
    arrays: tuple[npt.NDArray[Any], ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Pieces":
        return cls(tensor.dtype, tensor.shape, (tensor.array.reshape(-1),))

    def tensor(self) -> Tensor:
        """The whole tensor in memory of its own."""
        joined = np.concatenate(self.arrays) if self.arrays else np.zeros(0, np.float32)
        for array in self.arrays:
            _let_go(array)
        return Tensor(self.dtype, joined.reshape(self.shape))

    def chunks(self) -> Iterator[bytes]:
        """The bytes in order, a few MiB at a time."""
        for array in self.arrays:
            for begin in range(0, len(array), CHUNK):
                yield np.ascontiguousarray(array[begin : begin + CHUNK]).tobytes()
                _let_go(array)


def window(arrays: Sequence[npt.NDArray[Any]], begin: int, count: int) -> tuple[npt.NDArray[Any], ...] | None:
    """[begin, begin + count) of flat arrays that follow each other, as views of them; None where they end before."""
    parts = []
    for array in arrays:
        if count > 0 and begin < len(array):
            part = array[begin : begin + count]
            parts.append(part)
            count -= len(part)
        begin = max(0, begin - len(array))
    return tuple(parts) if count == 0 else None


def _let_go(array: npt.NDArray[Any]) -> None:
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if isinstance(owner, mmap.mmap):
        let_go(owner)
