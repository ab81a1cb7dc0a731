"""The tensors that a run trains: gathered in fp32 for a checkpoint, and loaded from it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._utils import _unflatten_dense_tensors

from t5tune.checkpoints.adapter import convert_to_plain_lora, to_peft_name
from t5tune.checkpoints.tensor_files.safetensors import SafetensorsFile
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.errors import CheckpointError


@dataclass(frozen=True)
class TrainedWeights:
    """How a run's trained tensors are saved.

    Args:
        file: name of the file in a checkpoint that contains the tensors.
        write_files: writes the tensors and their accompanying files to a folder.
        subtracted: initial LoRA matrices that were subtracted from the base weights (PiSSA and OLoRA).
        file_names: name in the model -> name in the file, where they differ.
        scales: saved name -> factor of its values in the file: a head that learns standardized numbers is saved for the
            user's numbers. The factors are powers of two, so resuming reads the same bits.
    """

    file: str
    write_files: Callable[[Path, dict[str, Tensor]], None]
    subtracted: dict[str, Tensor]
    file_names: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    def write(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write the tensors that `collect` returned."""
        folder.mkdir(parents=True, exist_ok=True)
        scaled = {name: Tensor("F32", state[name].array * np.float32(scale)) for name, scale in self.scales.items()}
        tensors = convert_to_plain_lora(state | scaled, self.subtracted)
        self.write_files(folder, {self.file_names.get(name, name): tensor for name, tensor in tensors.items()})

    def collect(self, model: Any, engine: Any, keeps: bool) -> dict[str, Tensor]:
        """Collect every trained tensor by its saved name, in fp32: under DeepSpeed, the optimizer's master copies.

        Call on every rank, because ZeRO gathers them from all ranks. Tensors in the machine's memory aren't copied, so
        write them before the next step.

        Args:
            engine: DeepSpeed's engine, or without DeepSpeed whatever wraps the model.
            keeps: whether this rank writes the tensors. Otherwise it drops each tensor once gathered, since the copies
                of all ranks may not fit into a machine's memory.
        """
        masters = _map_stage_0_masters(engine)
        state = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                values = masters.get(id(parameter), _gather_fp32_master(parameter))
                if keeps:
                    state[to_peft_name(name)] = Tensor("F32", values.detach().float().cpu().contiguous().numpy())
        return state

    def load(self, folder: Path, model: Any) -> None:
        """Set every trained parameter to its value in a checkpoint."""
        file = SafetensorsFile(folder / self.file)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                saved_name = self.file_names.get(name, to_peft_name(name))
                # with PiSSA and OLoRA, the subtracted matrices are appended to the saved ones: take only the first part
                shape = list(parameter.shape)
                if saved_name in self.subtracted:
                    shape[0 if ".lora_A." in saved_name else 1] *= 2
                saved = list(file.entries[saved_name].shape) if saved_name in file.entries else None
                if saved != shape:
                    found = "isn't in it" if saved is None else f"shape {saved}, but {shape} in this run"
                    hint = "resume with the base and the settings that the run was started with"
                    raise CheckpointError(f"{folder / self.file}: {saved_name}: {found}", hint=hint)
                values = torch.from_numpy(file.get_tensor(saved_name).to_float32() / self.scales.get(saved_name, 1))
                parameter.data.copy_(values[tuple(slice(size) for size in parameter.shape)])


def _gather_fp32_master(parameter: Any) -> torch.Tensor:
    """Gather the fp32 master copy that DeepSpeed's optimizer updates; without DeepSpeed, return the parameter."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        values = safe_get_full_fp32_param(parameter)
        if values is not None:
            return values.reshape(getattr(parameter, "ds_shape", parameter.shape))  # type: ignore[no-any-return]
    return parameter  # type: ignore[no-any-return]


def _map_stage_0_masters(engine: Any) -> dict[int, torch.Tensor]:
    """Map the id of each bf16 parameter to its fp32 master copy in DeepSpeed's stage 0, which keeps lists of them.

    With a fused optimizer in DeepSpeed's config, the masters of a group are one flat tensor.
    """
    optimizer = getattr(engine, "optimizer", None)
    groups = getattr(optimizer, "fp16_groups", [])
    masters = getattr(optimizer, "fp32_groups", None)
    if masters is None:
        flat = getattr(optimizer, "fp32_groups_flat", [])
        unflatten: Any = _unflatten_dense_tensors
        masters = [unflatten(each, group) for each, group in zip(flat, groups, strict=False)]
    return {
        id(parameter): master
        for group, masters_of_group in zip(groups, masters, strict=False)
        for parameter, master in zip(group, masters_of_group, strict=True)
    }


def drop_frozen(model: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Remove frozen weights from a state dict, under all of their names (a state-dict hook of torch).

    DeepSpeed leaves frozen weights out of a checkpoint only under their first names; T5's embedding has three.
    """
    trained = {name for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}
    for name in list(state):
        if name.startswith(prefix) and name.removeprefix(prefix) not in trained:
            del state[name]
