"""Resume DeepSpeed's ZeRO from a checkpoint of a different number of ranks, or a different stage.

    load_resharded(engine, checkpoint)

Each rank copies its own part of the weights and of the optimizer's state from the mapped shards of all ranks, and gives
it to DeepSpeed in the form of a checkpoint of this number of ranks. Nothing is written. DeepSpeed's solution, a
"universal" checkpoint, is a second copy of everything on disk, and ZeRO-3 gives all its parameter groups the
hyperparameters of the first group.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from t5tune.checkpoints.tensor_files.tensors import PartitionedTensor, Tensor
from t5tune.checkpoints.zero.optimizer import ZeroOptimizer, read_zero_optimizer
from t5tune.checkpoints.zero.shards import find_deepspeed_folder
from t5tune.distributed.collectives import get_rank_and_size
from t5tune.errors import CheckpointError
from t5tune.formatting import format_count

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class Fragment(NamedTuple):
    """The elements of a parameter that this rank's optimizer updates: [begin, end) of the parameter as a vector.

    Args:
        group: which of the optimizer's flat vectors contains them.
        offset: where in it.
    """

    name: str
    begin: int
    end: int
    group: int
    offset: int


def load_resharded(engine: Any, checkpoint: Path) -> None:
    """Set the trained weights, the optimizer's state and the counters of DeepSpeed's engine. Call on every rank."""
    folder = find_deepspeed_folder(checkpoint)
    if folder is None:
        raise CheckpointError(f"{checkpoint}: contains no DeepSpeed shards")
    saved = read_zero_optimizer(folder)
    optimizer, is_stage3 = engine.optimizer, engine.zero_optimization_stage() == 3
    flats = optimizer.fp32_partitioned_groups_flat if is_stage3 else [g["params"][0] for g in optimizer.param_groups]
    fragments = list(_list_fragments_of_stage3(engine) if is_stage3 else _list_fragments_of_stage1_and_2(engine))
    if missing := {fragment.name for fragment in fragments} - saved.masters.keys():
        raise CheckpointError(f"{folder}: contains no {min(missing)}, which is trained now")
    state = optimizer.state_dict()
    base = state["optimizer_state_dict" if is_stage3 else "base_optimizer_state"]
    # offload_optimizer to nvme keeps the vectors in files, and elastic_checkpoint saves a list
    if not all(flat.numel() for flat in flats) or not isinstance(base, dict):
        problem = "saved with NVMe offload or elastic_checkpoint, so a different number of ranks can't load it"
        raise CheckpointError(f"{folder}: {problem}")
    _check_contents(folder, saved, len(base["param_groups"]), engine.lr_scheduler is not None)
    if is_stage3:
        optimizer.checkpoint_event_prologue()
    for fragment in fragments:  # `state` refers to the weights themselves
        _copy(saved.masters, fragment, flats[fragment.group].data)
    _fill_base_state(base, saved, flats, fragments)
    rank, _ = get_rank_and_size()
    optimizer.load_state_dict([None] * rank + [state], load_optimizer_states=True, load_from_fp32_weights=True)
    if is_stage3:
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    for counter in COUNTERS:
        setattr(engine, counter, saved.engine[counter])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(saved.engine["lr_scheduler"])


def _check_contents(folder: Path, saved: ZeroOptimizer, num_groups: int, needs_schedule: bool) -> None:
    """Check that a checkpoint contains the engine's state besides the weights.

    Args:
        num_groups: number of parameter groups of the engine's optimizer.
        needs_schedule: whether DeepSpeed has the learning-rate schedule.
    """
    needed = (*COUNTERS, "lr_scheduler") if needs_schedule else COUNTERS
    if missing := [name for name in needed if saved.engine.get(name) is None]:
        raise CheckpointError(f"{folder}: the model states contain no {missing[0]}")
    if len(saved.groups) != num_groups:
        found = format_count(len(saved.groups), "parameter group")
        raise CheckpointError(f"{folder}: the optimizer has {found}, but {num_groups} in this run")


def _fill_base_state(
    base: dict[str, Any], saved: ZeroOptimizer, flats: list[torch.Tensor], fragments: list[Fragment]
) -> None:
    """Fill the state dict of the optimizer that DeepSpeed wraps, as in a checkpoint of this number of ranks."""
    for group, hyperparameters in zip(base["param_groups"], saved.groups, strict=True):
        group.update(hyperparameters)
    if saved.numbers or saved.moments:  # empty before the first step
        for index, flat in enumerate(flats):
            numbers = {key: _to_torch(value) for key, value in saved.numbers.items()}
            base["state"][index] = numbers | {key: torch.zeros_like(flat.data) for key in saved.moments}
    for key, moment in saved.moments.items():
        for fragment in fragments:
            _copy(moment, fragment, base["state"][fragment.group][key])


def _list_fragments_of_stage3(engine: Any) -> Iterator[Fragment]:
    """List the fragments of stage 3: a partition of each parameter, in order, in the group's flat vector."""
    rank, _ = get_rank_and_size()
    for index, group in enumerate(engine.optimizer.fp16_groups):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()  # the last partitions may be longer than the rest of the parameter
            begin, end = (min(each * size, parameter.ds_numel) for each in (rank, rank + 1))
            yield Fragment(engine.param_names[parameter], begin, end, index, offset)
            offset += size


def _list_fragments_of_stage1_and_2(engine: Any) -> Iterator[Fragment]:
    """List the fragments of stages 1 and 2: of each group a partition, which may begin or end within a parameter."""
    for parameter, name in engine.param_names.items():
        if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            begin, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            offset = mapping.hp_fragment_address.start
            yield Fragment(name, begin, begin + size, mapping.param_group_index, offset)


def _copy(source: dict[str, PartitionedTensor], fragment: Fragment, flat: torch.Tensor) -> None:
    values = source[fragment.name].read(fragment.begin, fragment.end)
    flat.narrow(0, fragment.offset, len(values)).copy_(torch.from_numpy(values))


def _to_torch(number: Any) -> Any:
    """Convert a number to the type it was saved as. Adam increments a tensor in place, so each group needs its own."""
    return torch.from_numpy(number.array.copy()) if isinstance(number, Tensor) else number
