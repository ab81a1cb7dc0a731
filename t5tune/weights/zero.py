"""Gather the fp32 weights of a DeepSpeed checkpoint from its ranks' shards, without DeepSpeed and without pickles.

Stage 3 cuts each parameter into equal parts, one a rank, the last padded. Stages 1 and 2 lay all parameters of
a group end to end and cut that. The model-states file of rank 0 names the parameters in this order
(deepspeed/utils/zero_to_fp32.py tells the same).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.errors import CheckpointError
from t5tune.weights.tensors import Tensor
from t5tune.weights.torch_file import Inert, read_torch_file

_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")


@dataclass(frozen=True)
class ZeroState:
    """What a DeepSpeed checkpoint holds: tensors by the training model's names, in fp32 (stage 0: as trained).

    `frozen` has the weights that were not trained, where DeepSpeed's own save put them in.
    """

    stage: int
    world_size: int
    step: int
    trained: dict[str, Tensor]
    frozen: dict[str, Tensor]


def find_deepspeed_folder(folder: Path) -> Path | None:
    """The folder with the shards: the folder itself, or the one that its `latest` names.

    Raises:
        CheckpointError: `latest` names something outside the folder, or a folder that isn't there.
    """
    if any(folder.glob("*_model_states.pt")):
        return folder
    latest = folder / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8").strip()
    if not tag or Path(tag).name != tag or tag in {".", ".."}:
        raise CheckpointError(f"{latest}: {tag!r}: not the name of a folder in it")
    if not any((folder / tag).glob("*_model_states.pt")):
        raise CheckpointError(f"{folder / tag}: {latest.name} names it, but it holds no shards")
    return folder / tag


def read_zero(folder: Path) -> ZeroState:
    """Gather a checkpoint's weights.

    Raises:
        CheckpointError: a shard is missing, too many, broken, or doesn't fit the others.
    """
    states = [read_torch_file(path) for path in _model_states(folder)]
    first = states[0]
    step, world_size = int(first.get("global_steps", 0)), int(first["dp_world_size"])
    shards = _optimizer_shards(folder)
    frozen = _frozen(folder, states)
    if not shards and first.get("param_shapes"):
        raise CheckpointError(f"{folder}: no optimizer shard (*_optim_states.pt), which hold the fp32 weights")
    if not shards:
        module = {name: value for name, value in first["module"].items() if isinstance(value, Tensor)}
        frozen_names = set(frozen)
        trained = {name: value for name, value in module.items() if name not in frozen_names}
        return ZeroState(0, world_size, step, trained, frozen)
    optimizers = [_optimizer(shards[rank]) for rank in sorted(shards)]
    if len(shards) != world_size or sorted(shards) != list(range(world_size)):
        missing = sorted(set(range(world_size)) - set(shards))
        raise CheckpointError(
            f"{folder}: shards of ranks {sorted(shards)}, but {world_size} ranks trained"
            + (f"; rank {missing[0]}'s is missing" if missing else "")
        )
    stage = _enum(optimizers[0]["zero_stage"])
    shapes = first["param_shapes"]
    if stage == 3:
        trained = _stage3(folder, [_groups(folder, o, "fp32_flat_groups") for o in optimizers], shapes)
    else:
        groups = [_groups(folder, o, "single_partition_of_fp32_groups") for o in optimizers]
        trained = _stage1_and_2(folder, groups, shapes, optimizers[0].get("param_alignment_paddings"))
    return ZeroState(stage, world_size, step, trained, frozen)


def _model_states(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*_model_states.pt"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    if not paths:
        raise CheckpointError(f"{folder}: no DeepSpeed checkpoint (no *_model_states.pt in it)")
    return paths


def _optimizer_shards(folder: Path) -> dict[int, Path]:
    return {int(match[1]): path for path in folder.glob("*_optim_states.pt") if (match := _RANK.search(path.name))}


def _optimizer(path: Path) -> dict[str, Any]:
    state = read_torch_file(path)
    try:
        return dict(state["optimizer_state_dict"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no optimizer state in it") from error


def _groups(folder: Path, optimizer: dict[str, Any], key: str) -> list[npt.NDArray[np.float32]]:
    groups = optimizer.get(key)
    if not isinstance(groups, list) or not all(isinstance(group, Tensor) for group in groups):
        raise CheckpointError(f"{folder}: a shard holds no {key}")
    return [group.to_float32().reshape(-1) for group in groups]


def _stage3(
    folder: Path, ranks: list[list[npt.NDArray[np.float32]]], shapes: list[dict[str, tuple[int, ...]]]
) -> dict[str, Tensor]:
    """fp32_flat_groups lie end to end per rank; each parameter takes ceil(n / ranks) of it, on every rank."""
    flat = [np.concatenate(groups) for groups in ranks]
    trained = {}
    offset = 0
    for group in shapes:
        for name, shape in group.items():
            count = math.prod(shape)
            part = math.ceil(count / len(flat))
            parts = [values[offset : offset + part] for values in flat]
            if any(len(values) != part for values in parts):
                raise CheckpointError(f"{folder}: {name}: the shards end before it does")
            trained[name] = Tensor("F32", np.concatenate(parts)[:count].reshape(shape))
            offset += part
    return trained


def _stage1_and_2(
    folder: Path,
    ranks: list[list[npt.NDArray[np.float32]]],
    shapes: list[dict[str, tuple[int, ...]]],
    paddings: Any,
) -> dict[str, Tensor]:
    """Each group is one vector cut into equal partitions, with a padding behind each parameter and at its end."""
    trained = {}
    for index, group in enumerate(shapes):
        flat = np.concatenate([groups[index] for groups in ranks])
        behind = paddings[index] if paddings is not None else [0] * len(group)
        offset = 0
        for (name, shape), padding in zip(group.items(), behind, strict=True):
            count = math.prod(shape)
            if offset + count > len(flat):
                raise CheckpointError(f"{folder}: {name}: the shards end before it does")
            trained[name] = Tensor("F32", flat[offset : offset + count].reshape(shape))
            offset += count + padding
    return trained


def _frozen(folder: Path, states: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Weights that weren't trained: whole in stages 1 and 2, in one fragment a rank in stage 3."""
    shapes = states[0].get("frozen_param_shapes")
    if not shapes:
        return {}
    frozen = {}
    for name, shape in shapes.items():
        fragments = [state["frozen_param_fragments"][name] for state in states]
        flat = np.concatenate([fragment.array.reshape(-1) for fragment in fragments])
        count = math.prod(shape)
        if len(flat) < count:
            raise CheckpointError(f"{folder}: {name}: {len(flat)} values in the shards, expected {count}")
        frozen[name] = Tensor(fragments[0].dtype, flat[:count].reshape(shape))
    return frozen


def _enum(value: Any) -> int:
    """ZeroStageEnum, kept as an inert stand-in, or a plain number."""
    return int(value.arguments[0]) if isinstance(value, Inert) else int(value)
