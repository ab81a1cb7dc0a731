"""Read the optimizer of a ZeRO checkpoint by parameter, for any number of ranks.

saved = read_zero_optimizer(folder)
saved.masters["…q.lora_A.default.weight"].read(0, 100)              # fp32 weights
saved.moments["exp_avg"]["…q.lora_A.default.weight"].read(0, 100)
saved.numbers["step"]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.checkpoints.tensor_files.tensors import FLOAT_DTYPES, PartitionedTensor, Tensor
from t5tune.checkpoints.zero.files import OptimizerShards, expect_dict, find_zero_files, read_optimizer_shards
from t5tune.errors import CheckpointError


@dataclass(frozen=True)
class ZeroOptimizer:
    """An optimizer's state, as views of the mapped files.

    Args:
        masters: the fp32 weights by parameter.
        moments: values per element, such as Adam's "exp_avg": key -> parameter -> values.
        numbers: single values, such as "step": key -> a number, or a Tensor without dimensions.
        groups: the hyperparameters of each parameter group, such as "lr".
        engine: the model states of the first rank, with DeepSpeed's counters and learning-rate schedule.
    """

    stage: int
    masters: dict[str, PartitionedTensor]
    moments: dict[str, dict[str, PartitionedTensor]]
    numbers: dict[str, Any]
    groups: list[dict[str, Any]]
    engine: dict[Any, Any]


def read_zero_optimizer(folder: Path) -> ZeroOptimizer:
    """Read the optimizer's state from the shards of all ranks; refuse states that depend on the number of ranks."""
    files = find_zero_files(folder)
    shards = read_optimizer_shards(files)
    states = [_read_state(shards, rank, files.shard_files[rank]) for rank in range(files.world_size)]
    # key -> whether it is a moment
    keys = {key: isinstance(value, Tensor) and value.shape != () for key, value in states[0][0].items()}
    if any(group.keys() != keys.keys() for groups in states for group in groups):
        raise CheckpointError(f"{folder}: the optimizer's state differs between the parameter groups")
    moments = {key: _gather_moment(shards, states, key) for key, is_moment in keys.items() if is_moment}
    numbers = {key: _read_number(folder, states, key) for key, is_moment in keys.items() if not is_moment}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in _read_groups(shards)]
    return ZeroOptimizer(shards.stage, shards.gather(shards.masters), moments, numbers, groups, files.first)


def _get_base_state(shards: OptimizerShards, rank: int) -> Any:
    """Return the state dict of the optimizer that DeepSpeed wraps."""
    return shards.states[rank].get("optimizer_state_dict" if shards.stage == 3 else "base_optimizer_state")


def _read_state(shards: OptimizerShards, rank: int, path: Path) -> list[Mapping[str, Any]]:
    """Read the state of each flat vector of a rank; empty before the first step."""
    base = _get_base_state(shards, rank)
    if type(base) is not dict:  # a list, with zero_optimization.elastic_checkpoint
        raise CheckpointError(f"{path}: the state of several optimizers isn't supported")
    state = expect_dict(base.get("state"), path)
    return [expect_dict(state.get(index, {}), path) for index in range(len(shards.masters[rank]))]


def _read_groups(shards: OptimizerShards) -> list[dict[str, Any]]:
    groups = _get_base_state(shards, 0).get("param_groups")
    if type(groups) is not list or not all(type(group) is dict for group in groups):
        raise CheckpointError(f"{shards.folder}: param_groups: expected a list of dicts")
    return groups


def _gather_moment(
    shards: OptimizerShards, states: list[list[Mapping[str, Any]]], key: str
) -> dict[str, PartitionedTensor]:
    values = [[group[key] for group in groups] for groups in states]
    for masters, moments in zip(shards.masters, values, strict=True):
        for master, moment in zip(masters, moments, strict=True):
            is_moment = isinstance(moment, Tensor) and moment.dtype in FLOAT_DTYPES and len(moment.shape) == 1
            # stages 1 and 2 save the fp32 weights without the padding at the end, which is less than 2 × ranks
            if not is_moment or not 0 <= moment.array.size - master.array.size < 2 * len(states):
                raise CheckpointError(f"{shards.folder}: the optimizer's {key} doesn't have one value per weight")
    return shards.gather(values)


def _read_number(folder: Path, states: list[list[Mapping[str, Any]]], key: str) -> Any:
    found = [group[key] for groups in states for group in groups]
    numbers = {value.array.item() if isinstance(value, Tensor) else value for value in found}
    if len(numbers) != 1:
        raise CheckpointError(f"{folder}: the optimizer's {key} differs between ranks or parameter groups")
    return found[0]
