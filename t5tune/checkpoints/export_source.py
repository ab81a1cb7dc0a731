"""Read the trained weights of any kind of training checkpoint: DeepSpeed's shards, Trainer's files or FastChat's.

contents = read_training_checkpoint(Path("run/checkpoint-300"), LoraFlags())
contents.adapter["base_model.model.….q.lora_A.weight"]
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import (
    PEFT_PREFIX,
    add_decoder_rows,
    convert_to_plain_lora,
    extract_initial_matrices,
    is_inside,
    read_adapter,
    read_adapter_tensors,
    to_peft_name,
)
from t5tune.checkpoints.adapter_config import read_adapter_config
from t5tune.checkpoints.base_tensors import WEIGHTS_FILES, Checkpoint
from t5tune.checkpoints.fastchat import LoraFlags, infer_adapter_config, is_adapter_name, strip_wrappers
from t5tune.checkpoints.tensor_files.tensors import PartitionedTensor, Tensor
from t5tune.checkpoints.tensor_files.torch_file import StoredTensor
from t5tune.checkpoints.training_data import read_label_task
from t5tune.checkpoints.zero.shards import ZeroState, find_deepspeed_folder, read_zero
from t5tune.errors import CheckpointError
from t5tune.file_names import (
    ADAPTER_BIN_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CHECKPOINT_MANIFEST_FILE,
    INDEX_SUFFIX,
    TRAINER_STATE_FILE,
)
from t5tune.formatting import format_count
from t5tune.io.untrusted import check_all_inside, read_json_object

MODEL_FILES = tuple(f"{name}{suffix}" for name in WEIGHTS_FILES.values() for suffix in ("", INDEX_SUFFIX))


@dataclass(frozen=True)
class CheckpointContents:
    """The contents of a training checkpoint.

    Args:
        config: adapter_config.json.
        adapter: the adapter's tensors, by PEFT's names.
        extra: tensors that were also trained, but that PEFT's config doesn't cover.
        frozen: the base's weights, by the base's names.
        stage: ZeRO stage; None: DeepSpeed didn't write the checkpoint.
        notes: for the user.
    """

    config: dict[str, Any]
    adapter: dict[str, Tensor]
    extra: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, PartitionedTensor] = field(default_factory=dict)
    step: int | None = None
    world_size: int = 1
    stage: int | None = None
    notes: tuple[str, ...] = ()


def read_training_checkpoint(folder: Path, flags: LoraFlags, with_frozen: bool = False) -> CheckpointContents:
    """Read a checkpoint. The fp32 weights in DeepSpeed's shards are preferred to Trainer's rounded copies of them.

    `flags` describe an adapter without adapter_config.json; `with_frozen` also reads the base's weights.
    """
    check_all_inside(folder)
    shards = find_deepspeed_folder(folder)
    zero = read_zero(shards, with_frozen) if shards is not None else None
    has_adapter = (folder / ADAPTER_WEIGHTS_FILE).is_file() or (folder / ADAPTER_BIN_FILE).is_file()
    model_file = next((name for name in MODEL_FILES if (folder / name).is_file()), None)
    if zero is not None and (zero.stage > 0 or not has_adapter):
        return _build_from_zero(folder, zero, flags)
    if not has_adapter and model_file is None:
        problem = f"checkpoint: {folder}: contains no trained weights"
        raise CheckpointError(problem, hint="give a run folder or a checkpoint-N in it")
    contents = _build_from_files(folder, has_adapter, model_file, flags)
    if zero is None:
        step, world_size = _read_step_and_world_size(folder)
        return replace(contents, step=step, world_size=world_size)
    notes = contents.notes
    if {value.dtype for value in contents.adapter.values()} != {"F32"}:
        notes += ("exporting in the training dtype, since ZeRO-0's fp32 master weights can't be identified",)
    frozen = _rename_to_base(zero.frozen)
    return replace(contents, frozen=frozen, step=zero.step, world_size=zero.world_size, stage=zero.stage, notes=notes)


def find_checkpoint_of_shards(folder: Path) -> Path:
    """Return the checkpoint that contains this folder of shards and an adapter; any other folder as it is."""
    is_inside = folder.name.startswith("global_step") and (folder.parent / ADAPTER_WEIGHTS_FILE).is_file()
    return folder.parent if is_inside else folder


def _build_from_files(folder: Path, has_adapter: bool, model_file: str | None, flags: LoraFlags) -> CheckpointContents:
    """Read Trainer's files: an adapter, or a whole model with an adapter in it."""
    if has_adapter:
        tensors = read_adapter_tensors(folder)
    else:
        model = Checkpoint(folder)
        tensors = {name: model.get_tensor(name) for name in model.list_names()}
    raw = {strip_wrappers(name): value for name, value in tensors.items()}
    if not any(map(is_adapter_name, raw)):
        problem = f"checkpoint: {folder}: is from full fine-tuning: it contains the whole model and no adapter"
        hint = f"use it, or its run folder, as --model-name-or-path: {model_file} is the trained model"
        raise CheckpointError(problem, hint)
    state = {to_peft_name(name): value for name, value in raw.items()}
    config, notes = _read_or_infer_config(folder, {n: v for n, v in state.items() if is_adapter_name(n)}, flags)
    adapter_names = _select_adapter_names(state, config)
    adapter = {name: value for name, value in state.items() if name in adapter_names}
    for value in adapter.values():
        if isinstance(value, StoredTensor):
            value.check()
    rest = {name: value for name, value in raw.items() if to_peft_name(name) not in adapter_names}
    frozen = _rename_to_base({name: PartitionedTensor.from_tensor(value) for name, value in rest.items()})
    if frozen and has_adapter:
        count = format_count(len(frozen), "tensor")
        notes += (f"the adapter file also contains {count} of the base: {min(frozen)}, …",)
    return CheckpointContents(config, adapter, {}, frozen, notes=notes)


def _build_from_zero(folder: Path, zero: ZeroState, flags: LoraFlags) -> CheckpointContents:
    found = {strip_wrappers(name): value for name, value in zero.trained.items()}
    frozen = dict(zero.frozen)
    if zero.stage == 0:  # one dict has the whole model
        frozen |= {name: value for name, value in found.items() if not is_adapter_name(name)}
        found = {name: value for name, value in found.items() if is_adapter_name(name)}
    gathered = {name: value.to_tensor() for name, value in found.items()}
    for name, value in gathered.items():
        if zero.stage > 0 and value.dtype != "F32":  # DeepSpeed can keep its master weights in bf16
            gathered[name] = Tensor("F32", value.to_float32())
    if not any(map(is_adapter_name, gathered)):
        problem = f"checkpoint: {folder}: is from full fine-tuning: its shards contain no LoRA matrices"
        raise CheckpointError(problem, hint="use DeepSpeed's zero_to_fp32.py to gather a whole model")
    state = {to_peft_name(name): value for name, value in gathered.items() if name.startswith(PEFT_PREFIX)}
    config, notes = _read_or_infer_config(folder, state, flags)
    adapter_names = _select_adapter_names(state, config)
    extra = {name: value for name, value in gathered.items() if to_peft_name(name) not in adapter_names}
    state = add_decoder_rows({name: value for name, value in state.items() if name in adapter_names}, config)
    checkpoint = find_checkpoint_of_shards(folder)
    if (checkpoint / ADAPTER_WEIGHTS_FILE).is_file():
        # the shards of PiSSA and OLoRA lack the subtracted initialization, which the saved adapter includes
        saved = read_adapter(checkpoint)[1]
        state = convert_to_plain_lora(state, extract_initial_matrices(saved, state))
        if (task := read_label_task(checkpoint)) is not None and task.objective == "regress":
            # in the shards, the head is for standardized numbers
            state |= {name: saved[name] for name in state if ".lora_" not in name and name in saved}
    return CheckpointContents(
        config, state, extra, _rename_to_base(frozen), zero.step, zero.world_size, zero.stage, notes
    )


def _select_adapter_names(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> set[str]:
    saved_modules = tuple(config.get("modules_to_save") or ())
    return {
        name
        for name in state
        if ".lora_" in name
        or ".token_adapter." in name
        or (is_inside(name.removeprefix(PEFT_PREFIX), saved_modules) and ".original_module." not in name)
        or (config.get("bias", "none") != "none" and name.endswith(".bias"))
    }


def _read_or_infer_config(
    folder: Path, state: Mapping[str, Tensor], flags: LoraFlags
) -> tuple[dict[str, Any], tuple[str, ...]]:
    source = next((path for path in (folder, folder.parent) if (path / ADAPTER_CONFIG_FILE).is_file()), None)
    if source is not None:
        config = read_adapter_config(source)
        flags.check_against(config, source / ADAPTER_CONFIG_FILE)
        return config, ()
    return infer_adapter_config(state, flags, folder)


def _rename_to_base(frozen: Mapping[str, PartitionedTensor]) -> dict[str, PartitionedTensor]:
    """Rename tensors to the base's names. A tensor with several names, such as T5's embedding, keeps its first name."""
    result: dict[str, PartitionedTensor] = {}
    seen = set()
    for name, value in frozen.items():
        addresses = tuple((array.ctypes.data, len(array)) for array in value.arrays)
        if addresses not in seen or not addresses:
            own = strip_wrappers(name).removeprefix(PEFT_PREFIX)
            result[re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", own)] = value
        seen.add(addresses)
    return result


def _read_step_and_world_size(folder: Path) -> tuple[int | None, int]:
    """Read the step and the number of ranks from the manifest or Trainer's state file.

    Without these files, as in an adapter's folder, or if they are broken, the step isn't known.
    """
    for name, key in ((CHECKPOINT_MANIFEST_FILE, "step"), (TRAINER_STATE_FILE, "global_step")):
        with suppress(CheckpointError, OSError, ValueError, KeyError, TypeError, OverflowError):
            values = read_json_object(folder, name)
            return int(values[key]), int(values.get("world_size", 1))
    return None, 1
