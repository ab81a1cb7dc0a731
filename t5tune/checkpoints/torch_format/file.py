"""Read what torch.save wrote, without torch and without running its pickle.

A file is a zip whose members are stored uncompressed: `data.pkl`, a pickle that names storages, and `data/0`,
`data/1`, … with their bytes, which are mapped. The pickle may only build tensors, plain containers and, as
inert stand-ins, the objects that DeepSpeed's shards hold; any other name in it is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.tensors import STORAGE, Place, Tensor
from t5tune.checkpoints.torch_format.pickle import Function, InertClass, unpickle
from t5tune.checkpoints.torch_format.zip import StoredZip
from t5tune.errors import CheckpointError

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
INERT = {
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
MAX_DIMENSIONS = 16
MAX_REPEATED = 1 << 20
"""Elements that a tensor may have beyond those of its storage, which it then repeats (torch's `expand`)."""


class _StorageType:
    """Stands for torch.FloatStorage and the like, which a persistent id names."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


@dataclass(frozen=True)
class StoredTensor(Tensor):
    """A tensor of a torch file. `check` raises CheckpointError where its bytes aren't those that were written."""

    check: Callable[[], None] = field(kw_only=True)


@dataclass(frozen=True)
class _Storage:
    dtype: str
    array: npt.NDArray[Any]
    place: Place
    check: Callable[[], None]


def read_torch_file(path: Path) -> Any:
    """The object that a torch file holds, with each tensor as a Tensor that views the mapped file.

    Raises:
        CheckpointError: not torch's zip format (torch < 1.6 wrote another), broken, or a name that isn't allowed.
    """
    archive = StoredZip(path)
    if "byteorder" in archive.members and bytes(archive.view("byteorder")[:16]) != b"little":
        raise CheckpointError(f"{path}: written on a big-endian machine")
    archive.check("data.pkl")
    reader = _Reader(archive)
    try:
        return unpickle(bytes(archive.view("data.pkl")), reader.find, reader.load_storage)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {str(error)[:200]}") from error


class _Reader:
    """What the pickle of one file may name."""

    def __init__(self, archive: StoredZip) -> None:
        self.archive = archive

    def find(self, module: str, name: str) -> Any:
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in {"torch", "torch.storage"} and name in STORAGES:
            return _StorageType(STORAGES[name])
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) in INERT:
            return InertClass(name)
        raise CheckpointError(
            f"{self.archive.path}: its pickle asks for {module}.{name}, which no checkpoint needs",
            hint="don't load this file with torch.load either, unless you trust whoever made it",
        )

    def load_storage(self, reference: Any) -> _Storage:
        if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
            raise ValueError("a reference in its pickle that is no storage")
        _, storage_type, key, _, count = reference
        if not isinstance(storage_type, _StorageType) or type(key) is not str or type(count) is not int:
            raise ValueError("a reference in its pickle that is no storage")
        dtype = STORAGE[storage_type.dtype]
        member = self.archive.member(f"data/{key}")
        if count < 0 or count * dtype.itemsize != member.size:
            raise ValueError(f"data/{key[:100]}: {member.size} bytes, expected {count * dtype.itemsize}")
        values = np.frombuffer(self.archive.view(f"data/{key}"), dtype)
        place = Place(self.archive.path, member.begin)
        return _Storage(storage_type.dtype, values, place, partial(self.archive.check, f"data/{key}"))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2: a view of a storage, its strides in elements."""
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor in its pickle without a storage, a shape or strides")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise ValueError("a tensor in its pickle whose shape is none")
    count, values = math.prod(shape), storage.array
    if count == 0:
        return StoredTensor(storage.dtype, np.zeros(shape, values.dtype), check=storage.check)
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if last >= len(values):
        raise ValueError(f"a tensor of {list(shape)} passes the end of its storage")
    if count > max(len(values), MAX_REPEATED):
        raise ValueError(f"a tensor of {list(shape)} repeats a storage of {len(values)} elements")
    itemsize = values.dtype.itemsize
    steps = [stride * itemsize for stride in strides]
    view: npt.NDArray[Any] = np.ndarray(shape, values.dtype, values.data, offset * itemsize, steps)
    place = Place(storage.place.path, storage.place.begin + offset * itemsize)
    return StoredTensor(storage.dtype, view, place if view.flags.c_contiguous else None, check=storage.check)


def _rebuild_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter in its pickle that is no tensor")
    return data


def _rebuild_from_type(rebuild: Any, _type: Any, arguments: Any, _state: Any) -> Tensor:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes of its own, which aren't needed here."""
    functions = [_FUNCTIONS["torch._utils", name] for name in ("_rebuild_tensor_v2", "_rebuild_parameter")]
    if rebuild not in functions or type(arguments) is not tuple:
        raise ValueError("an object in its pickle that is no tensor")
    return rebuild.call(*arguments)  # type: ignore[no-any-return]


def _set(values: Any = ()) -> list[Any]:
    if type(values) is not list:
        raise ValueError("a set in its pickle that is none")
    return values


def _size(values: Any) -> tuple[Any, ...]:
    if type(values) is not tuple:
        raise ValueError("a shape in its pickle that is none")
    return values


def _ordered_dict() -> dict[Any, Any]:
    return {}


_FUNCTIONS = {
    ("collections", "OrderedDict"): Function(_ordered_dict),
    ("__builtin__", "set"): Function(_set),
    ("torch", "Size"): Function(_size),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_rebuild_from_type),
}
