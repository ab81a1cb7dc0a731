"""Read the objects that torch.save wrote, without torch and without running the pickle.

A file is a zip archive with uncompressed members: `data.pkl`, a pickle that refers to storages, and `data/0`, `data/1`,
… with the storages' bytes, which are memory-mapped. The pickle may only build tensors, plain containers and, as inert
placeholders, the objects in DeepSpeed's shards. Any other name in it is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.tensor_files.tensors import (
    DTYPES_BY_TORCH_NAME,
    MAX_DIMENSIONS,
    NUMPY_DTYPES,
    STORAGE_DTYPES,
    FileRange,
    Tensor,
)
from t5tune.checkpoints.tensor_files.torch_pickle import Function, InertClass, unpickle
from t5tune.checkpoints.tensor_files.torch_zip import StoredZip
from t5tune.errors import CheckpointError
from t5tune.formatting import shorten

# names in checkpoints of DeepSpeed and bitsandbytes whose objects aren't needed
INERT_CLASSES = {
    ("_codecs", "encode"),
    ("bitsandbytes.functional", "QuantState"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("torch", "Tensor"),
    ("torch", "device"),
    ("torch.nn.parameter", "Parameter"),
}
MAX_EXPANDED_ELEMENTS = 1 << 20
"""A tensor with at most this many elements may repeat the elements of a smaller storage (torch's `expand`)."""


@dataclass(frozen=True)
class _StorageType:
    """Placeholder for torch.FloatStorage and similar classes, which a persistent id refers to."""

    dtype: str


@dataclass(frozen=True)
class StoredTensor(Tensor):
    """A tensor of a torch file. `check` raises CheckpointError if its bytes have changed since they were written."""

    check: Callable[[], None] = field(kw_only=True)


class _Storage(StoredTensor):
    """The elements that tensors are views of."""


def read_torch_file(path: Path) -> Any:
    """Read the object in a torch file, with each tensor as a StoredTensor that is a view of the mapped file."""
    archive = StoredZip(path)
    if "byteorder" in archive.members and bytes(archive.view("byteorder")[:16]) != b"little":
        raise CheckpointError(f"{path}: was written on a big-endian machine, which isn't supported")
    archive.check("data.pkl")
    try:
        return unpickle(bytes(archive.view("data.pkl")), partial(_find_global, path), partial(_load_storage, archive))
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: its pickle can't be read: {shorten(str(error), 200)}") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors in a torch file, by name; refuse other contents."""
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict with tensors only")
    return {str(name): value for name, value in state.items()}


def _find_global(path: Path, module: str, name: str) -> Any:
    if (module, name) in _FUNCTIONS:
        return _FUNCTIONS[module, name]
    if module in {"torch", "torch.storage"} and name in STORAGE_DTYPES:
        return _StorageType(STORAGE_DTYPES[name])
    if module == "torch" and name in DTYPES_BY_TORCH_NAME:
        return DTYPES_BY_TORCH_NAME[name]
    if (module, name) in INERT_CLASSES:
        return InertClass(name)
    raise CheckpointError(
        f"{path}: its pickle refers to {shorten(f'{module}.{name}')}, which no checkpoint needs",
        hint="don't load this file with torch.load either, unless you trust its author",
    )


def _load_storage(archive: StoredZip, reference: Any) -> _Storage:
    match reference:
        case ("storage", _StorageType() as kind, str() as key, _, int() as count) if type(count) is int:
            dtype = NUMPY_DTYPES[kind.dtype]
        case _:
            raise ValueError("it has a persistent id that isn't a storage")
    name = f"data/{key}"
    member = archive.get_member(name)
    if count * dtype.itemsize != member.size:
        raise ValueError(f"{shorten(name)}: {member.size} bytes, expected {count * dtype.itemsize}")
    values = np.frombuffer(archive.view(name), dtype)
    return _Storage(kind.dtype, values, FileRange(archive.path, member.begin), check=partial(archive.check, name))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Replacement for torch._utils._rebuild_tensor_v2: a view of a storage. Offset and strides are in elements."""
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("it has a tensor without a storage, a shape or strides")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"it has a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (offset, *shape, *strides)):
        raise ValueError("it has a tensor with an invalid shape")
    count, values = math.prod(shape), storage.array
    if count == 0:
        return StoredTensor(storage.dtype, np.zeros(shape, values.dtype), check=storage.check)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if last >= len(values):
        raise ValueError(f"a tensor of shape {list(shape)} exceeds its storage")
    if count > max(len(values), MAX_EXPANDED_ELEMENTS):
        raise ValueError(f"a tensor of shape {list(shape)} repeats a storage of {len(values)} elements")
    itemsize = values.dtype.itemsize
    byte_strides = [stride * itemsize for stride in strides]
    view: npt.NDArray[Any] = np.ndarray(shape, values.dtype, values.data, offset * itemsize, byte_strides)
    assert storage.file_range is not None
    file_range = FileRange(storage.file_range.path, storage.file_range.begin + offset * itemsize)
    return StoredTensor(storage.dtype, view, file_range if view.flags.c_contiguous else None, check=storage.check)


def _rebuild_from_type(rebuild: Any, _type: Any, arguments: Any, _state: Any) -> Tensor:
    """Replacement for torch._tensor._rebuild_from_type_v2: a tensor with attributes, which are ignored."""
    functions = [_FUNCTIONS["torch._utils", name] for name in ("_rebuild_tensor_v2", "_rebuild_parameter")]
    if rebuild not in functions or type(arguments) is not tuple:
        raise ValueError("it has an object that isn't a tensor")
    return rebuild.call(*arguments)  # type: ignore[no-any-return]


def _take_first(kind: type[Any], problem: str) -> Function:
    """Make the replacement for a function that may return its first argument, which must have this type."""

    def take(value: Any = None, *_: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"it has {problem}")
        return value

    return Function(take)


_PARAMETER = _take_first(Tensor, "a parameter that isn't a tensor")
_FUNCTIONS = {
    ("collections", "OrderedDict"): Function(lambda: {}),
    ("__builtin__", "set"): _take_first(list, "an invalid set"),
    ("torch", "Size"): _take_first(tuple, "an invalid torch.Size"),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    ("torch._utils", "_rebuild_parameter_with_state"): _PARAMETER,
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_rebuild_from_type),
}
