"""The model that trains: a base with adapters, ready to pack or in shards, and how what it learned is written.

built = build(settings, base, facts, cache, deepspeed, device, report)
built.write(folder, trained_tensors)    # an adapter folder's files, or with train_mode full a checkpoint's
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t5tune.checkpoints.adapter import TEMPLATE, WEIGHTS, TrainedWith, config_without_start, write_adapter
from t5tune.checkpoints.model_card import data_line, settings_line
from t5tune.checkpoints.model_folder import MODEL, write_model
from t5tune.checkpoints.tensors import Tensor
from t5tune.data.cache import Cache
from t5tune.errors import SettingsError
from t5tune.model.attention import can_pack, use_packing
from t5tune.model.fused import use_compiled, use_fused
from t5tune.model.load import count_parameters, load_base
from t5tune.model.lora import add_lora, start_from
from t5tune.progress import Note, Report
from t5tune.settings import TrainSettings
from t5tune.training.arguments import stage_of


@dataclass(frozen=True)
class Built:
    """A model that is ready to train.

    Args:
        packs: it takes packed rows.
        taken_out: LoRA matrices that were taken out of the base's weights (see weights.adapter.without_start).
        trainable: number of parameters that train, of `total`.
        write: puts the trained tensors, and what belongs to them, into a folder.
        weights_file: the file in it that `write` puts the tensors into.
    """

    model: Any
    packs: bool
    taken_out: dict[str, Tensor]
    trainable: int
    total: int
    write: Callable[[Path, dict[str, Tensor]], None]
    weights_file: str


def build(
    settings: TrainSettings,
    base: Path,
    facts: dict[str, Any],
    cache: Cache,
    deepspeed: dict[str, Any] | None,
    device: torch.device,
    report: Report,
) -> Built:
    """Load the base, attach what trains, and under ZeRO-3 give each rank its part.

    Args:
        facts: what tells this base from others, for the adapter's file.

    Raises:
        ModelError: the base is broken or can't be trained so.
        SettingsError: packing is asked for and can't be had.
    """
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    # DeepSpeed keeps fp32 masters of bf16 adapters itself; alone, the adapters are their own masters
    adapter_dtype = dtype if deepspeed is not None else torch.float32
    sharded = stage_of(deepspeed) == 3
    # what ZeRO-3 will shard need not fit one GPU: it is loaded on the CPU, and goes over a parameter at a time
    place = torch.device("cpu") if sharded and not settings.q_lora else device
    # what trains in place without DeepSpeed is its own master too
    is_full = settings.train_mode == "full"
    model = load_base(base, adapter_dtype if is_full else dtype, place, settings, settings.family, report)
    tied = bool(model.config.tie_word_embeddings)
    taken_out: dict[str, Tensor] = {}
    if is_full:
        model.requires_grad_(True)
    else:
        model, taken_out = add_lora(model, base, settings, list(cache.manifest["added_token_ids"]), adapter_dtype)
    if settings.adapter is not None:
        start_from(model, settings.adapter, cache.tokenizer_folder)
    packs = _packs(settings, model, report)
    if settings.torch_compile:
        use_compiled(model)
        report(Note("norms and feed-forward layers are compiled: the first steps take seconds to minutes longer"))
    else:
        use_fused(model)
    trainable, total = count_parameters(model)
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    if deepspeed is not None and sharded:
        _shard(model, deepspeed, dtype)
    trained_with = TrainedWith(
        {} if is_full else _adapter_config(model, settings, bool(taken_out)),
        cache.tokenizer_folder,
        cache.folder / TEMPLATE,
        {} if is_full else facts,
        data_line(cache.manifest) + settings_line(settings.model_dump()),
    )

    def write(folder: Path, state: dict[str, Tensor]) -> None:
        if is_full:
            write_model(folder, state, base, tied, trained_with, settings.family)
        else:
            write_adapter(folder, state, trained_with, non_lora={})

    return Built(model, packs, taken_out, trainable, total, write, MODEL if is_full else WEIGHTS)


def _packs(settings: TrainSettings, model: Any, report: Report) -> bool:
    """Make the model pack, where it is to and can.

    Raises:
        SettingsError: it is to and can't.
    """
    if settings.packing == "off":
        return False
    if not can_pack(model):
        reason = f"packing: the attention of {model.config.model_type} can't go through packed rows"
        if settings.packing == "on":
            raise SettingsError(reason, hint="leave it at auto, or say off: batches are padded then")
        report(Note(f"{reason}; batches are padded"))
        return False
    use_packing(model)
    return True


def _shard(model: Any, configuration: dict[str, Any], dtype: Any) -> None:
    """Give each rank its part of every parameter, as ZeRO-3 keeps them.

    DeepSpeed's way, inside `from_pretrained`, replaces Flan-T5's untied head by its embedding. Here the
    model has been loaded right, and its parameters are sharded one by one.
    """
    import deepspeed

    zero = {k: v for k, v in configuration["zero_optimization"].items() if v != "auto"}
    # By default DeepSpeed replaces torch.nn.functional.linear, for this process and for good, by one that keeps the
    # input of every frozen layer for the backward. It reads this from the configuration alone: in 0.19 the argument
    # of Init that is named like it has no effect.
    zero.setdefault("memory_efficient_linear", False)
    deepspeed.zero.Init(
        module=model,
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero},
        dtype=dtype,
    )
    for module in model.modules():
        # no module's forward owns the rows' container, so no hook would gather them without this
        rows = getattr(module, "trainable_tokens_delta", None)
        if isinstance(rows, nn.ParameterDict):
            for row in rows.values():
                deepspeed.zero.register_external_parameter(module, row)
        # DoRA's module owns the norms alone, and reads the weights of three others
        for name, norms in getattr(module, "lora_magnitude_vector", {}).items():
            for read in (module.get_base_layer(), module.lora_A[name], module.lora_B[name]):
                deepspeed.zero.register_external_parameter(norms, read.weight)


def _adapter_config(model: Any, settings: TrainSettings, without_start: bool) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it, in a fixed order."""
    config = model.peft_config["default"].to_dict()
    if without_start:
        config = config_without_start(config)
    config["base_model_name_or_path"] = settings.model_name_or_path
    config["revision"] = settings.revision
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    for key in ("peft_type", "task_type"):
        plain[key] = getattr(plain[key], "value", plain[key])
    return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]
