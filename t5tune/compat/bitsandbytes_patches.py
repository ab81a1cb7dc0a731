"""Patch of bitsandbytes: 4-bit layers that can be trained after an evaluation."""

from typing import Any


def keep_training_layout(layer: Any) -> None:
    """Keep the packed weights of a `Linear4bit` as they are.

    On CPUs with AVX-512 and bf16, bitsandbytes 0.50 repacks them for inference in the first forward in evaluation mode,
    and never undoes it: training afterwards gets no gradient through the layer.
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py (Linear4bit.forward)
    """
    layer.support_avx512bf16_for_cpu = False
