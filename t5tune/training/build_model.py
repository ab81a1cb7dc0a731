"""Build the model to train (adapters, packing, ZeRO-3 sharding) and the function that saves it.

built = build_model(run_plan.model, loaded, settings, device, report)
built.weights.write(folder, trained_tensors)    # an adapter's files, or a whole checkpoint's
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from t5tune.checkpoints.adapter import (
    PEFT_PREFIX,
    AdapterMetadata,
    convert_config_to_plain_lora,
    is_inside,
    read_base_metadata,
    write_adapter,
)
from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import is_trained_base
from t5tune.checkpoints.model_card import format_data_line, format_settings_line
from t5tune.checkpoints.model_folder import write_model
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.errors import SettingsError
from t5tune.file_names import ADAPTER_WEIGHTS_FILE, MODEL_FILE
from t5tune.model.attention.packing import can_pack, switch_off_attention_dropout, switch_off_dropout, use_packing
from t5tune.model.kernels.fused import compile_layers, use_fused_layers
from t5tune.model.labels import NOT_SCALED, LabelScale
from t5tune.model.load import count_parameters, load_base
from t5tune.model.lora import add_lora, load_initial_adapter
from t5tune.model.zero3 import Zero3Partitioner
from t5tune.progress import Note, Report
from t5tune.runs.plan import ModelPlan
from t5tune.settings.groups.layers import LayerSettings
from t5tune.settings.groups.lora import LoraSettings
from t5tune.settings.packaged_templates import get_zero_stage
from t5tune.training.session import LoadedData
from t5tune.training.trained_weights import TrainedWeights


@dataclass(frozen=True)
class BuiltModel:
    """A model that is ready to train.

    Args:
        is_packed: whether the model takes packed batches.
        trainable, total: numbers of parameters.
        partitioner: under ZeRO-3, partitioned the parameters.
    """

    model: Any
    is_packed: bool
    weights: TrainedWeights
    trainable: int
    total: int
    partitioner: Zero3Partitioner | None


def build_model(
    plan: ModelPlan, loaded: LoadedData, settings: Mapping[str, Any], device: torch.device, report: Report
) -> BuiltModel:
    """Load the base, add the adapters, and under ZeRO-3 partition the parameters. The card shows `settings`."""
    base, family, layers, deepspeed = loaded.base, plan.base.family, plan.layers, loaded.deepspeed
    dtype = torch.bfloat16 if plan.precision.bf16 else torch.float32
    # DeepSpeed keeps fp32 master copies of trained bf16 weights; without it, these weights themselves must be fp32
    trained_dtype = dtype if deepspeed is not None else torch.float32
    partitioner = Zero3Partitioner(deepspeed, dtype) if deepspeed and get_zero_stage(deepspeed) == 3 else None
    model_dtype = trained_dtype if plan.adapter is None else dtype
    task, scale = loaded.examples.label_task, _choose_label_scale(loaded)
    model = load_base(base, model_dtype, device, plan.precision.quantization, family, report, partitioner, task, scale)
    subtracted: dict[str, Tensor] = {}
    if plan.adapter is None:
        model.requires_grad_(True)
    else:
        token_ids = list(loaded.examples.manifest["added_token_ids"])
        model, subtracted = add_lora(model, base, plan.adapter, token_ids, trained_dtype, partitioner)
        if plan.adapter.adapter is not None:
            adapter = find_adapter(plan.adapter.adapter, plan.base.cache_dir)
            load_initial_adapter(model, adapter, loaded.examples.tokenizer_folder, scale)
            metadata = read_base_metadata(adapter)
            if not is_trained_base(metadata, open_base(base, family)):
                report(Note(f"adapter: {adapter}: trained on a different base ({metadata.get('base')})", warning=True))
    is_packed = _enable_packing(layers, model, report)
    if not layers.has_dropout:
        switch_off_dropout(model)
    if not layers.has_attention_dropout:
        switch_off_attention_dropout(model)
    if layers.torch_compile:
        compile_layers(model)
        report(Note("norms and feed-forward layers are compiled; the first steps take seconds to minutes longer"))
    else:
        use_fused_layers(model, device, report)
    trainable, total = count_parameters(model)
    if layers.gradient_checkpointing or partitioner is not None:
        # ZeRO-3 frees a block's weights once its inputs that require gradients have them, so its first input must be
        # among these: otherwise the gradient for the encoder's output would free a decoder block in use
        model.enable_input_require_grads()
    if partitioner is not None:
        partitioner.partition_model(model)
    weights = _make_trained_weights(plan, loaded, settings, model, subtracted, scale)
    return BuiltModel(model, is_packed, weights, trainable, total, partitioner)


def will_train_position_bias(model: Any, adapter: LoraSettings | None) -> bool:
    """Whether training with this adapter trains the position bias of a base like `model`."""
    saved = tuple(adapter.modules_to_save or ()) if adapter is not None else ()
    biases = [name for name, _ in model.named_parameters() if "relative_attention_bias" in name]
    return bool(biases) and (adapter is None or any(is_inside(name, saved) for name in biases))


def _enable_packing(layers: LayerSettings, model: Any, report: Report) -> bool:
    """Enable packing if the settings want it and the model supports it. Return whether it is enabled."""
    if layers.packing == "off":
        return False
    if not can_pack(model):
        reason = f"packing: {layers.packing}: the attention of {model.config.model_type} doesn't support packing"
        if layers.packing == "on" or layers.packed_attention == "flex":
            raise SettingsError(reason, hint="leave out packing and packed_attention to use padded batches")
        report(Note(f"{reason}; using padded batches"))
        return False
    use_packing(model)
    return True


def _choose_label_scale(loaded: LoadedData) -> LabelScale:
    task = loaded.examples.label_task
    is_number = task is not None and task.objective == "regress"
    return LabelScale(*loaded.examples.compute_label_scale()) if is_number else NOT_SCALED


def _make_trained_weights(
    plan: ModelPlan,
    loaded: LoadedData,
    settings: Mapping[str, Any],
    model: Any,
    subtracted: dict[str, Tensor],
    label_scale: LabelScale,
) -> TrainedWeights:
    family, files, head = plan.base.family, loaded.files, model.architecture.list_initial_shapes()
    if plan.adapter is None:
        task = loaded.examples.label_task
        checkpoint = open_base(loaded.base, family, task)
        renamed = ((name, checkpoint.get_file_name(name)) for name in checkpoint.list_names())
        names = {name: file_name for name, file_name in renamed if file_name != name}
        tied = bool(model.config.tie_word_embeddings)
        write = partial(write_model, base=checkpoint, tied=tied, files=files, family=family, task=task)
        return TrainedWeights(MODEL_FILE, write, subtracted, names, dict.fromkeys(head, label_scale.scale))
    config = _make_adapter_config(model, plan, bool(subtracted))
    training = format_data_line(loaded.examples.manifest) + format_settings_line(settings)
    metadata = AdapterMetadata(config, files, loaded.base_metadata, training, loaded.examples.label_task)
    write = partial(write_adapter, metadata=metadata, with_non_lora_state=True)
    scales = {f"{PEFT_PREFIX}{name}": label_scale.scale for name in head}
    return TrainedWeights(ADAPTER_WEIGHTS_FILE, write, subtracted, scales=scales)


def _make_adapter_config(model: Any, plan: ModelPlan, is_converted_to_plain_lora: bool) -> dict[str, Any]:
    """Make the content of adapter_config.json as PEFT writes it, but with sets in a fixed order."""
    config = model.peft_config["default"].to_dict()
    if is_converted_to_plain_lora:
        config = convert_config_to_plain_lora(config)
    config["base_model_name_or_path"] = plan.base.model_name_or_path
    config["revision"] = plan.revision
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    for key in ("peft_type", "task_type"):
        plain[key] = getattr(plain[key], "value", plain[key])
    return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]
