"""What a quantised base really holds: its weights in few bits, and back.

A QLoRA adapter is trained on these values, so folding it into them changes nothing else (Dettmers et al. 2023).
"""

import torch

from t5tune.checkpoints.tensors import Tensor
from t5tune.merging.pissa import from_torch
from t5tune.model.load import TORCH_DTYPES, to_torch


def restored(weight: Tensor, kind: str, double_quant: bool, compute: torch.dtype) -> Tensor:
    """Quantise and dequantise as bitsandbytes does at load; the result is in `compute`.

    Args:
        kind: nf4, fp4 or int8.
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
