"""Load a base exactly as its file says, in bf16, fp32 or quantised.

`from_pretrained` of transformers 5 can't be trusted with a T5 here: it holds every T5 for tied, and under
ZeRO-3 replaces Flan-T5's head by its embedding. So the model is built without weights, and each tensor of
the file is put where its name says. The file decides whether the head is tied.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from t5tune.checkpoints.base import read_config
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.compat.requirements import check_versions
from t5tune.errors import DependencyError, ModelError
from t5tune.families import ATTENTION, OVERFLOWS_FP16, family_of
from t5tune.progress import Report, silent, track
from t5tune.settings.quantization import QuantisationSettings

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
OUTLIERS = 6.0  # LLM.int8() computes activations beyond this apart, unquantised; the paper's value
COPIED_AT_ONCE = 16 << 20  # bytes
# T5's first release saved a bias for the first cross-attention, which has no positions; nothing ever read it
IGNORED = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"}


def load_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantisation: QuantisationSettings | None = None,
    family: str | None = None,
    report: Report = silent,
) -> Any:
    """The base as a frozen transformers model in evaluation mode.

    Args:
        dtype: of every tensor that isn't quantised.
        quantisation: where its q_lora is on, the blocks' linear layers go into 4 bits (Dettmers et al. 2023) or
            int8 (Dettmers et al. 2022), computing in `dtype`.
        family: a key of the table of families, for a model_type that isn't in it.

    Raises:
        ModelError: not a T5, or tensors missing, left over, or of another shape than config.json gives.
        DependencyError: quantisation without bitsandbytes.
    """
    from transformers import GenerationConfig

    config = read_config(folder)
    config = family_of(config, folder, family).completed(config)
    checkpoint = Checkpoint(folder)
    tied = checkpoint.is_tied()
    model = empty_model(config, dtype, tied)
    if quantisation is not None and quantisation.q_lora:
        _use_quantised_linears(model, dtype, quantisation)
    _check_names(model, checkpoint, tied)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in EMBEDDING_COPIES and not (name == HEAD and tied)
    }
    for name, parameter in track(parameters.items(), "load", report, len(parameters), "tensors"):
        _place(model, name, _expect_shape(checkpoint, name, parameter), dtype, device)
    _share_embedding(model, tied)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    model.requires_grad_(False)
    return model.eval()


def empty_model(config: dict[str, Any], dtype: torch.dtype, tied: bool) -> Any:
    """The transformers model of a known config.json, its tensors without data, its head tied as `tied` says."""
    check_versions("transformers")  # older ones lack sdpa for T5, or leave an umT5 decoder without a causal mask
    from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

    values = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    values.tie_word_embeddings = tied
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(values, attn_implementation=ATTENTION, dtype=dtype)
    _share_embedding(model, tied)
    return model


def quantised_linears(model: nn.Module, quantisation: QuantisationSettings) -> dict[str, nn.Linear]:
    """The layers that q_lora quantises, by name: all linear ones of the blocks, `wo` where it is to, no adapter's."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and ".block." in name
        and ".lora_" not in name
        and (quantisation.quantize_wo or OVERFLOWS_FP16 not in name.split("."))
    }


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights count as what they stand for, sharded ones as whole."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = int(np.prod(state.shape)) if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _check_names(model: nn.Module, checkpoint: Checkpoint, tied: bool) -> None:
    expected = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(EMBEDDING_COPIES)
    if tied:
        expected.discard(HEAD)
    held = set(checkpoint.names())
    if missing := sorted(expected - held):
        raise ModelError(f"{checkpoint.folder}: {missing[0]}: missing from the weights ({len(missing)} are)")
    surplus = sorted(held - expected - set(EMBEDDING_COPIES) - {HEAD} - IGNORED)
    if surplus:
        raise ModelError(
            f"{checkpoint.folder}: {surplus[0]}: the model of this config.json has no such tensor ({len(surplus)} "
            "such)",
            hint="an adapter is given with --adapter; a base holds only the model's own tensors",
        )
    for name in set(EMBEDDING_COPIES) & held:
        if not np.array_equal(checkpoint.tensor(name).array, checkpoint.tensor(EMBEDDING).array):
            raise ModelError(f"{checkpoint.folder}: {name}: differs from {EMBEDDING}; T5 shares the two")


def _expect_shape(checkpoint: Checkpoint, name: str, parameter: nn.Parameter) -> Tensor:
    tensor = checkpoint.tensor(name)
    if tensor.shape != tuple(parameter.shape):
        raise ModelError(
            f"{checkpoint.folder}: {name}: {list(tensor.shape)} in the file, {list(parameter.shape)} by config.json"
        )
    if tensor.dtype not in TORCH_DTYPES:
        raise ModelError(f"{checkpoint.folder}: {name}: dtype {tensor.dtype} is no floating type")
    return tensor


def _place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    module: Any = model.get_submodule(name.rpartition(".")[0])
    values = to_torch(tensor, dtype)
    quantised = type(module.weight)
    if quantised.__name__ == "Params4bit":
        module.weight = quantised(
            values.to(device),
            requires_grad=False,
            compress_statistics=module.weight.compress_statistics,
            quant_type=module.weight.quant_type,
            quant_storage=module.compute_dtype,
            module=module,
        ).to(device)
    elif quantised.__name__ == "Int8Params":
        # bitsandbytes quantizes in `.to` only what comes from the CPU; on a GPU it would wait for the first forward
        module.weight = quantised(values, requires_grad=False, has_fp16_weights=False).to(device)
        assert module.weight.dtype == torch.int8, f"{name}: bitsandbytes left it in {module.weight.dtype}"
    else:
        _set_parameter(model, name, nn.Parameter(values.to(device), requires_grad=False))


def to_torch(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of a mapped tensor in torch, made in pieces: nothing else of the tensor's size is in memory."""
    values = torch.empty(tensor.shape, dtype=dtype)
    rows = max(1, COPIED_AT_ONCE * len(tensor.array) // max(1, tensor.array.nbytes))
    for start in range(0, len(tensor.array), rows):
        part = slice(start, start + rows)
        values[part] = torch.from_numpy(np.array(tensor.array[part])).view(TORCH_DTYPES[tensor.dtype])
    return values


def _share_embedding(model: nn.Module, tied: bool) -> None:
    for name in (*EMBEDDING_COPIES, *((HEAD,) if tied else ())):
        _set_parameter(model, name, model.get_parameter(EMBEDDING))


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, parameter)


def _use_quantised_linears(model: nn.Module, dtype: torch.dtype, quantisation: QuantisationSettings) -> None:
    try:
        import bitsandbytes
    except ImportError as error:
        raise DependencyError(
            f"q_lora: bitsandbytes can't be imported: {error}",
            hint="pip install bitsandbytes (Linux and Windows), or train without --q-lora",
        ) from error
    in_int8 = quantisation.quant_type == "int8"
    for name, module in quantised_linears(model, quantisation).items():
        shape = (module.in_features, module.out_features)
        if in_int8:
            quantised = bitsandbytes.nn.Linear8bitLt(
                *shape, bias=False, has_fp16_weights=False, threshold=OUTLIERS, device="meta"
            )
        else:
            quantised = bitsandbytes.nn.Linear4bit(
                *shape,
                bias=False,
                compute_dtype=dtype,
                compress_statistics=quantisation.double_quant,
                quant_type=quantisation.quant_type,
                quant_storage=dtype,  # ZeRO-3 gathers one dtype, so 4-bit weights lie in the one that computes
                device="meta",
            )
            # bitsandbytes 0.50 packs weights for inference at the first forward in evaluation mode, and
            # never unpacks them: training after it would get no gradient through the layer
            quantised.support_avx512bf16_for_cpu = False
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantised)
    # PEFT asks these before it wraps quantised layers
    model.is_loaded_in_8bit = in_int8  # type: ignore[assignment]
    model.is_loaded_in_4bit = not in_int8  # type: ignore[assignment]
