"""Patches of one transformers model: different computations in some layers, and no needless work in each step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any


def replace_forwards(model: Any, forwards: Mapping[str, Callable[..., Any]]) -> None:
    """Replace the forward of all modules whose class has one of these names, permanently.

    The new forward is called with the module, its original forward, and the arguments. The weights stay in the module,
    so adapters, DeepSpeed's hooks and checkpoints don't notice.

    transformers 5 has an extension point for attention (AttentionInterface), but T5Attention.forward calls it with a
    position bias of the whole row's length squared, which packed rows must never compute. Norms and activations have no
    extension point.
    https://github.com/huggingface/transformers/blob/v5.18.0/src/transformers/models/t5/modeling_t5.py#L350
    """
    for module in model.modules():
        if (forward := forwards.get(type(module).__name__)) is not None:
            module.forward = partial(forward, module, module.forward)


def register_attention(name: str, attend: Callable[..., Any]) -> None:
    """Make a function available as `attn_implementation`, for the whole process.

    Its mask is boolean; None if all tokens see each other. transformers 5 looks up function and mask by this name
    (https://huggingface.co/docs/transformers/attention_interface). Its mask for sdpa omits a causal mask, for which
    sdpa has an argument.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def skip_module_walks(model: Any, wrapper: Any, trained: Sequence[Any]) -> None:
    """Spare each micro-step two walks over all modules of a model, which has thousands with adapters.

    `Trainer.training_step` calls `model.train()` each time, and `Trainer._run_epoch` calls `model.zero_grad()`, which
    looks for gradients in frozen parameters too (transformers 5.18 to 5.24).
    https://github.com/huggingface/transformers/blob/v5.18.0/src/transformers/trainer.py

    Args:
        wrapper: DistributedDataParallel or DeepSpeed's engine around the model; the model itself without one.
        trained: the parameters that have gradients.
    """
    # once for all modules, since the base was loaded in evaluation mode
    set_mode = model.train().train

    def train(mode: bool = True) -> Any:
        return model if model.training is mode else set_mode(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None

    model.train, wrapper.zero_grad = train, zero_grad


def leave_empty_bias_without_gradient(model: Any) -> None:
    """Keep cross-attention from computing a gradient of its position bias, which is all zeros and has no weights.

    With gradient checkpointing T5Attention makes this bias require a gradient (transformers 5.18 to 5.24). torch's
    fused kernels don't take such a bias, and its other kernels store all scores. Call it after enabling checkpointing.
    https://github.com/huggingface/transformers/blob/v5.18.0/src/transformers/models/t5/modeling_t5.py#L345
    """
    for module in model.modules():
        if type(module).__name__.endswith("Attention") and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


@contextmanager
def size_cache_by_decoder(model: Any) -> Iterator[None]:
    """Let `generate` make a cache of the decoder's depth, if it has more layers than the encoder.

    It reads the encoder's depth from config.json, at least up to 5.24, and fails with an IndexError at the first layer
    beyond. https://github.com/huggingface/transformers/blob/v5.18.0/src/transformers/cache_utils.py
    """
    config, depth = model.config, model.architecture.dimensions.num_decoder_layers
    # T5's key; other configs have a part for the decoder
    before = getattr(config, "num_layers", None)
    if before is None or before >= depth:
        yield
        return
    config.num_layers = depth
    try:
        yield
    finally:
        config.num_layers = before
