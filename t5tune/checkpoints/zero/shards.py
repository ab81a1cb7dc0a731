"""Gather the fp32 weights of a DeepSpeed checkpoint from its ranks' shards (see checkpoints/zero/files.py)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.checkpoints.tensor_files.tensors import FLOAT_DTYPES, PartitionedTensor, Tensor
from t5tune.checkpoints.tensor_files.torch_file import StoredTensor, read_torch_file
from t5tune.checkpoints.zero.files import (
    Shapes,
    check_ranks,
    expect_dict,
    find_zero_files,
    read_optimizer_shards,
    read_shapes,
    slice_flat,
)
from t5tune.errors import CheckpointError
from t5tune.formatting import shorten
from t5tune.io.untrusted import check_inside, is_file_name

UNIVERSAL_FOLDER = "zero"


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
    """Find the folder with the shards: the folder itself, or the folder named in its `latest` or `latest_universal`."""
    if any(folder.glob("*_model_states.pt")):
        return folder
    latest = next((path for name in ("latest", "latest_universal") if (path := folder / name).is_file()), None)
    if latest is None:
        return None
    check_inside(folder, latest)
    with open(latest, "rb") as file:
        tag = file.read(256).decode("utf-8", "replace").strip()
    if not is_file_name(tag):
        raise CheckpointError(f"{latest}: {shorten(tag)!r}: not the name of a folder in this folder")
    check_inside(folder, folder / tag)
    if not any((folder / tag).glob("*_model_states.pt")):
        raise CheckpointError(f"{folder / tag}: contains no shards, but {latest.name} names it")
    return folder / tag


def read_zero(folder: Path, with_frozen: bool = True) -> ZeroState:
    """Gather a checkpoint's weights, as views of the mapped files; `with_frozen` also reads the frozen weights."""
    files = find_zero_files(folder)
    first, shapes, world_size = files.first, files.shapes, files.world_size
    is_universal = (folder / UNIVERSAL_FOLDER).is_dir()
    if (is_universal or files.shard_files) and not any(shapes):
        raise CheckpointError(f"{files.first_path}: lists no trained parameters")
    if is_universal:
        trained = _read_universal(folder, shapes)
        stage = 3 if files.first_path.name.startswith("zero_pp") else _read_configured_stage(first)
    elif shapes:
        shards = read_optimizer_shards(files)
        for tensor in (tensor for groups in shards.masters for tensor in groups if isinstance(tensor, StoredTensor)):
            tensor.check()
        stage, trained = shards.stage, shards.gather(shards.masters)
    else:
        stage, trained = 0, {}
    check_ranks(folder, files.model_files, world_size if stage == 3 else 1, "model states")
    tensors = _select_tensors(first.get("module"))
    module = {name: PartitionedTensor.from_tensor(value) for name, value in tensors.items() if value.array.size}
    if stage == 0:
        return ZeroState(stage, world_size, files.step, module, {})
    frozen: dict[str, PartitionedTensor] = {}
    if with_frozen:
        frozen = _gather_frozen(files.model_files, first, stage == 3)
        if not frozen and stage < 3:
            known = trained.keys() | expect_dict(first.get("shared_params") or {}, files.first_path).keys()
            frozen = {name: value for name, value in module.items() if name not in known}
    return ZeroState(stage, world_size, files.step, trained, frozen)


def _gather_frozen(
    model_files: Mapping[int, Path], first: Mapping[Any, Any], is_sharded: bool
) -> dict[str, PartitionedTensor]:
    """Gather the frozen weights: whole in stages 1 and 2, one fragment per rank in stage 3."""
    path = model_files[0]
    shapes = read_shapes([first.get("frozen_param_shapes") or {}], path)[0]
    if not shapes:
        return {}
    states = [first]
    if is_sharded:
        states += [expect_dict(read_torch_file(file), file) for _, file in sorted(model_files.items())[1:]]
    fragments = [_select_tensors(state.get("frozen_param_fragments")) for state in states]
    frozen = {}
    for name, shape in shapes.items():
        if not all(name in ranks for ranks in fragments) or len({ranks[name].dtype for ranks in fragments}) != 1:
            raise CheckpointError(f"{path.parent}: {name}: a rank's fragment is missing or has a different dtype")
        arrays = [ranks[name].array.reshape(-1) for ranks in fragments]
        parts = slice_flat(path.parent, name, arrays, 0, math.prod(shape))
        frozen[name] = PartitionedTensor(fragments[0][name].dtype, shape, parts)
    return frozen


def _read_universal(folder: Path, shapes: Shapes) -> dict[str, PartitionedTensor]:
    """Read DeepSpeed's universal format (ds_to_universal): zero/NAME/fp32.pt contains one whole parameter."""
    trained = {}
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        if not is_file_name(name):
            raise CheckpointError(f"{folder}: {shorten(name)!r}: not a valid parameter name")
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


def _select_tensors(value: Any) -> dict[str, Tensor]:
    found = value if type(value) is dict else {}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor) and isinstance(name, str)}
