"""`t5tune export`: a training checkpoint of any number of ranks -> an adapter folder.

    result = export(ExportSettings(checkpoint="run", output_dir="adapter"))
    result.adapter

Reads DeepSpeed's shards in one process, without DeepSpeed, torch or pickles.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.progress import Note, Report, silent
from t5tune.publish import published_folder
from t5tune.settings import ExportSettings, dump_settings
from t5tune.settings.base_model import BaseModelSettings
from t5tune.training.checkpoint import MANIFEST, checkpoints, newest, verify
from t5tune.weights.adapter import (
    CONFIG,
    OLD_WEIGHTS,
    PREFIX,
    TEMPLATE,
    WEIGHTS,
    TrainedWith,
    check_adapter,
    read_adapter,
    read_adapter_config,
    saved_name,
    starts_in,
    with_copies,
    without_start,
    write_adapter,
)
from t5tune.weights.base import find_base
from t5tune.weights.model_folder import MODEL
from t5tune.weights.output import check_replaceable
from t5tune.weights.streaming import Checkpoint, total_bytes
from t5tune.weights.tensors import Tensor
from t5tune.weights.zero import find_deepspeed_folder, read_zero


@dataclass(frozen=True)
class Exported:
    """What export made. `zero_stage` is None for a checkpoint that DeepSpeed didn't write."""

    adapter: Path
    step: int
    zero_stage: int | None
    world_size: int
    lora_tensors: int
    non_lora_tensors: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Gathered:
    config: dict[str, Any]
    state: dict[str, Tensor]
    frozen: dict[str, Tensor]
    step: int
    stage: int | None
    world_size: int


def export(settings: ExportSettings, report: Report = silent) -> Exported:
    """Write the checkpoint's adapter to `output_dir`.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or an adapter that is empty, not finite or untrained.
    """
    started = time.monotonic()
    check_replaceable(settings.output_dir, settings.overwrite)
    folder = _find(settings.checkpoint, report)
    gathered = _gather(folder)
    check_adapter(gathered.state, gathered.config, folder)
    non_lora: dict[str, Tensor] | None = {}
    if settings.non_lora_state == "none":
        non_lora = None
    elif settings.non_lora_state == "full":
        non_lora = _base_state(settings, gathered)
    trained_with = TrainedWith(gathered.config, folder, folder / TEMPLATE)
    with published_folder(settings.output_dir) as staged:
        write_adapter(staged, gathered.state, trained_with, non_lora)
        if settings.format == "bin":
            _write_bin(staged / OLD_WEIGHTS, gathered.state)
        (staged / "settings.yaml").write_text(dump_settings(settings), encoding="utf-8")
        size = total_bytes(path for path in staged.iterdir())
    lora = sum(".lora_" in name for name in gathered.state)
    extra = len(gathered.state) - lora + len(non_lora or {}) if non_lora is not None else 0
    report(Note(f"{lora} LoRA tensors of step {gathered.step}, gathered from {gathered.world_size} rank(s)"))
    return Exported(
        adapter=settings.output_dir,
        step=gathered.step,
        zero_stage=gathered.stage,
        world_size=gathered.world_size,
        lora_tensors=lora,
        non_lora_tensors=extra,
        bytes=size,
        seconds=round(time.monotonic() - started, 3),
    )


def _find(path: Path, report: Report) -> Path:
    """The checkpoint-N or DeepSpeed folder that `path` means; its seal is checked where it has one."""
    if not path.exists():
        raise CheckpointError(f"checkpoint: {path}: no such folder", hint="check the path's spelling")
    if not path.is_dir():
        raise CheckpointError(f"checkpoint: {path}: a file; expected a run folder or a checkpoint-N in it")
    if checkpoints(path):
        found, damaged = newest(path)
        for problem in damaged:
            report(Note(f"passed over a damaged checkpoint: {problem}", warning=True))
        if found is None:
            raise CheckpointError(f"checkpoint: {path}: none of its checkpoints is whole: {damaged[0]}")
        return found
    if find_deepspeed_folder(path) == path and find_deepspeed_folder(path.parent) == path:
        path = path.parent  # the shards alone were named: the seal and the config stand beside them
    if (path / MANIFEST).is_file():
        if damage := verify(path):
            raise CheckpointError(f"checkpoint: {damage}", hint="take an earlier checkpoint of the run")
        return path
    if find_deepspeed_folder(path) is None and not (path / CONFIG).is_file():
        raise CheckpointError(
            f"checkpoint: {path}: no checkpoint in it",
            hint="name a run folder, a checkpoint-N in it, or a folder that DeepSpeed wrote",
        )
    return path


def _gather(folder: Path) -> _Gathered:
    """The adapter's tensors, from the shards where DeepSpeed wrote them in fp32, else from its own file."""
    shards = find_deepspeed_folder(folder)
    zero = read_zero(shards) if shards is not None else None
    if (folder / MODEL).is_file() and (folder / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint: {folder}: of full training, it holds the whole model and no adapter",
            hint=f"give it, or its run, as --model-name-or-path: {MODEL} is what was trained",
        )
    config_folder = folder if (folder / CONFIG).is_file() else folder.parent
    if zero is not None and (zero.stage > 0 or not (folder / WEIGHTS).is_file()):
        config = read_adapter_config(config_folder)
        state = {saved_name(name): value for name, value in zero.trained.items()}
        state = with_copies({name: state[name] for name in state if name.startswith(PREFIX)}, config)
        if (folder / WEIGHTS).is_file():
            state = without_start(state, starts_in(read_adapter(folder)[1], state))
        return _Gathered(config, state, zero.frozen, zero.step, zero.stage, zero.world_size)
    config, state = read_adapter(folder)
    step, world_size = _sealed_facts(folder)
    if zero is not None:
        step, world_size = zero.step, zero.world_size
    return _Gathered(config, state, {}, step, zero.stage if zero else None, world_size)


def _sealed_facts(folder: Path) -> tuple[int, int]:
    """(step, world size) by the seal, or by the Trainer's own state file."""
    for name, key in ((MANIFEST, "step"), ("trainer_state.json", "global_step")):
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            return int(values[key]), int(values.get("world_size", 1))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 0, 1


def _base_state(settings: ExportSettings, gathered: _Gathered) -> dict[str, Tensor]:
    """The base's tensors by their own names: from the checkpoint where it holds them, else from the base."""
    if gathered.frozen:
        return {_base_name(key): value for key, value in gathered.frozen.items()}
    base_name = settings.model_name_or_path or gathered.config.get("base_model_name_or_path")
    if not base_name:
        raise CheckpointError(
            f"{settings.checkpoint}: holds no frozen weights and doesn't say which base it was trained on",
            hint="give --model-name-or-path",
        )
    named = BaseModelSettings(model_name_or_path=base_name, revision=settings.revision, cache_dir=settings.cache_dir)
    base = Checkpoint(find_base(named))
    return {name: base.tensor(name) for name in base.names()}


def _base_name(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".token_adapter.", ".")


def _write_bin(path: Path, state: Mapping[str, Tensor]) -> None:
    """The seed's adapter_model.bin, which torch writes."""
    import torch

    torch.save({name: torch.from_numpy(value.to_float32().copy()) for name, value in state.items()}, path)
