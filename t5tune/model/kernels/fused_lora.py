"""Linear layers with LoRA in fewer operations, for GPUs.

    use_fused_lora(peft_model)

A layer computes x·Wᵀ + scaling · dropout(x)·Aᵀ·Bᵀ. PEFT casts x to the adapter's dtype, autocast casts it back, and
scaling and adding are separate operations: 22 kernels per layer and step. Here the matrix products scale and add, in 14
kernels. The computation is the same, with fewer roundings.

N tokens, I inputs, O outputs, R rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

FUSED_BASE_LAYERS = ("Linear", "Linear4bit")


def use_fused_lora(model: Any) -> None:
    """Replace the forward of LoRA layers permanently; on CPUs, and for variants such as DoRA, it calls PEFT's."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module.get_base_layer()).__name__ in FUSED_BASE_LAYERS:
            module.forward = partial(_forward, module, module.forward)


def _forward(module: Any, original_forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if hidden.device.type != "cuda" or args or kwargs or not _is_plain_lora(module):
        return original_forward(hidden, *args, **kwargs)
    (name,) = module.active_adapters
    base, a, b = module.get_base_layer(), module.lora_A[name], module.lora_B[name]
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else a.weight.dtype
    is_quantized = type(base).__name__ == "Linear4bit"
    if dtype != (base.compute_dtype if is_quantized else base.weight.dtype):
        return original_forward(hidden)  # the adapter's dtype differs from the base's
    dropout = module.lora_dropout[name]
    probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    base_output, weight_OI = (base(hidden), None) if is_quantized else (None, base.weight)
    adapter = a.weight, b.weight, module.scaling[name], probability
    return compute_lora_linear(hidden, base_output, weight_OI, *adapter, dtype)


def _is_plain_lora(module: Any) -> bool:
    """Whether this is one active adapter without variants such as DoRA, on a frozen layer without a bias."""
    names = module.active_adapters
    if module.disable_adapters or module.merged or len(names) != 1 or names[0] not in module.lora_A:
        return False
    a, b, base = module.lora_A[names[0]], module.lora_B[names[0]], module.get_base_layer()
    has_bias = any(layer.bias is not None for layer in (a, b, base))
    # ZeRO-3 gathers the weights only within the forward passes of PEFT's submodules
    is_sharded = hasattr(a.weight, "ds_id")
    return not (names[0] in module.lora_variant or has_bias or is_sharded or base.weight.requires_grad)


class _LoraLinear(torch.autograd.Function):
    """A linear layer with LoRA, computed in `dtype`.

    Args:
        base_output: output of the layer without LoRA, in `dtype`; None: computed from `weight_OI`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        base_output: Tensor | None,
        weight_OI: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, a_RI.dtype, b_OR.dtype)
        ctx.scaling, ctx.dropout = scaling, dropout
        hidden_NI, a_RI, b_OR = hidden.reshape(-1, hidden.shape[-1]).to(dtype), a_RI.to(dtype), b_OR.to(dtype)
        mask_NI = None
        kept_NI = hidden_NI
        if dropout:
            kept_NI, mask_NI = torch.native_dropout(hidden_NI, dropout, True)
        inner_NR = kept_NI @ a_RI.T
        if weight_OI is not None:
            output_NO = functional.linear(hidden_NI, weight_OI).addmm_(inner_NR, b_OR.T, alpha=scaling)
        else:
            assert base_output is not None
            output_NO = torch.addmm(base_output.reshape(-1, len(b_OR)), inner_NR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(weight_OI, a_RI, b_OR, kept_NI, mask_NI, inner_NR)
        return output_NO.view(*hidden.shape[:-1], len(b_OR))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight_OI, a_RI, b_OR, kept_NI, mask_NI, inner_NR = ctx.saved_tensors
        wants_hidden, wants_output, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        hidden_dtype, a_dtype, b_dtype = ctx.dtypes
        grad_NO = grads[0].reshape(-1, len(b_OR))
        hidden_grad = a_grad = b_grad = None
        # with beta 0, addmm is a product with a factor
        if wants_b:
            b_grad = torch.addmm(b_OR, grad_NO.T, inner_NR, beta=0, alpha=ctx.scaling).to(b_dtype)
        if wants_a or wants_hidden:
            inner_grad_NR = torch.addmm(inner_NR, grad_NO, b_OR, beta=0, alpha=ctx.scaling)
        if wants_a:
            a_grad = (inner_grad_NR.T @ kept_NI).to(a_dtype)
        if wants_hidden:
            hidden_grad_NI = inner_grad_NR @ a_RI
            if mask_NI is not None:
                hidden_grad_NI = torch.ops.aten.native_dropout_backward(hidden_grad_NI, mask_NI, 1 / (1 - ctx.dropout))
            if weight_OI is not None:
                hidden_grad_NI.addmm_(grad_NO, weight_OI)
            hidden_grad = hidden_grad_NI.view(ctx.shape).to(hidden_dtype)
        return hidden_grad, grads[0] if wants_output else None, None, a_grad, b_grad, None, None, None


compute_lora_linear: Callable[..., Tensor] = _LoraLinear.apply
