"""Patch of transformers: other computations for some layers of one model."""

from collections.abc import Callable
from functools import partial
from typing import Any


def replace_forward(model: Any, class_names: tuple[str, ...], forward: Callable[..., Any]) -> None:
    """Replace the forward of all modules whose class's name ends with one of `class_names`, for good.

    `forward` is called with the module, its original forward, and the arguments. The weights stay in the module, so
    adapters, DeepSpeed's hooks and checkpoints don't notice.

    transformers 5 has an extension point for attention (AttentionInterface), but T5Attention.forward calls it with a
    position bias of the whole row's length squared, which packed rows must never compute. It has none for norms and
    activations. https://github.com/huggingface/transformers/blob/v5.18.0/src/transformers/models/t5/modeling_t5.py#L350
    """
    for module in model.modules():
        if type(module).__name__.endswith(class_names):
            module.forward = partial(forward, module, module.forward)
