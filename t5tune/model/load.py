"""Load a base checkpoint in bf16, fp32 or quantized, with exactly the weights of its files.

`from_pretrained` of transformers 5 doesn't load every T5 correctly: some releases leave LongT5's embedding random, and
under ZeRO-3 it replaces Flan-T5's head with the embedding. So this module builds the model on the meta device and
assigns each tensor of the files by name. The head is tied if the files contain no head.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.tensor_files.tensors import FLOAT_DTYPES, TORCH_NAMES, Tensor
from t5tune.compat.bitsandbytes_patches import keep_training_layout, stay_if_not_moved
from t5tune.compat.requirements import check_versions
from t5tune.data.labels import LabelTask
from t5tune.errors import DependencyError, ModelError
from t5tune.families.architecture import Architecture
from t5tune.families.encoder import Encoder
from t5tune.families.t5gemma import SOFT_CAPPED_ATTENTION
from t5tune.file_names import GENERATION_CONFIG_FILE
from t5tune.io.reasons import describe_error
from t5tune.model.attention.gemma import register_soft_capped_attention
from t5tune.model.labels import NOT_SCALED, LabelHead, LabelScale, make_label_class
from t5tune.model.loss import make_loss_class
from t5tune.model.zero3 import Zero3Partitioner
from t5tune.progress import Note, Report, silent, track
from t5tune.settings.groups.base import QuantizationSettings

TORCH_DTYPES: dict[str, torch.dtype] = {dtype: getattr(torch, TORCH_NAMES[dtype]) for dtype in FLOAT_DTYPES}
OUTLIER_THRESHOLD = 6.0  # from the paper of LLM.int8(), which doesn't quantize larger activations
LOAD_CHUNK_BYTES = 16 << 20


def load_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantizationSettings | None = None,
    family: str | None = None,
    report: Report = silent,
    partitioner: Zero3Partitioner | None = None,
    task: LabelTask | None = None,
    label_scale: LabelScale = NOT_SCALED,
) -> Any:
    """Load a base as a frozen transformers model in evaluation mode.

    Args:
        dtype: dtype of every tensor that isn't quantized, except a head of labels, which is fp32 unless partitioned.
        quantization: if its q_lora is set, the linear layers of the blocks are quantized to 4 bits (Dettmers et al.
            2023) or int8 (Dettmers et al. 2022), and compute in `dtype`.
        family: key of the table of families, for a model_type that isn't in the table.
        partitioner: partitions each tensor among the ranks before the next is loaded; only rank 0 reads the files.
        task: load only the encoder, with a head for these labels: the base's, or zeros. The model has it as
            `label_task`, and computes logits (model/labels.py).
        label_scale: of the numbers that the head learns; a new head predicts their mean.

    Raises:
        CheckpointError: the base has a head for different labels.
        ModelError: not a T5, or tensors are missing, unexpected, or of a shape that contradicts config.json.
        DependencyError: quantization without bitsandbytes.
    """
    checkpoint = open_base(folder, family, task)
    architecture = checkpoint.architecture
    tied = checkpoint.is_tied() if partitioner is None else partitioner.ask_rank_0(checkpoint.is_tied)
    model = build_empty_model(architecture, dtype, tied)
    if quantization is not None and quantization.q_lora:
        _replace_linears_with_quantized(model, dtype, quantization)
    _compute_buffers(model, device)
    shared = architecture.list_shared(tied)
    initial_shapes = architecture.list_initial_shapes()
    parameters = {n: value for n, value in model.named_parameters(remove_duplicate=False) if n not in shared}
    checkpoint.check_tensors({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    if partitioner is None:
        checkpoint.check_copies()
    else:
        partitioner.run_only_on_rank_0(checkpoint.check_copies)
    for name, parameter in track(parameters.items(), "load", report, len(parameters), "tensors"):
        tensor = checkpoint.get_tensor(name)
        # `to` quantizes an int8 weight only if it comes from the CPU; on a GPU, its first forward would quantize it
        source = torch.device("cpu") if type(parameter).__name__ == "Int8Params" else device
        is_head = name in initial_shapes
        wide = torch.promote_types(dtype, torch.float32) if is_head and partitioner is None else dtype
        values = read_on_rank_0(tensor, wide, source, partitioner)
        if is_head:
            _scale_head(values, label_scale, is_new_bias=name in checkpoint.added and values.dim() == 1)
        _set_values(model, name, values, device, partitioner)
        del values  # otherwise two tensors would be in memory
    _share_parameters(model, shared)
    if task is None:
        _load_generation_config(model, folder, report)
    model.requires_grad_(False)
    return model.eval()


def build_empty_model(architecture: Architecture, dtype: torch.dtype, tied: bool) -> Any:
    """Build the transformers model on the meta device, with the attribute `architecture`."""
    check_versions("transformers")  # older releases lack sdpa for T5, or don't mask future tokens in umT5's decoder
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    )

    attention = architecture.attention_implementation
    if attention == SOFT_CAPPED_ATTENTION:
        register_soft_capped_attention()
    try:
        values = CONFIG_MAPPING[architecture.model_type].from_dict(dict(architecture.config))
        values.tie_word_embeddings = tied
        if isinstance(architecture, Encoder):
            model_class = make_label_class(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(values)])
        else:
            model_class = make_loss_class(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(values)])
        with torch.device("meta"):
            model = model_class._from_config(values, attn_implementation=attention, dtype=dtype)
    except Exception as error:  # of any kind, depending on the key whose value is wrong
        problem = f"the base's config.json: transformers can't build a {architecture.model_type} from it"
        raise ModelError(f"{problem}: {describe_error(error)}", hint="compare it with the published file") from error
    model.architecture = architecture
    for path in architecture.skipped_modules:
        parent, _, name = path.rpartition(".")
        delattr(model.get_submodule(parent), name)
    _share_parameters(model, architecture.list_shared(tied))
    head = model.get_submodule(architecture.head)
    model.label_task = architecture.task if isinstance(architecture, Encoder) else None
    if model.label_task is not None:
        head.__class__ = LabelHead
        head.float()
    if not hasattr(model.config, "hidden_size"):
        # transformers derives DeepSpeed's `auto` values from it; T5Gemma has only one for the encoder and the decoder
        model.config.hidden_size = head.in_features
    return model


def _scale_head(values: torch.Tensor, scale: LabelScale, is_new_bias: bool) -> None:
    """Standardize a weight or bias of the head, which in files is for the user's numbers, as the labels are."""
    if is_new_bias:
        values.fill_(scale.mean)
    values /= scale.scale


def _load_generation_config(model: Any, folder: Path, report: Report) -> None:
    """Load generation_config.json if it exists, but with config.json's start token for the decoder, as in training."""
    from transformers import GenerationConfig

    start = model.architecture.start_token_id
    if (path := folder / GENERATION_CONFIG_FILE).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            problem = f"{path}: transformers can't use it: {describe_error(error)}"
            raise ModelError(problem, hint="correct it, or remove it") from error
        found = model.generation_config.decoder_start_token_id
        if found not in (None, start):
            words = f"decoder_start_token_id is {found} here and {start} in config.json; using {start}, as in training"
            report(Note(f"{path}: {words}", warning=True))
    model.generation_config.decoder_start_token_id = start


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that files don't contain, such as the frequencies of rotations, as transformers does."""
    for module in model.modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            model._init_weights(module)  # parameters are still on the meta device, where this does nothing


def find_quantizable_linears(model: Any, quantization: QuantizationSettings) -> dict[str, nn.Linear]:
    """Find the layers that q_lora quantizes, by name: the linear layers of the blocks, `wo` only with quantize_wo."""
    is_quantizable, with_wo = model.architecture.is_quantizable, quantization.quantize_wo
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and is_quantizable(name, with_wo)
    }


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count (trainable, all) parameters. Packed 4-bit weights and ZeRO-3 partitions count with their full shape."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = int(np.prod(state.shape)) if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def read_on_rank_0(
    tensor: Tensor, dtype: torch.dtype, device: torch.device, partitioner: Zero3Partitioner | None
) -> torch.Tensor:
    """Read a tensor's values; with a partitioner only rank 0 does, and other ranks get an empty tensor of this shape.

    Raises:
        CheckpointError: the file was truncated after it was opened; every rank raises it.
    """
    if partitioner is None:
        return to_torch(tensor, dtype, device)
    values = partitioner.run_only_on_rank_0(lambda: to_torch(tensor, dtype, device))
    return torch.empty(tensor.shape, dtype=dtype, device=device) if values is None else values


def _set_values(
    model: nn.Module, name: str, values: torch.Tensor, device: torch.device, partitioner: Zero3Partitioner | None
) -> None:
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    kind = type(getattr(module, leaf))
    if kind.__name__ == "Params4bit":
        if partitioner is not None:
            partitioner.broadcast(values)  # every rank needs the scales, which aren't parameters
        module.weight = kind(
            values,
            requires_grad=False,
            compress_statistics=module.weight.compress_statistics,
            quant_type=module.weight.quant_type,
            quant_storage=module.quant_storage,
            module=module,
        ).to(device)
    elif kind.__name__ == "Int8Params":
        module.weight = kind(values, requires_grad=False, has_fp16_weights=False).to(device)
        assert module.weight.dtype == torch.int8, f"{name}: bitsandbytes left it in {module.weight.dtype}"
        stay_if_not_moved(module.weight)
    else:
        _set_attribute(model, name, nn.Parameter(values, requires_grad=False))
    if partitioner is not None:
        partitioner.partition([getattr(module, leaf)])


def to_torch(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Copy a tensor to torch in chunks from its file, so that a second buffer isn't needed."""
    values = torch.empty(tensor.shape, dtype=dtype, device=device)
    rows = max(1, LOAD_CHUNK_BYTES * len(tensor.array) // max(1, tensor.array.nbytes))
    for start in range(0, len(tensor.array), rows):
        part = tensor.read_rows(start, min(start + rows, len(tensor.array)))
        values[start : start + rows] = torch.from_numpy(part.array).view(TORCH_DTYPES[tensor.dtype])
    return values


def from_torch(values: torch.Tensor) -> Tensor:
    """Convert a torch tensor to a Tensor without changing its bits."""
    values = values.contiguous()
    dtype = next(name for name, torch_dtype in TORCH_DTYPES.items() if torch_dtype == values.dtype)
    bits = values.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else values.numpy()
    return Tensor(dtype, bits)


def _share_parameters(model: nn.Module, shared: Mapping[str, str]) -> None:
    for name, original in shared.items():
        _set_attribute(model, name, model.get_parameter(original))


def _set_attribute(model: nn.Module, name: str, value: nn.Parameter | nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def _replace_linears_with_quantized(model: Any, dtype: torch.dtype, quantization: QuantizationSettings) -> None:
    try:
        import bitsandbytes
    except ImportError as error:
        raise DependencyError(
            f"q_lora: bitsandbytes can't be imported: {error}",
            hint="pip install bitsandbytes (Linux), or train without --q-lora",
        ) from error
    in_int8 = quantization.quant_type == "int8"
    for name, module in find_quantizable_linears(model, quantization).items():
        shape = (module.in_features, module.out_features)
        if in_int8:
            quantized = bitsandbytes.nn.Linear8bitLt(
                *shape, bias=False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
            )
        else:
            quantized = bitsandbytes.nn.Linear4bit(
                *shape,
                bias=False,
                compute_dtype=dtype,
                compress_statistics=quantization.double_quant,
                quant_type=quantization.quant_type,
                quant_storage=_choose_storage(module, dtype),
                device="meta",
            )
            keep_training_layout(quantized)
        _set_attribute(model, name, quantized)
    # PEFT reads these attributes before it wraps quantized layers
    model.is_loaded_in_8bit = in_int8
    model.is_loaded_in_4bit = not in_int8


def _choose_storage(layer: nn.Linear, dtype: torch.dtype) -> torch.dtype:
    """Store packed weights as numbers of the compute dtype, because ZeRO-3 gathers only one dtype, or as bytes.

    Bytes are for weights that don't fill whole numbers.
    """
    num_bytes = (layer.weight.numel() + 1) // 2
    return dtype if num_bytes % dtype.itemsize == 0 else torch.uint8
