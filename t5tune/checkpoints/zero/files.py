"""Read the files of a DeepSpeed checkpoint, whose optimizer is divided among ranks, without DeepSpeed and unpickling.

    files = find_zero_files(folder)
    shards = read_optimizer_shards(files)
    shards.gather(shards.masters)        # {"…lora_A.default.weight": PartitionedTensor, …}

ZeRO stage 3 divides each parameter into equal partitions, one per rank, the last padded. Stages 1 and 2 (and
BF16_Optimizer, whose files begin with bf16_) concatenate all parameters of a group and divide the result. The
model-states file of rank 0 lists the parameters in this order, as in deepspeed/utils/zero_to_fp32.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from t5tune.checkpoints.tensor_files.tensors import FLOAT_DTYPES, PartitionedTensor, Tensor
from t5tune.checkpoints.tensor_files.torch_file import read_torch_file
from t5tune.checkpoints.tensor_files.torch_pickle import Inert
from t5tune.errors import CheckpointError
from t5tune.formatting import format_count, shorten
from t5tune.io.untrusted import check_all_inside

_MODEL_STATES_PATTERN = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_STATES_PATTERN = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MAX_COUNT = 1 << 40

Shapes = list[dict[str, tuple[int, ...]]]
"""One dict per parameter group: name -> shape, in the order of the flat vectors."""


@dataclass(frozen=True)
class ZeroFiles:
    """A checkpoint's files by rank, and the run's description in `first`, the model states of the first rank."""

    folder: Path
    model_files: dict[int, Path]
    shard_files: dict[int, Path]
    first: dict[Any, Any]
    step: int
    world_size: int
    shapes: Shapes

    @property
    def first_path(self) -> Path:
        return self.model_files[min(self.model_files)]


@dataclass(frozen=True)
class OptimizerShards:
    """The optimizer's state of all ranks, as DeepSpeed stores it: views of the mapped files.

    Args:
        paddings: number of padding elements after each parameter in stages 1 and 2, by group.
        states: each rank's state dict of the optimizer.
        masters: each rank's fp32 weights: one flat tensor per group.
    """

    folder: Path
    stage: int
    shapes: Shapes
    paddings: list[list[int]]
    states: list[dict[Any, Any]]
    masters: list[list[Tensor]]

    def gather(self, ranks: list[list[Tensor]]) -> dict[str, PartitionedTensor]:
        """Gather values by parameter, from one flat tensor per group of each rank."""
        dtypes = {tensor.dtype for groups in ranks for tensor in groups}
        if len(dtypes) != 1 or len(set(map(len, ranks))) != 1:
            raise CheckpointError(f"{self.folder}: the shards are from different runs: their dtypes or groups differ")
        (dtype,) = dtypes
        arrays = [[tensor.array.reshape(-1) for tensor in groups] for groups in ranks]
        return self._gather_stage3(arrays, dtype) if self.stage == 3 else self._gather_stage1_and_2(arrays, dtype)

    def _gather_stage3(self, ranks: list[list[npt.NDArray[Any]]], dtype: str) -> dict[str, PartitionedTensor]:
        """Gather stage 3: a rank's fp32_flat_groups are one vector with ceil(n / ranks) elements of each parameter."""
        trained = {}
        offset = 0
        for name, shape in ((name, shape) for group in self.shapes for name, shape in group.items()):
            partition = math.ceil(math.prod(shape) / len(ranks))
            whole = [array for groups in ranks for array in slice_flat(self.folder, name, groups, offset, partition)]
            trained[name] = PartitionedTensor(dtype, shape, slice_flat(self.folder, name, whole, 0, math.prod(shape)))
            offset += partition
        for rank, groups in enumerate(ranks):
            if (length := sum(map(len, groups))) != offset:
                problem = f"rank {rank} has {length} values, but its parameters need {offset}"
                raise CheckpointError(f"{self.folder}: {problem}")
        return trained

    def _gather_stage1_and_2(self, ranks: list[list[npt.NDArray[Any]]], dtype: str) -> dict[str, PartitionedTensor]:
        """Gather stages 1 and 2: each group is a vector in equal partitions, padded after each parameter and last."""
        if len(ranks[0]) != len(self.shapes):
            found = format_count(len(ranks[0]), "group")
            raise CheckpointError(f"{self.folder}: {found} in the shards, but {len(self.shapes)} in the model states")
        trained = {}
        for index, group in enumerate(self.shapes):
            flat = [groups[index] for groups in ranks]
            offset = 0
            for (name, shape), padding in zip(group.items(), self.paddings[index], strict=True):
                count = math.prod(shape)
                trained[name] = PartitionedTensor(dtype, shape, slice_flat(self.folder, name, flat, offset, count))
                offset += count + padding
            # a group is padded to a multiple of 2 × ranks; some versions of DeepSpeed save that padding
            if not 0 <= (left := sum(map(len, flat)) - offset) < 2 * len(ranks):
                raise CheckpointError(f"{self.folder}: {left} values of group {index} don't belong to any parameter")
        return trained


def find_zero_files(folder: Path) -> ZeroFiles:
    """Find the files of a checkpoint, and read the model states of the first rank."""
    check_all_inside(folder)
    model_files = _find_files_by_rank(folder, "*_model_states.pt", _MODEL_STATES_PATTERN)
    shard_files = _find_files_by_rank(folder, "*_optim_states.pt", _OPTIMIZER_STATES_PATTERN)
    if not model_files:
        raise CheckpointError(f"{folder}: not a DeepSpeed checkpoint (it contains no *_model_states.pt)")
    path = model_files[min(model_files)]
    first = expect_dict(read_torch_file(path), path)
    if first.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{path}: was trained with model parallelism, which t5tune doesn't support")
    step = _expect_count(first.get("global_steps", 0), path, "global_steps")
    world_size = _expect_count(first.get("dp_world_size"), path, "dp_world_size")
    shapes = read_shapes(first.get("param_shapes"), path)
    return ZeroFiles(folder, model_files, shard_files, first, step, world_size, shapes)


def read_optimizer_shards(files: ZeroFiles) -> OptimizerShards:
    """Read the optimizer's state of all ranks, without checking the bytes of the tensors."""
    folder, world_size = files.folder, files.world_size
    if not files.shard_files:
        raise CheckpointError(f"{folder}: no optimizer shards (*_optim_states.pt), which contain the fp32 weights")
    check_ranks(folder, files.shard_files, world_size, "shards")
    states, masters, stages = [], [], set()
    for rank in range(world_size):
        path = files.shard_files[rank]
        state = expect_dict(expect_dict(read_torch_file(path), path).get("optimizer_state_dict"), path)
        stages.add(stage := _read_stage(state, path))
        _check_partitions(state, world_size, path)
        masters.append(_read_fp32_groups(state, stage, path))
        states.append(state)
    if len(stages) != 1:
        raise CheckpointError(f"{folder}: the shards are from different runs: their stages differ")
    paddings = _read_paddings(states[0].get("param_alignment_paddings"), files.shapes, files.shard_files[0])
    return OptimizerShards(folder, stage, files.shapes, paddings, states, masters)


def check_ranks(folder: Path, files: Mapping[int, Path], world_size: int, what: str) -> None:
    missing = next((rank for rank in range(world_size) if rank not in files), None)
    if missing is not None or len(files) != world_size:
        found, ranks = shorten(str(sorted(files))), format_count(world_size, "rank")
        lack = f"; rank {missing} is missing" if missing is not None else ""
        raise CheckpointError(f"{folder}: found {what} of ranks {found}, but training used {ranks}{lack}")


def _find_files_by_rank(folder: Path, pattern: str, form: re.Pattern[str]) -> dict[int, Path]:
    """Map ranks to their files. A file without a rank, which all ranks share, counts as rank 0's."""
    files: dict[int, Path] = {}
    for path in sorted(folder.glob(pattern)):
        match = form.fullmatch(path.name)
        if match is None or int(match[2]) != 0:
            raise CheckpointError(
                f"{path}: is from a run with experts, pipeline or model parallelism, which t5tune doesn't support"
            )
        rank = int(match[1] or 0)
        if rank in files:
            raise CheckpointError(f"{folder}: {files[rank].name} and {path.name}: two files for rank {rank}")
        files[rank] = path
    return files


def _read_stage(optimizer: Mapping[Any, Any], path: Path) -> int:
    """Read the ZeRO stage: a ZeroStageEnum, kept as an inert placeholder, or an integer; BF16_Optimizer is stage 1."""
    value = optimizer.get("zero_stage", 1)  # BF16_Optimizer doesn't save a stage
    if isinstance(value, Inert) and len(value.arguments) == 1:
        value = value.arguments[0]
    if type(value) is not int or value not in {1, 2, 3}:
        raise CheckpointError(f"{path}: zero_stage must be 1, 2 or 3")
    return value


def _check_partitions(optimizer: Mapping[Any, Any], world_size: int, path: Path) -> None:
    groups = optimizer.get("ds_zero_partition_groups") or []
    if type(groups) is not list or not all(type(group) is dict for group in groups):
        raise CheckpointError(f"{path}: ds_zero_partition_groups: expected a list of dicts")
    counts = optimizer.get("partition_count")
    counts = counts if type(counts) is list else [counts]
    for count in counts + [group.get("partition_count", world_size) for group in groups]:
        if _expect_count(count, path, "partition_count") != world_size:
            found, ranks = format_count(count, "rank"), format_count(world_size, "rank")
            raise CheckpointError(f"{path}: written in a run of {found}, but training used {ranks}")


def _read_fp32_groups(optimizer: Mapping[Any, Any], stage: int, path: Path) -> list[Tensor]:
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = optimizer.get(key)
    if type(groups) is not list or not groups or not all(isinstance(group, Tensor) for group in groups):
        raise CheckpointError(f"{path}: contains no {key}, the fp32 weights")
    for group in groups:
        if group.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{path}: {key}: dtype {group.dtype}, expected F32")
    return groups


def slice_flat(
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


def expect_dict(value: Any, path: Path) -> dict[Any, Any]:
    if type(value) is not dict:
        raise CheckpointError(f"{path}: expected a dict, found {type(value).__name__}")
    return value


def _expect_count(value: Any, path: Path, key: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise CheckpointError(f"{path}: {key}: expected a non-negative integer")
    return value


def read_shapes(value: Any, path: Path) -> Shapes:
    """Check and return param_shapes: a list with one dict per group, or None if ZeRO didn't shard."""
    groups: list[Any] = value if type(value) is list else [] if value is None else [None]
    names: set[str] = set()
    for group in groups:
        for name, shape in expect_dict(group, path).items():
            is_shape = type(shape) is tuple and len(shape) < 16 and all(type(size) is int for size in shape)
            if not isinstance(name, str) or not is_shape or not all(0 <= size < MAX_COUNT for size in shape):
                raise CheckpointError(f"{path}: param_shapes: expected names with shapes")
            if name in names or math.prod(shape) >= MAX_COUNT:
                raise CheckpointError(f"{path}: param_shapes: {shorten(name)!r}: duplicate or too large")
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
