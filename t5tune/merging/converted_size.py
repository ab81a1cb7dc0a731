"""The size of a converted model, estimated before the conversion; it doesn't need CTranslate2.

estimate_converted_size({"shared.weight": ("F32", (32128, 512)), …}, "int8")
"""

import math
from collections.abc import Mapping

from t5tune.checkpoints.tensors import NUMPY_DTYPES

BYTES_PER_WEIGHT = {"int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "float32": 4}  # int8_float16: as int8
HEADER_BYTES = 256  # more than the name, the shape and the dtype of a weight and of its scale take


def estimate_converted_size(weights: Mapping[str, tuple[str, tuple[int, ...]]], quantization: str | None) -> int:
    """Estimate the bytes of a model in CTranslate2's format, rather too many than too few.

    Args:
        weights: dtype and shape of each tensor of the checkpoint.
        quantization: one of CTranslate2's quantization types; None keeps the weights' dtype.
    """
    dtypes = {dtype for dtype, _ in weights.values()}
    if quantization is not None:
        width = BYTES_PER_WEIGHT[quantization.partition("_")[0]]
    else:  # weights of several dtypes are converted in fp32
        width = NUMPY_DTYPES[dtypes.pop()].itemsize if len(dtypes) == 1 else 4
    size = 0
    for name, (_, shape) in weights.items():
        is_quantized = len(shape) == 2 and "relative_attention_bias" not in name
        scales = 4 * shape[0] if is_quantized else 0  # int8 has one for each row
        size += math.prod(shape) * (width if is_quantized else max(width, 4)) + scales + HEADER_BYTES
    return size
