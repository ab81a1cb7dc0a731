"""What a training checkpoint of any kind trained, by PEFT's names: DeepSpeed's shards, Trainer's own files, FastChat's.

trained = read_trained(Path("run/checkpoint-300"), OldLora())
trained.adapter["base_model.model.….q.lora_A.weight"]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import (
    OLD_WEIGHTS,
    PREFIX,
    WEIGHTS,
    read_adapter,
    read_adapter_tensors,
    saved_name,
    starts_in,
    with_copies,
    without_start,
)
from t5tune.checkpoints.adapter_config import CONFIG, read_adapter_config
from t5tune.checkpoints.fastchat import OldLora, found_config, is_adapter_name, plain_name
from t5tune.checkpoints.model_folder import MODEL
from t5tune.checkpoints.partitioned_tensor import Pieces
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.checkpoints.torch_format.file import StoredTensor
from t5tune.checkpoints.zero_shards import ZeroState, find_deepspeed_folder, read_zero
from t5tune.errors import CheckpointError
from t5tune.io.untrusted import check_all_inside, read_object

MANIFEST = "t5tune_manifest.json"
MODEL_FILES = (MODEL, f"{MODEL}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Trained:
    """The adapter's config and tensors, and what else is in the checkpoint.

    `beside`: tensors that were trained and that PEFT's config has no place for. `frozen`: weights of the base, by the
    base's names. `stage` is None where DeepSpeed didn't write it. `notes` are for the user.
    """

    config: dict[str, Any]
    adapter: dict[str, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Pieces] = field(default_factory=dict)
    step: int = 0
    world_size: int = 1
    stage: int | None = None
    notes: tuple[str, ...] = ()


def read_trained(folder: Path, old: OldLora, with_frozen: bool = False) -> Trained:
    """Read a checkpoint; the fp32 weights of DeepSpeed's shards come before Trainer's roundings of them.

    Args:
        old: what the user says of an adapter that has no adapter_config.json.
        with_frozen: whether the weights of the base are wanted too.

    Raises:
        CheckpointError: it holds no adapter, or is broken.
    """
    check_all_inside(folder)
    shards = find_deepspeed_folder(folder)
    zero = read_zero(shards, with_frozen) if shards is not None else None
    has_adapter = (folder / WEIGHTS).is_file() or (folder / OLD_WEIGHTS).is_file()
    model_file = next((name for name in MODEL_FILES if (folder / name).is_file()), None)
    if zero is not None and (zero.stage > 0 or not has_adapter):
        return _of_zero(folder, zero, old)
    if not has_adapter and model_file is None:
        raise CheckpointError(
            f"adapter: {folder}: no {WEIGHTS} in it", hint="a run folder has one when its run is over"
        )
    raw = {plain_name(name): value for name, value in _read_files(folder, has_adapter).items()}
    if not any(map(is_adapter_name, raw)):
        raise CheckpointError(
            f"checkpoint: {folder}: of full training, it holds the whole model and no adapter",
            hint=f"give it, or its run, as --model-name-or-path: {model_file} is what was trained",
        )
    state = {saved_name(name): value for name, value in raw.items()}
    config, notes = _config(folder, {n: v for n, v in state.items() if is_adapter_name(n)}, old)
    placed = _placed(state, config)
    adapter = {name: value for name, value in state.items() if name in placed}
    for value in adapter.values():
        if isinstance(value, StoredTensor):
            value.check()
    others = _of_base({name: Pieces.of(value) for name, value in raw.items() if saved_name(name) not in placed})
    if others and has_adapter:
        notes += (
            f"{len(others)} tensors of the base in its adapter file are no part of the adapter: {min(others)}, …",
        )
    if zero is None:
        return Trained(config, adapter, {}, others, *_facts(folder), notes=notes)
    if {value.dtype for value in adapter.values()} != {"F32"}:
        notes += ("DeepSpeed's stage 0 keeps no fp32 weights that can be told apart: these are its roundings",)
    return Trained(config, adapter, {}, _of_base(zero.frozen), zero.step, zero.world_size, zero.stage, notes)


def _of_zero(folder: Path, zero: ZeroState, old: OldLora) -> Trained:
    found = {plain_name(name): value for name, value in zero.trained.items()}
    frozen = dict(zero.frozen)
    if zero.stage == 0:  # the whole model in one dict
        frozen |= {name: value for name, value in found.items() if not is_adapter_name(name)}
        found = {name: value for name, value in found.items() if is_adapter_name(name)}
    gathered = {name: value.tensor() for name, value in found.items()}
    for name, value in gathered.items():
        if zero.stage > 0 and value.dtype != "F32":  # DeepSpeed can keep its masters in bf16
            gathered[name] = Tensor("F32", value.to_float32())
    if not any(map(is_adapter_name, gathered)):
        raise CheckpointError(
            f"checkpoint: {folder}: of full training, its shards hold no LoRA matrix",
            hint="deepspeed's zero_to_fp32.py gathers a whole model",
        )
    state = {saved_name(name): value for name, value in gathered.items() if name.startswith(PREFIX)}
    config, notes = _config(folder, state, old)
    placed = _placed(state, config)
    beside = {name: value for name, value in gathered.items() if saved_name(name) not in placed}
    state = with_copies({name: value for name, value in state.items() if name in placed}, config)
    if (folder / WEIGHTS).is_file():
        state = without_start(state, starts_in(read_adapter(folder)[1], state))
    return Trained(config, state, beside, _of_base(frozen), zero.step, zero.world_size, zero.stage, notes)


def _placed(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> set[str]:
    """The names that PEFT's file has a place for."""
    whole = tuple(f".{name}" for name in config.get("modules_to_save") or ())
    return {
        name
        for name in state
        if ".lora_" in name
        or ".token_adapter." in name
        or f".{name.removeprefix(PREFIX)}".rpartition(".")[0].endswith(whole)
        or (config.get("bias", "none") != "none" and name.endswith(".bias"))
    }


def _config(folder: Path, state: Mapping[str, Tensor], old: OldLora) -> tuple[dict[str, Any], tuple[str, ...]]:
    """adapter_config.json, or what can be known of it where there is none."""
    place = next((place for place in (folder, folder.parent) if (place / CONFIG).is_file()), None)
    if place is not None:
        config = read_adapter_config(place)
        old.check_against(config, place / CONFIG)
        return config, ()
    return found_config(state, old, folder)


def _read_files(folder: Path, has_adapter: bool) -> dict[str, Tensor]:
    if has_adapter:
        return dict(read_adapter_tensors(folder))
    model = Checkpoint(folder)
    return {name: model.tensor(name) for name in model.names()}


def _of_base(frozen: Mapping[str, Pieces]) -> dict[str, Pieces]:
    """By the base's names; of a tensor that several names share, as T5's embedding, the first."""
    result: dict[str, Pieces] = {}
    seen = set()
    for name, value in frozen.items():
        places = tuple((array.ctypes.data, len(array)) for array in value.arrays)
        if places not in seen or not places:
            result[_base_name(plain_name(name))] = value
        seen.add(places)
    return result


def _base_name(name: str) -> str:
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    return name.replace(".token_adapter.", ".")


def _facts(folder: Path) -> tuple[int, int]:
    """(step, world size) by the seal, or by the Trainer's own state file."""
    for name, key in ((MANIFEST, "step"), ("trainer_state.json", "global_step")):
        try:
            values = read_object(folder, name)
            return int(values[key]), int(values.get("world_size", 1))
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, OverflowError):
            continue
    return 0, 1
