"""Round base weights to the values that a quantized base computes with.

A QLoRA adapter (Dettmers et al. 2023) is trained on top of these values. So merging into them gives the weights of
training.
"""

import bitsandbytes
import torch
from bitsandbytes import functional

from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.model.load import TORCH_DTYPES, from_torch, to_torch
from t5tune.settings.groups.base import QuantizationSettings


def quantize_dequantize(weight: Tensor, quantization: QuantizationSettings, compute: str) -> Tensor:
    """Quantize and dequantize a weight as bitsandbytes did in training, with the layer's compute dtype."""
    dtype = getattr(torch, compute)
    values = to_torch(weight, TORCH_DTYPES[weight.dtype]).to(dtype)
    if quantization.quant_type == "int8":
        layer = bitsandbytes.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False).to("cpu")
        back = functional.int8_vectorwise_dequant(layer.data, layer.SCB).to(dtype)
    else:
        packed, state = functional.quantize_4bit(
            values, compress_statistics=quantization.double_quant, quant_type=quantization.quant_type
        )
        back = functional.dequantize_4bit(packed, state)
    return from_torch(back.reshape(weight.shape))
