"""Gather the fp32 weights of a DeepSpeed checkpoint from its ranks' shards, without DeepSpeed and without unpickling.

ZeRO stage 3 divides each parameter into equal partitions, one per rank, the last one padded. Stages 1 and 2 (and
BF16_Optimizer, whose files begin with bf16_) concatenate all parameters of a group and divide the result. The
model-states file of rank 0 lists the parameters in this order. See deepspeed/utils/zero_to_fp32.py for the same.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from t5tune.checkpoints.tensors import FLOAT_DTYPES, PartitionedTensor, Tensor
from t5tune.checkpoints.torch_format.file import StoredTensor, read_torch_file
from t5tune.checkpoints.torch_format.pickle import Inert
from t5tune.errors import CheckpointError
from t5tune.formatting import format_count
from t5tune.io.reasons import shorten
from t5tune.io.untrusted import check_all_inside, check_inside, is_file_name

UNIVERSAL_FOLDER = "zero"
_MODEL_STATES_PATTERN = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_STATES_PATTERN = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MAX_COUNT = 1 << 40

Shapes = list[dict[str, tuple[int, ...]]]
"""One dict per parameter group: name -> shape, in the order of the flat vectors."""


@dataclass(frozen=True)
class ZeroState:
    """The weights in a DeepSpeed checkpoint, under their names in the training model.

    Args:
        trained: the fp32 weights that the optimizer updated. Stage 0 doesn't separate trained from frozen weights:
            all of them are here, in the dtype that the model computes in.
        frozen: the weights that weren't trained, if the checkpoint contains them.
    """

    stage: int
    world_size: int
    step: int
    trained: dict[str, PartitionedTensor]
    frozen: dict[str, PartitionedTensor]


def find_deepspeed_folder(folder: Path) -> Path | None:
    """Find the folder with the shards: the folder itself, or the one that its `latest` (or `latest_universal`) names.

    Raises:
        CheckpointError: `latest` names something outside the folder, or a folder without shards.
    """
    if any(folder.glob("*_model_states.pt")):
        return folder
    latest = next((path for name in ("latest", "latest_universal") if (path := folder / name).is_file()), None)
    if latest is None:
        return None
    check_inside(folder, latest)
    with open(latest, "rb") as file:
        tag = file.read(256).decode("utf-8", "replace").strip()
    if not is_file_name(tag):
        raise CheckpointError(f"{latest}: {tag[:100]!r}: not the name of a folder in this folder")
    check_inside(folder, folder / tag)
    if not any((folder / tag).glob("*_model_states.pt")):
        raise CheckpointError(f"{folder / tag}: contains no shards, but {latest.name} names it")
    return folder / tag


def read_zero(folder: Path, with_frozen: bool = True) -> ZeroState:
    """Gather a checkpoint's weights, as views of the memory-mapped files.

    Args:
        with_frozen: whether to look for the weights that weren't trained, in the files of all ranks.

    Raises:
        CheckpointError: a shard is missing, unexpected, broken, or doesn't match the others.
    """
    check_all_inside(folder)
    model_files = _find_files_by_rank(folder, "*_model_states.pt", _MODEL_STATES_PATTERN)
    shards = _find_files_by_rank(folder, "*_optim_states.pt", _OPTIMIZER_STATES_PATTERN)
    if not model_files:
        raise CheckpointError(f"{folder}: not a DeepSpeed checkpoint (it contains no *_model_states.pt)")
    first_path = model_files[min(model_files)]
    first = _expect_dict(read_torch_file(first_path), first_path)
    if first.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{first_path}: was trained with model parallelism, which export doesn't support")
    step = _expect_count(first.get("global_steps", 0), first_path, "global_steps")
    world_size = _expect_count(first.get("dp_world_size"), first_path, "dp_world_size")
    shapes = _read_shapes(first.get("param_shapes"), first_path)
    is_universal = (folder / UNIVERSAL_FOLDER).is_dir()
    if (is_universal or shards) and not any(shapes):
        raise CheckpointError(f"{first_path}: lists no trained parameter")
    if is_universal:
        trained = _read_universal(folder, shapes)
        stage = 3 if first_path.name.startswith("zero_pp") else _read_configured_stage(first)
    elif shapes:
        stage, trained = _read_shards(folder, shards, world_size, shapes)
    else:
        stage, trained = 0, {}
    _check_ranks(folder, model_files, world_size if stage == 3 else 1, "model states")
    tensors = _select_tensors(first.get("module"))
    module = {name: PartitionedTensor.from_tensor(value) for name, value in tensors.items() if value.array.size}
    if stage == 0:
        return ZeroState(stage, world_size, step, module, {})
    frozen: dict[str, PartitionedTensor] = {}
    if with_frozen:
        frozen = _gather_frozen(model_files, first, stage == 3)
        if not frozen and stage < 3:
            known = trained.keys() | _expect_dict(first.get("shared_params") or {}, first_path).keys()
            frozen = {name: value for name, value in module.items() if name not in known}
    return ZeroState(stage, world_size, step, trained, frozen)


def _find_files_by_rank(folder: Path, pattern: str, form: re.Pattern[str]) -> dict[int, Path]:
    """Map ranks to their files. A file without a rank, which all ranks share, counts as rank 0's."""
    files: dict[int, Path] = {}
    for path in sorted(folder.glob(pattern)):
        match = form.fullmatch(path.name)
        if match is None or int(match[2]) != 0:
            raise CheckpointError(
                f"{path}: is from a run with experts, pipeline or model parallelism, which export doesn't support"
            )
        rank = int(match[1] or 0)
        if rank in files:
            raise CheckpointError(f"{folder}: {files[rank].name} and {path.name}: two files for rank {rank}")
        files[rank] = path
    return files


def _check_ranks(folder: Path, files: Mapping[int, Path], world_size: int, what: str) -> None:
    missing = next((rank for rank in range(world_size) if rank not in files), None)
    if missing is not None or len(files) != world_size:
        raise CheckpointError(
            f"{folder}: found {what} of ranks {shorten(str(sorted(files)))}, but training used "
            + format_count(world_size, "rank")
            + (f"; rank {missing} is missing" if missing is not None else "")
        )


def _read_shards(
    folder: Path, shards: Mapping[int, Path], world_size: int, shapes: Shapes
) -> tuple[int, dict[str, PartitionedTensor]]:
    """Gather (stage, tensors by name) from the optimizer shards."""
    if not shards:
        raise CheckpointError(f"{folder}: no optimizer shards (*_optim_states.pt), which contain the fp32 weights")
    _check_ranks(folder, shards, world_size, "shards")
    stages, dtypes = set(), set()
    ranks: list[list[npt.NDArray[Any]]] = []
    for rank in range(world_size):
        path = shards[rank]
        optimizer = _expect_dict(_expect_dict(read_torch_file(path), path).get("optimizer_state_dict"), path)
        stage = _read_stage(optimizer, path)
        stages.add(stage)
        _check_partitions(optimizer, world_size, path)
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        groups = _read_fp32_groups(optimizer, key, path)
        dtypes |= {group.dtype for group in groups}
        ranks.append([group.array.reshape(-1) for group in groups])
        if rank == 0:
            paddings = _read_paddings(optimizer.get("param_alignment_paddings"), shapes, path)
    if len(stages) != 1 or len(dtypes) != 1 or len({len(groups) for groups in ranks}) != 1:
        raise CheckpointError(f"{folder}: the shards are from different runs: their stages, dtypes or groups differ")
    (dtype,) = dtypes
    if stage == 3:
        return 3, _gather_stage3(folder, ranks, shapes, dtype)
    return stage, _gather_stage1_and_2(folder, ranks, shapes, paddings, dtype)


def _read_stage(optimizer: Mapping[Any, Any], path: Path) -> int:
    """Read the ZeRO stage: a ZeroStageEnum, kept as an inert placeholder, or an integer; BF16_Optimizer is stage 1."""
    value = optimizer.get("zero_stage", 1)  # BF16_Optimizer doesn't save a stage
    if isinstance(value, Inert) and len(value.arguments) == 1:
        value = value.arguments[0]
    if type(value) is not int or value not in {1, 2, 3}:
        raise CheckpointError(f"{path}: zero_stage must be 1, 2 or 3")
    return value


def _check_partitions(optimizer: Mapping[Any, Any], world_size: int, path: Path) -> None:
    counts = optimizer.get("partition_count")
    groups = optimizer.get("ds_zero_partition_groups") or []
    if type(groups) is not list or not all(type(group) is dict for group in groups):
        raise CheckpointError(f"{path}: ds_zero_partition_groups: expected a list of dicts")
    counts = counts if type(counts) is list else [counts]
    for count in counts + [group.get("partition_count", world_size) for group in groups]:
        if _expect_count(count, path, "partition_count") != world_size:
            ranks = format_count(world_size, "rank")
            raise CheckpointError(
                f"{path}: written in a run of {format_count(count, 'rank')}, but training used {ranks}"
            )


def _read_fp32_groups(optimizer: Mapping[Any, Any], key: str, path: Path) -> list[Tensor]:
    groups = optimizer.get(key)
    if type(groups) is not list or not groups or not all(isinstance(group, Tensor) for group in groups):
        raise CheckpointError(f"{path}: contains no {key}, the fp32 weights")
    for group in groups:
        if group.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{path}: {key}: dtype {group.dtype}, expected F32")
        if isinstance(group, StoredTensor):
            group.check()
    return groups


def _gather_stage3(
    folder: Path, ranks: list[list[npt.NDArray[Any]]], shapes: Shapes, dtype: str
) -> dict[str, PartitionedTensor]:
    """Gather stage 3: each rank's fp32_flat_groups are one vector, of which each parameter takes ceil(n / ranks)."""
    trained = {}
    offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        partition = math.ceil(math.prod(shape) / len(ranks))
        whole = [array for groups in ranks for array in _slice(folder, name, groups, offset, partition)]
        trained[name] = PartitionedTensor(dtype, shape, _slice(folder, name, whole, 0, math.prod(shape)))
        offset += partition
    for rank, groups in enumerate(ranks):
        if (length := sum(map(len, groups))) != offset:
            raise CheckpointError(f"{folder}: rank {rank} has {length} values, but its parameters need {offset}")
    return trained


def _gather_stage1_and_2(
    folder: Path, ranks: list[list[npt.NDArray[Any]]], shapes: Shapes, paddings: list[list[int]], dtype: str
) -> dict[str, PartitionedTensor]:
    """Gather stages 1 and 2: each group is a vector in equal partitions, padded after each parameter and at its end."""
    if len(ranks[0]) != len(shapes):
        found = format_count(len(ranks[0]), "group")
        raise CheckpointError(f"{folder}: {found} in the shards, but {len(shapes)} in the model states")
    trained = {}
    for index, group in enumerate(shapes):
        flat = [groups[index] for groups in ranks]
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            count = math.prod(shape)
            trained[name] = PartitionedTensor(dtype, shape, _slice(folder, name, flat, offset, count))
            offset += count + padding
        # a group is padded to a multiple of 2 × ranks; some versions of DeepSpeed save that padding
        if not 0 <= (left := sum(map(len, flat)) - offset) < 2 * len(ranks):
            raise CheckpointError(f"{folder}: {left} values of group {index} don't belong to any parameter")
    return trained


def _slice(
    folder: Path, name: str, arrays: Sequence[npt.NDArray[Any]], begin: int, count: int
) -> tuple[npt.NDArray[Any], ...]:
    """Slice [begin, begin + count) out of the concatenation of flat arrays, as views."""
    parts = []
    for array in arrays:
        if count > 0 and begin < len(array):
            part = array[begin : begin + count]
            parts.append(part)
            count -= len(part)
        begin = max(0, begin - len(array))
    if count:
        raise CheckpointError(f"{folder}: {name}: the shards are too short for this parameter")
    return tuple(parts)


def _gather_frozen(
    model_files: Mapping[int, Path], first: Mapping[Any, Any], is_sharded: bool
) -> dict[str, PartitionedTensor]:
    """Gather the weights that weren't trained: whole in stages 1 and 2, one fragment per rank in stage 3."""
    path = model_files[0]
    shapes = _read_shapes([first.get("frozen_param_shapes") or {}], path)[0]
    if not shapes:
        return {}
    states = [first]
    if is_sharded:
        states += [_expect_dict(read_torch_file(file), file) for _, file in sorted(model_files.items())[1:]]
    fragments = [_select_tensors(state.get("frozen_param_fragments")) for state in states]
    frozen = {}
    for name, shape in shapes.items():
        if not all(name in ranks for ranks in fragments) or len({ranks[name].dtype for ranks in fragments}) != 1:
            raise CheckpointError(f"{path.parent}: {name}: a rank's fragment is missing or has another dtype")
        arrays = [ranks[name].array.reshape(-1) for ranks in fragments]
        parts = _slice(path.parent, name, arrays, 0, math.prod(shape))
        frozen[name] = PartitionedTensor(fragments[0][name].dtype, shape, parts)
    return frozen


def _read_universal(folder: Path, shapes: Shapes) -> dict[str, PartitionedTensor]:
    """Read DeepSpeed's universal format (ds_to_universal): zero/NAME/fp32.pt contains one whole parameter."""
    trained = {}
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        if not is_file_name(name):
            raise CheckpointError(f"{folder}: {name[:100]!r}: not a valid parameter name")
        path = folder / UNIVERSAL_FOLDER / name / "fp32.pt"
        check_inside(folder, path)
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but the model states list this parameter")
        value = read_torch_file(path)
        value = value.get("param") if type(value) is dict else value
        fits = isinstance(value, Tensor) and value.dtype in FLOAT_DTYPES and value.array.size == math.prod(shape)
        if not isinstance(value, StoredTensor) or not fits:
            raise CheckpointError(f"{path}: expected a tensor of shape {list(shape)}")
        value.check()
        trained[name] = PartitionedTensor(value.dtype, shape, (value.array.reshape(-1),))
    return trained


def _read_configured_stage(state: Mapping[Any, Any]) -> int:
    config = state.get("ds_config")
    zero = config.get("zero_optimization") if type(config) is dict else None
    stage = zero.get("stage") if type(zero) is dict else None
    return stage if type(stage) is int and stage in {1, 2} else 1


def _expect_dict(value: Any, path: Path) -> dict[Any, Any]:
    if type(value) is not dict:
        raise CheckpointError(f"{path}: expected a dict, found {type(value).__name__}")
    return value


def _expect_count(value: Any, path: Path, key: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise CheckpointError(f"{path}: {key}: expected a non-negative integer")
    return value


def _select_tensors(value: Any) -> dict[str, Tensor]:
    """Select the tensors of a state dict, and leave out other values."""
    found = value if type(value) is dict else {}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor) and isinstance(name, str)}


def _read_shapes(value: Any, path: Path) -> Shapes:
    """Check and return param_shapes: a list with one dict per group, or None if ZeRO didn't shard."""
    groups: list[Any] = value if type(value) is list else [] if value is None else [None]
    names: set[str] = set()
    for group in groups:
        for name, shape in _expect_dict(group, path).items():
            is_shape = type(shape) is tuple and len(shape) < 16 and all(type(size) is int for size in shape)
            if not isinstance(name, str) or not is_shape or not all(0 <= size < MAX_COUNT for size in shape):
                raise CheckpointError(f"{path}: param_shapes: expected names with shapes")
            if name in names or math.prod(shape) >= MAX_COUNT:
                raise CheckpointError(f"{path}: param_shapes: {name[:100]!r}: duplicate or too large")
            names.add(name)
    return groups


def _read_paddings(value: Any, shapes: Shapes, path: Path) -> list[list[int]]:
    """Read the number of padding elements after each parameter, by group (zero_optimization.parameter_alignment)."""
    if value is None:
        return [[0] * len(group) for group in shapes]
    fits = type(value) is list and len(value) == len(shapes) and all(type(group) is list for group in value)
    if not fits or [len(group) for group in value] != [len(group) for group in shapes]:
        raise CheckpointError(f"{path}: param_alignment_paddings: expected one integer per parameter")
    return [[_expect_count(padding, path, "param_alignment_paddings") for padding in group] for group in value]
