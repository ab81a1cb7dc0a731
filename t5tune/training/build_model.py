"""Build the model to train (adapters, packing, ZeRO-3 sharding) and the function that saves it.

built = build_model(settings, base, base_metadata, cache, deepspeed, device, report)
built.weights.write(folder, trained_tensors)    # the files of an adapter, or with train_mode full of a checkpoint
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t5tune.checkpoints.adapter import AdapterMetadata, convert_config_to_plain_lora, write_adapter
from t5tune.checkpoints.model_card import format_data_line, format_settings_line
from t5tune.checkpoints.model_folder import write_model
from t5tune.checkpoints.tensors import Tensor
from t5tune.data.cache import Cache
from t5tune.errors import SettingsError
from t5tune.file_names import ADAPTER_WEIGHTS_FILE, MODEL_FILE, TEMPLATE_FILE
from t5tune.model.attention import can_pack, switch_off_attention_dropout, use_packing
from t5tune.model.fused import compile_layers, use_fused_layers
from t5tune.model.load import count_parameters, load_base
from t5tune.model.lora import add_lora, load_initial_adapter
from t5tune.model.loss import TargetLoss, read_head_weights
from t5tune.progress import Note, Report
from t5tune.settings import TrainSettings
from t5tune.settings.packaged_templates import get_zero_stage
from t5tune.training.trained_weights import TrainedWeights


@dataclass(frozen=True)
class BuiltModel:
    """A model that is ready to train.

    Args:
        is_packed: whether the model takes packed batches.
        weights: how its trained tensors are saved.
        trainable: number of trainable parameters.
        total: number of all parameters.
    """

    model: Any
    is_packed: bool
    weights: TrainedWeights
    trainable: int
    total: int


def build_model(
    settings: TrainSettings,
    base: Path,
    base_metadata: dict[str, Any],
    cache: Cache,
    deepspeed: dict[str, Any] | None,
    device: torch.device,
    report: Report,
) -> BuiltModel:
    """Load the base, add the adapters, and under ZeRO-3 shard the parameters among the ranks.

    Args:
        base_metadata: what identifies the base, for the adapter's metadata.

    Raises:
        ModelError: the base is broken, or can't be trained with these settings.
        SettingsError: packing is required, but this model doesn't support it.
    """
    is_full, is_sharded = settings.train_mode == "full", get_zero_stage(deepspeed) == 3
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    # DeepSpeed keeps fp32 master copies of trained bf16 weights; without it, these weights themselves must be fp32
    trained_dtype = dtype if deepspeed is not None else torch.float32
    # a model for ZeRO-3 may not fit on one GPU: it is loaded on the CPU, and moved and sharded parameter by parameter
    place = torch.device("cpu") if is_sharded and not settings.q_lora else device
    model = load_base(base, trained_dtype if is_full else dtype, place, settings, settings.family, report)
    subtracted: dict[str, Tensor] = {}
    if is_full:
        model.requires_grad_(True)
    else:
        model, subtracted = add_lora(model, base, settings, list(cache.manifest["added_token_ids"]), trained_dtype)
    if settings.adapter is not None:
        load_initial_adapter(model, settings.adapter, cache.tokenizer_folder)
    is_packed = _enable_packing(settings, model, report)
    if not settings.attention_dropout:
        switch_off_attention_dropout(model)
    if settings.torch_compile:
        compile_layers(model)
        report(Note("norms and feed-forward layers are compiled; the first steps take seconds to minutes longer"))
    else:
        use_fused_layers(model, device, report)
    trainable, total = count_parameters(model)
    if settings.gradient_checkpointing or is_sharded:
        # ZeRO-3 frees a block's weights once its inputs that require gradients have them, so its first input must be
        # among these: otherwise the gradient for the encoder's output would free a decoder block in use
        model.enable_input_require_grads()
    if deepspeed is not None and is_sharded:
        _shard_parameters(model, deepspeed, dtype)
    weights = _make_trained_weights(settings, base, base_metadata, cache, model, subtracted)
    return BuiltModel(model, is_packed, weights, trainable, total)


def _enable_packing(settings: TrainSettings, model: Any, report: Report) -> bool:
    """Enable packing if the settings want it and the model supports it. Return whether it is enabled.

    Raises:
        SettingsError: packing is required, but this model doesn't support it.
    """
    if settings.packing == "off":
        return False
    if not can_pack(model):
        reason = f"packing: {settings.packing}: the attention of {model.config.model_type} doesn't support packing"
        if settings.packing == "on" or settings.packed_attention == "flex":
            raise SettingsError(reason, hint="leave out packing and packed_attention to use padded batches")
        report(Note(f"{reason}; using padded batches"))
        return False
    use_packing(model)
    return True


def _shard_parameters(model: Any, configuration: dict[str, Any], dtype: Any) -> None:
    """Shard every parameter among the ranks for ZeRO-3.

    Sharding in `from_pretrained`, as transformers does with DeepSpeed, replaces Flan-T5's untied head with its
    embedding. Here the model has already been loaded correctly, and its parameters are sharded one by one.
    """
    import deepspeed

    zero = {k: v for k, v in configuration["zero_optimization"].items() if v != "auto"}
    # By default DeepSpeed permanently replaces torch.nn.functional.linear in this process with a function that keeps
    # the input of every frozen layer for the backward pass. Only the config can turn this off: in 0.19, the argument of
    # Init with the same name has no effect.
    zero.setdefault("memory_efficient_linear", False)
    deepspeed.zero.Init(
        module=model,
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero},
        dtype=dtype,
    )
    # Gather a block's weights at once: DeepSpeed would otherwise run hooks in Python for each of PEFT's small modules.
    blocks = {type(module) for module in model.modules() if type(module).__name__.endswith("T5Block")}
    deepspeed.utils.set_z3_leaf_modules(model, sorted(blocks, key=str))
    _register_external_parameters(model)


def _register_external_parameters(model: Any) -> None:
    """Make ZeRO-3 gather parameters that are used outside of the forward pass of the module that owns them."""
    import deepspeed

    head = read_head_weights(model.get_output_embeddings())
    for module in model.modules():
        if isinstance(module, TargetLoss) and head is not None:
            deepspeed.zero.register_external_parameter(module, head.weight_VD)
            if head.rows_KD is not None:
                deepspeed.zero.register_external_parameter(module, head.rows_KD)
        # the ParameterDict with the embedding rows of added tokens has no forward, so ZeRO-3 has no hook to gather them
        rows = getattr(module, "trainable_tokens_delta", None)
        if isinstance(rows, nn.ParameterDict):
            for row in rows.values():
                deepspeed.zero.register_external_parameter(module, row)
        # DoRA's module owns only the magnitudes, but its forward reads the weights of three other modules
        for name, norms in getattr(module, "lora_magnitude_vector", {}).items():
            for read in (module.get_base_layer(), module.lora_A[name], module.lora_B[name]):
                deepspeed.zero.register_external_parameter(norms, read.weight)


def _make_trained_weights(
    settings: TrainSettings,
    base: Path,
    base_metadata: dict[str, Any],
    cache: Cache,
    model: Any,
    subtracted: dict[str, Tensor],
) -> TrainedWeights:
    files = cache.tokenizer_folder, cache.folder / TEMPLATE_FILE
    if settings.train_mode == "full":
        tied = bool(model.config.tie_word_embeddings)
        write = partial(write_model, base=base, tied=tied, metadata=AdapterMetadata({}, *files), family=settings.family)
        return TrainedWeights(MODEL_FILE, write, subtracted)
    config = _make_adapter_config(model, settings, bool(subtracted))
    training = format_data_line(cache.manifest) + format_settings_line(settings.model_dump())
    metadata = AdapterMetadata(config, *files, base_metadata, training)
    write = partial(write_adapter, metadata=metadata, with_non_lora_state=True)
    return TrainedWeights(ADAPTER_WEIGHTS_FILE, write, subtracted)


def _make_adapter_config(model: Any, settings: TrainSettings, is_converted_to_plain_lora: bool) -> dict[str, Any]:
    """Make the content of adapter_config.json as PEFT writes it, with sets in a fixed order."""
    config = model.peft_config["default"].to_dict()
    if is_converted_to_plain_lora:
        config = convert_config_to_plain_lora(config)
    config["base_model_name_or_path"] = settings.model_name_or_path
    config["revision"] = settings.revision
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    for key in ("peft_type", "task_type"):
        plain[key] = getattr(plain[key], "value", plain[key])
    return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]
