"""Patches of bitsandbytes: 4-bit layers can be trained after an evaluation, and DoRA can read 8-bit layers."""

from typing import Any


def keep_training_layout(layer: Any) -> None:
    """Keep the packed weights of a `Linear4bit` as they are.

    On CPUs with AVX-512 and bf16, bitsandbytes 0.50 repacks them for inference in the first forward in evaluation mode,
    and never undoes it: training afterwards gets no gradient through the layer.
    https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/modules.py (Linear4bit.forward)
    """
    layer.support_avx512bf16_for_cpu = False


def stay_if_not_moved(weight: Any) -> None:
    """Make `weight.to(…)` of an 8-bit weight return itself if nothing changes, as it does for other tensors.

    bitsandbytes 0.50 returns a new weight, which lacks the scales after the first forward moved them to the layer's
    state. PEFT 0.21 puts this weight into the layer whenever DoRA reads it on a CPU.
    https://github.com/huggingface/peft/blob/v0.21.0/src/peft/utils/integrations.py (dequantize_module_weight)
    """
    import torch

    move = weight.to

    def move_if_needed(*args: Any, **options: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
        stays = device in (None, weight.device) and dtype in (None, weight.dtype)
        return weight if stays else move(*args, **options)

    weight.to = move_if_needed
