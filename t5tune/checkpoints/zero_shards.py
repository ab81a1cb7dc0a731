"""Gather the fp32 weights of a DeepSpeed checkpoint from its ranks' shards, without DeepSpeed and without pickles.

Stage 3 cuts each parameter into equal parts, one a rank, the last padded. Stages 1 and 2 (and BF16_Optimizer, whose
files begin with bf16_) lay all parameters of a group end to end and cut that. The model-states file of rank 0 names
the parameters in this order (deepspeed/utils/zero_to_fp32.py tells the same).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from t5tune.checkpoints.partitioned_tensor import Pieces, window
from t5tune.checkpoints.tensors import FLOATS, Tensor
from t5tune.checkpoints.torch_format.file import StoredTensor, read_torch_file
from t5tune.checkpoints.torch_format.pickle import Inert
from t5tune.errors import CheckpointError
from t5tune.io.untrusted import check_all_inside, check_inside, is_file_name

UNIVERSAL = "zero"
_MODEL_FILE = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MAX_LENGTH = 1 << 40

Shapes = list[dict[str, tuple[int, ...]]]
"""One dict a parameter group: name -> shape, in the order of the flat vectors."""


@dataclass(frozen=True)
class ZeroState:
    """What a DeepSpeed checkpoint holds: tensors by the training model's names, fp32 as they were stepped.

    `frozen` has the weights that were not trained, where they are in it. Stage 0 doesn't tell the two apart: all
    are in `trained`, in the dtype that the model computes in.
    """

    stage: int
    world_size: int
    step: int
    trained: dict[str, Pieces]
    frozen: dict[str, Pieces]


def find_deepspeed_folder(folder: Path) -> Path | None:
    """The folder with the shards: the folder itself, or the one that its `latest` (or `latest_universal`) names.

    Raises:
        CheckpointError: `latest` names something outside the folder, or a folder that isn't there.
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
        raise CheckpointError(f"{latest}: {tag[:100]!r}: not the name of a folder in it")
    check_inside(folder, folder / tag)
    if not any((folder / tag).glob("*_model_states.pt")):
        raise CheckpointError(f"{folder / tag}: {latest.name} names it, but it holds no shards")
    return folder / tag


def read_zero(folder: Path, with_frozen: bool = True) -> ZeroState:
    """Gather a checkpoint's weights; what isn't asked for stays in the files.

    Args:
        with_frozen: whether to look for the weights that weren't trained, in the files of all ranks.

    Raises:
        CheckpointError: a shard is missing, too many, broken, or doesn't fit the others.
    """
    check_all_inside(folder)
    model_files = _by_rank(folder, "*_model_states.pt", _MODEL_FILE)
    shards = _by_rank(folder, "*_optim_states.pt", _OPTIMIZER_FILE)
    if not model_files:
        raise CheckpointError(f"{folder}: no DeepSpeed checkpoint (no *_model_states.pt in it)")
    first_path = model_files[min(model_files)]
    first = _dict(read_torch_file(first_path), first_path)
    if first.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"{first_path}: trained with model parallelism, which export can't join")
    step = _count(first.get("global_steps", 0), first_path, "global_steps")
    world_size = _count(first.get("dp_world_size"), first_path, "dp_world_size")
    shapes = _shapes(first.get("param_shapes"), first_path)
    is_universal = (folder / UNIVERSAL).is_dir()
    if (is_universal or shards) and not any(shapes):
        raise CheckpointError(f"{first_path}: names no trained parameter")
    if is_universal:
        trained = _read_universal(folder, shapes)
        stage = 3 if first_path.name.startswith("zero_pp") else _configured_stage(first)
    elif shapes:
        stage, trained = _read_shards(folder, shards, world_size, shapes)
    else:
        stage, trained = 0, {}
    _check_ranks(folder, model_files, world_size if stage == 3 else 1, "model states")
    module = {name: Pieces.of(value) for name, value in _tensors(first.get("module")).items() if value.array.size}
    if stage == 0:
        return ZeroState(stage, world_size, step, module, {})
    frozen: dict[str, Pieces] = {}
    if with_frozen:
        frozen = _frozen(model_files, first, stage == 3)
        if not frozen and stage < 3:
            known = trained.keys() | _dict(first.get("shared_params") or {}, first_path).keys()
            frozen = {name: value for name, value in module.items() if name not in known}
    return ZeroState(stage, world_size, step, trained, frozen)


def _by_rank(folder: Path, pattern: str, form: re.Pattern[str]) -> dict[int, Path]:
    """Rank -> its file. A file without a rank, which all ranks share, is rank 0's."""
    files: dict[int, Path] = {}
    for path in sorted(folder.glob(pattern)):
        match = form.fullmatch(path.name)
        if match is None or int(match[2]) != 0:
            raise CheckpointError(f"{path}: of experts, a pipeline or model parallelism, which export can't join")
        rank = int(match[1] or 0)
        if rank in files:
            raise CheckpointError(f"{folder}: {files[rank].name} and {path.name}: two files of rank {rank}")
        files[rank] = path
    return files


def _check_ranks(folder: Path, files: Mapping[int, Path], world_size: int, what: str) -> None:
    missing = next((rank for rank in range(world_size) if rank not in files), None)
    if missing is not None or len(files) != world_size:
        raise CheckpointError(
            f"{folder}: {what} of ranks {_listed(files)}, but {world_size} ranks trained"
            + (f"; rank {missing}'s is missing" if missing is not None else "")
        )


def _listed(files: Mapping[int, Path]) -> str:
    ranks = sorted(files)
    return str(ranks) if len(ranks) <= 16 else f"{ranks[:16]} and {len(ranks) - 16} more"


def _read_shards(
    folder: Path, shards: Mapping[int, Path], world_size: int, shapes: Shapes
) -> tuple[int, dict[str, Pieces]]:
    """(stage, tensors by name)."""
    if not shards:
        raise CheckpointError(f"{folder}: no optimizer shard (*_optim_states.pt), which hold the fp32 weights")
    _check_ranks(folder, shards, world_size, "shards")
    stages = set()
    ranks: list[list[npt.NDArray[Any]]] = []
    dtypes = set()
    for rank in range(world_size):
        path = shards[rank]
        optimizer = _dict(_dict(read_torch_file(path), path).get("optimizer_state_dict"), path)
        stage = _stage(optimizer, path)
        stages.add(stage)
        _check_partitions(optimizer, world_size, path)
        groups = _groups(optimizer, "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups", path)
        dtypes |= {group.dtype for group in groups}
        ranks.append([group.array.reshape(-1) for group in groups])
        if rank == 0:
            paddings = _paddings(optimizer.get("param_alignment_paddings"), shapes, path)
    if len(stages) != 1 or len(dtypes) != 1 or len({len(groups) for groups in ranks}) != 1:
        raise CheckpointError(f"{folder}: its shards are of different runs: stages, dtypes or groups differ")
    dtype = dtypes.pop()
    if stages == {3}:
        return 3, _stage3(folder, ranks, shapes, dtype)
    return stages.pop(), _stage1_and_2(folder, ranks, shapes, paddings, dtype)


def _stage(optimizer: Mapping[Any, Any], path: Path) -> int:
    """ZeroStageEnum, kept as an inert stand-in, or a plain number; BF16_Optimizer, which is stage 1, doesn't say."""
    value = optimizer.get("zero_stage", 1)
    if isinstance(value, Inert) and len(value.arguments) == 1:
        value = value.arguments[0]
    if type(value) is not int or value not in {1, 2, 3}:
        raise CheckpointError(f"{path}: its zero_stage is none of 1, 2, 3")
    return value


def _check_partitions(optimizer: Mapping[Any, Any], world_size: int, path: Path) -> None:
    counts = optimizer.get("partition_count")
    groups = optimizer.get("ds_zero_partition_groups") or []
    if type(groups) is not list or not all(type(group) is dict for group in groups):
        raise CheckpointError(f"{path}: ds_zero_partition_groups: expected a list of objects")
    counts = [*(counts if type(counts) is list else [counts])]
    counts += [group.get("partition_count", world_size) for group in groups]
    for count in counts:
        if _count(count, path, "partition_count") != world_size:
            raise CheckpointError(f"{path}: written by one of {count} ranks, but {world_size} ranks trained")


def _groups(optimizer: Mapping[Any, Any], key: str, path: Path) -> list[Tensor]:
    groups = optimizer.get(key)
    if type(groups) is not list or not groups or not all(isinstance(group, Tensor) for group in groups):
        raise CheckpointError(f"{path}: holds no {key}, the fp32 weights")
    for group in groups:
        if group.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {key}: {group.dtype}, expected F32")
        if isinstance(group, StoredTensor):
            group.check()
    return groups


def _stage3(folder: Path, ranks: list[list[npt.NDArray[Any]]], shapes: Shapes, dtype: str) -> dict[str, Pieces]:
    """fp32_flat_groups lie end to end per rank; each parameter takes ceil(n / ranks) of it, on every rank."""
    trained = {}
    offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        part = math.ceil(math.prod(shape) / len(ranks))
        found = [window(groups, offset, part) for groups in ranks]
        whole = [array for parts in found for array in (_ended(folder, name) if parts is None else parts)]
        trained[name] = Pieces(dtype, shape, window(whole, 0, math.prod(shape)) or ())
        offset += part
    for rank, groups in enumerate(ranks):
        if (length := sum(map(len, groups))) != offset:
            raise CheckpointError(f"{folder}: rank {rank} holds {length} values, its parameters take {offset}")
    return trained


def _stage1_and_2(
    folder: Path, ranks: list[list[npt.NDArray[Any]]], shapes: Shapes, paddings: list[list[int]], dtype: str
) -> dict[str, Pieces]:
    """Each group is one vector cut into equal partitions, with a padding behind each parameter and at its end."""
    if len(ranks[0]) != len(shapes):
        raise CheckpointError(f"{folder}: {len(ranks[0])} groups in the shards, {len(shapes)} in the model states")
    trained = {}
    for index, group in enumerate(shapes):
        flat = [groups[index] for groups in ranks]
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            count = math.prod(shape)
            found = window(flat, offset, count)
            trained[name] = Pieces(dtype, shape, _ended(folder, name) if found is None else found)
            offset += count + padding
        # a group is padded to a multiple of 2 × ranks; some versions leave that padding in
        if not 0 <= (left := sum(map(len, flat)) - offset) < 2 * len(ranks):
            raise CheckpointError(f"{folder}: {left} values of group {index} belong to no parameter")
    return trained


def _ended(folder: Path, name: str) -> Any:
    raise CheckpointError(f"{folder}: {name}: the shards end before it does")


def _frozen(model_files: Mapping[int, Path], first: Mapping[Any, Any], is_sharded: bool) -> dict[str, Pieces]:
    """Weights that weren't trained: whole in stages 1 and 2, in one fragment a rank in stage 3."""
    path = model_files[0]
    shapes = _shapes([first.get("frozen_param_shapes") or {}], path)[0]
    if not shapes:
        return {}
    states = [first]
    if is_sharded:
        states += [_dict(read_torch_file(model_files[rank]), model_files[rank]) for rank in sorted(model_files)[1:]]
    fragments = [_tensors(state.get("frozen_param_fragments")) for state in states]
    frozen = {}
    for name, shape in shapes.items():
        if not all(name in ranks for ranks in fragments) or len({ranks[name].dtype for ranks in fragments}) != 1:
            raise CheckpointError(f"{path.parent}: {name}: a rank lacks its fragment, or holds it in another dtype")
        arrays = [ranks[name].array.reshape(-1) for ranks in fragments]
        found = window(arrays, 0, math.prod(shape))
        frozen[name] = Pieces(fragments[0][name].dtype, shape, _ended(path.parent, name) if found is None else found)
    return frozen


def _read_universal(folder: Path, shapes: Shapes) -> dict[str, Pieces]:
    """DeepSpeed's universal layout (ds_to_universal): zero/NAME/fp32.pt, each parameter whole."""
    trained = {}
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        if not is_file_name(name):
            raise CheckpointError(f"{folder}: {name[:100]!r}: no name of a parameter")
        path = folder / UNIVERSAL / name / "fp32.pt"
        check_inside(folder, path)
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; the model states name this parameter")
        value = read_torch_file(path)
        value = value.get("param") if type(value) is dict else value
        if not isinstance(value, StoredTensor) or value.dtype not in FLOATS or value.array.size != math.prod(shape):
            raise CheckpointError(f"{path}: expected a tensor of {list(shape)}")
        value.check()
        trained[name] = Pieces(value.dtype, shape, (value.array.reshape(-1),))
    return trained


def _configured_stage(state: Mapping[Any, Any]) -> int:
    config = state.get("ds_config")
    zero = config.get("zero_optimization") if type(config) is dict else None
    stage = zero.get("stage") if type(zero) is dict else None
    return stage if type(stage) is int and stage in {1, 2} else 1


def _dict(value: Any, path: Path) -> dict[Any, Any]:
    if type(value) is not dict:
        raise CheckpointError(f"{path}: expected an object with names in it, it holds {type(value).__name__}")
    return value


def _count(value: Any, path: Path, key: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_LENGTH:
        raise CheckpointError(f"{path}: {key}: expected a number")
    return value


def _tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, by name; what else is in it is left out."""
    found = value if type(value) is dict else {}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor) and isinstance(name, str)}


def _shapes(value: Any, path: Path) -> Shapes:
    """param_shapes: a list with one dict a group; None where ZeRO didn't shard."""
    groups: list[Any] = value if type(value) is list else [] if value is None else [None]
    names: set[str] = set()
    for group in groups:
        for name, shape in _dict(group, path).items():
            is_shape = type(shape) is tuple and len(shape) < 16 and all(type(size) is int for size in shape)
            if not isinstance(name, str) or not is_shape or not all(0 <= size < MAX_LENGTH for size in shape):
                raise CheckpointError(f"{path}: param_shapes: expected names with their shapes")
            if name in names or math.prod(shape) >= MAX_LENGTH:
                raise CheckpointError(f"{path}: param_shapes: {name[:100]!r}: twice, or too large")
            names.add(name)
    return groups


def _paddings(value: Any, shapes: Shapes, path: Path) -> list[list[int]]:
    """What lies behind each parameter of each group (zero_optimization.parameter_alignment)."""
    if value is None:
        return [[0] * len(group) for group in shapes]
    fits = type(value) is list and len(value) == len(shapes) and all(type(group) is list for group in value)
    if not fits or [len(group) for group in value] != [len(group) for group in shapes]:
        raise CheckpointError(f"{path}: param_alignment_paddings: expected one number a parameter")
    return [[_count(padding, path, "param_alignment_paddings") for padding in group] for group in value]
