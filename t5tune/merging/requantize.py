"""Round base weights to the values that a quantized base computes with.

A QLoRA adapter (Dettmers et al. 2023) is trained on top of these values. Merged into them, it gives the same weights as
in training.
"""

import torch

from t5tune.checkpoints.tensors import Tensor
from t5tune.merging.pissa import from_torch
from t5tune.model.load import TORCH_DTYPES, to_torch


def quantize_dequantize(weight: Tensor, kind: str, double_quant: bool, compute: torch.dtype) -> Tensor:
    """Quantize and dequantize a weight as bitsandbytes does.

    Args:
        kind: nf4, fp4 or int8.
        compute: compute dtype of the quantized layer, and dtype of the result.
    """
    import bitsandbytes
    from bitsandbytes import functional

    values = to_torch(weight, TORCH_DTYPES[weight.dtype]).to(compute)
    if kind == "int8":
        layer = bitsandbytes.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to("cpu")
        back = functional.int8_vectorwise_dequant(layer.data, layer.SCB).to(compute)
    else:
        packed, state = functional.quantize_4bit(values, compress_statistics=double_quant, quant_type=kind)
        back = functional.dequantize_4bit(packed, state)
    return from_torch(back.reshape(weight.shape), {torch.float32: "F32", torch.bfloat16: "BF16"}[compute])
