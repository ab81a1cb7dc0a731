"""Read what torch.save wrote, without torch and without running its pickle.

A file is a zip whose members are stored uncompressed: `data.pkl`, a pickle that names storages, and `data/0`,
`data/1`, … with their bytes, which are mapped. The pickle may only build tensors, plain containers and, as
inert stand-ins, the objects that DeepSpeed's shards hold; any other name in it is refused.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.errors import CheckpointError
from t5tune.weights.tensors import STORAGE, Tensor

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
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("torch", "Tensor"),
    ("torch", "device"),
    ("torch.nn.parameter", "Parameter"),
}


class Inert:
    """Stands for an object whose class isn't loaded: keeps what the pickle says of it, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Storage:
    def __init__(self, dtype: str, array: Any) -> None:
        self.dtype = dtype
        self.array = array


class _StorageType:
    """Stands for torch.FloatStorage and the like, which a persistent id names."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


def read_torch_file(path: Path) -> Any:
    """The object that a torch file holds, with each tensor as a Tensor that views the mapped file.

    Raises:
        CheckpointError: not torch's zip format (torch < 1.6 wrote another), broken, or a name that isn't allowed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.split("/", 1)[-1]: member for member in archive.infolist()}
            if "data.pkl" not in members:
                raise CheckpointError(f"{path}: no data.pkl in it: not a file of torch.save")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: written on a big-endian machine")
            pickled = archive.read(members["data.pkl"])
            return _Unpickler(path, pickled, members).load()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: not torch's zip format: {error}",
            hint="load and save it once with a current torch, or convert it to safetensors",
        ) from error
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise CheckpointError(f"{path}: broken: {error!r}") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, pickled: bytes, members: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._path = path
        self._members = members

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in {"_rebuild_tensor_v2", "_rebuild_parameter"}:
            return _rebuild_tensor if name == "_rebuild_tensor_v2" else _rebuild_parameter
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild_from_type
        if module in {"torch", "torch.storage"} and name in STORAGES:
            return _StorageType(STORAGES[name])
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) in INERT:
            return Inert
        raise CheckpointError(
            f"{self._path}: its pickle asks for {module}.{name}, which no checkpoint needs",
            hint="don't load this file with torch.load either, unless you trust whoever made it",
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, count = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise CheckpointError(f"{self._path}: unknown reference {kind!r} in its pickle")
        member = self._members[f"data/{key}"]
        dtype = STORAGE[storage_type.dtype]
        size = int(count) * dtype.itemsize
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < size:
            raise CheckpointError(f"{self._path}: data/{key}: {member.file_size} bytes, expected {size}")
        if size == 0:
            return _Storage(storage_type.dtype, np.zeros(0, dtype))
        with open(self._path, "rb") as file:
            file.seek(member.header_offset)
            header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self._path}: data/{key}: no member where the zip's table says")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        offset = member.header_offset + 30 + name_length + extra_length
        mapped = np.memmap(self._path, np.uint8, "r", offset, (size,))
        return _Storage(storage_type.dtype, np.frombuffer(mapped, dtype))


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Tensor:
    """torch._utils._rebuild_tensor_v2: a view of a storage, its strides in elements."""
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if math.prod(shape) == 0:
        return Tensor(storage.dtype, np.zeros(shape, storage.array.dtype))
    if min((offset, *shape, *strides)) < 0 or last >= len(storage.array):
        raise ValueError(f"a tensor of {list(shape)} passes the end of its storage")
    itemsize = storage.array.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage.array[offset:], shape, [stride * itemsize for stride in strides], writeable=False
    )
    return Tensor(storage.dtype, view)


def _rebuild_from_type(rebuild: Any, _type: Any, arguments: tuple[Any, ...], _state: Any) -> Tensor:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes of its own, which aren't needed here."""
    if rebuild not in (_rebuild_tensor, _rebuild_parameter):
        raise ValueError(f"{rebuild!r} rebuilds no tensor")
    return rebuild(*arguments)  # type: ignore[no-any-return]


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data
