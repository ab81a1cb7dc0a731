"""Norms and gated activations with less memory traffic, for training.

    use_fused_layers(model)
    compile_layers(model)  # the alternative

As transformers implements them, they take a fifth of a training step on a CPU, because each elementwise operation on a
whole batch goes through main memory. Here they run on chunks of rows that fit in the CPU's cache. The norm produces the
same bits as transformers' and has a closed-form gradient. An ungated activation uses torch's GELU kernel. A gated
activation is multiplied by its linear half while its chunk is in the cache. For the backward pass, the layers save only
their inputs; norms also save one number per row.

On a GPU, norms and gated activations are one kernel in each direction: torch's, and one that Triton compiles. LoRA's
layers take fewer kernels, too (fused_lora.py).

N tokens, C tokens of a chunk, D model width, F feed-forward width.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from t5tune.compat.transformers_patches import replace_forwards
from t5tune.model.kernels.fused_lora import use_fused_lora
from t5tune.model.kernels.gated_gelu import CUBE, KERNEL_DTYPES, SLOPE, find_kernel_problem, gated_gelu
from t5tune.progress import Note, Report, silent

ELEMENTS_PER_CHUNK = 1 << 17  # per thread: 512 KiB in fp32
# classes of transformers
NORMS = ("T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm", "LongT5LayerNorm")
GATED_LAYERS = ("T5DenseGatedActDense", "MT5DenseGatedActDense", "UMT5DenseGatedActDense", "LongT5DenseGatedActDense")
GEMMA_NORMS = ("T5GemmaRMSNorm", "T5Gemma2RMSNorm")
GEMMA_GATED_LAYERS = ("T5GemmaMLP", "T5Gemma2MLP")
FEED_FORWARD_LAYERS = ("T5LayerFF", "MT5LayerFF", "UMT5LayerFF", "LongT5LayerFF", *GEMMA_GATED_LAYERS)
HALF_DTYPES = (torch.float16, torch.bfloat16)


def use_fused_layers(model: Any, device: torch.device | None = None, report: Report = silent) -> None:
    """Replace the forwards of a model's norms, activations and adapters.

    Args:
        device: where the model will be trained. On a GPU, the kernel of gated activations is tried.
        report: receives a warning if the kernel doesn't work.
    """
    has_kernel = _has_gate_kernel(model, device, report)
    forwards: dict[str, Callable[..., Any]] = {
        **dict.fromkeys(NORMS, _forward_norm),
        **dict.fromkeys(GEMMA_NORMS, _forward_gemma_norm),
        **dict.fromkeys(GATED_LAYERS, partial(_forward_gated, has_kernel)),
        **dict.fromkeys(GEMMA_GATED_LAYERS, partial(_forward_gemma_gated, has_kernel)),
        "NewGELUActivation": lambda _module, _forward, hidden: functional.gelu(hidden, approximate="tanh"),
        "T5Gemma2TextScaledWordEmbedding": _forward_scaled_embedding,
    }
    replace_forwards(model, forwards)
    use_fused_lora(model)


def compile_layers(model: Any) -> None:
    """Compile each norm and each feed-forward layer with torch.compile, for any batch size and length.

    Attention isn't compiled here: the loop has a variable number of segments, and flex_attention.py compiles a kernel.
    """
    for module in model.modules():
        if type(module).__name__ in (*NORMS, *GEMMA_NORMS, *FEED_FORWARD_LAYERS):
            module.compile(dynamic=True)


@contextmanager
def without_chunks() -> Iterator[None]:
    """Compute on whole batches within this block, as on a GPU."""
    global ELEMENTS_PER_CHUNK
    before, ELEMENTS_PER_CHUNK = ELEMENTS_PER_CHUNK, sys.maxsize
    try:
        yield
    finally:
        ELEMENTS_PER_CHUNK = before


def _has_gate_kernel(model: Any, device: torch.device | None, report: Report) -> bool:
    gated = (*GATED_LAYERS, *GEMMA_GATED_LAYERS)
    is_gated = any(type(module).__name__ in gated for module in model.modules())
    if device is None or device.type != "cuda" or not is_gated:
        return False
    problem = find_kernel_problem(device)
    if problem is not None:
        report(Note(f"gated activations use torch's operations, which is slower on a GPU: {problem}", warning=True))
    return problem is None


def _forward_norm(module: Any, _original_forward: Callable[..., Any], hidden: Tensor) -> Any:
    if hidden.device.type == "cuda" and hidden.dtype == module.weight.dtype:
        return normalize_in_one_kernel(hidden, module.weight, module.variance_epsilon)
    weight_D = module.weight
    # transformers rounds to a half-precision weight's dtype before the product with it, too
    is_half = weight_D.dtype in HALF_DTYPES
    dtype = weight_D.dtype if is_half else torch.promote_types(_widen(hidden.dtype), weight_D.dtype)
    dtypes = torch.float32, dtype, dtype
    return _RootMeanSquareNorm.apply(hidden, weight_D, module.variance_epsilon, dtypes)  # type: ignore[no-untyped-call]


def _forward_scaled_embedding(module: Any, _original_forward: Callable[..., Any], ids: Tensor) -> Tensor:
    """Forward of T5Gemma 2's embedding, which doesn't scale the vector of the token for the end of an image.

    transformers selects this token's positions with a mask, which makes the CPU wait for the GPU.
    """
    embedded = functional.embedding(ids, module.weight, module.padding_idx) * module.embed_scale.to(module.weight.dtype)
    is_end = (ids == module.eoi_token_index).unsqueeze(-1)
    return torch.where(is_end, module.eoi_embedding.to(embedded.dtype), embedded)


def _forward_gemma_norm(module: Any, _original_forward: Callable[..., Any], hidden: Tensor) -> Any:
    """Forward of T5GemmaRMSNorm: 1 is added to the weight, and the result is rounded once, at the end.

    In fp64, this is exact; transformers computes it in fp32.
    """
    wide = _widen(hidden.dtype)
    dtypes = wide, wide, hidden.dtype
    return _RootMeanSquareNorm.apply(hidden, 1 + module.weight.to(wide), module.eps, dtypes)  # type: ignore[no-untyped-call]


def _widen(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def normalize_in_one_kernel(hidden: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Compute T5's norm by torch's operator: one kernel on a GPU that saves the same tensors as _RootMeanSquareNorm.

    In half precision, the kernel rounds once, after the product with the weight. transformers rounds before it, too, so
    its error is larger, by up to one unit in the last place.
    """
    # autocast would return fp32 for this operator
    with torch.autocast(hidden.device.type, enabled=False):
        return functional.rms_norm(hidden, weight_D.shape, weight_D, epsilon)


def _forward_gated(has_kernel: bool, module: Any, original_forward: Callable[..., Any], hidden: Tensor) -> Any:
    if type(module.act).__name__ != "NewGELUActivation":
        return original_forward(hidden)
    inner = module.dropout(_compute_gated_gelu(has_kernel, module.wi_0(hidden), module.wi_1(hidden)))
    weight = module.wo.weight
    if isinstance(weight, Tensor) and weight.is_floating_point():
        inner = inner.to(weight.dtype)
    return module.wo(inner)


def _forward_gemma_gated(has_kernel: bool, module: Any, original_forward: Callable[..., Any], hidden: Tensor) -> Any:
    if type(module.act_fn).__name__ != "GELUTanh":
        return original_forward(hidden)
    inner = _compute_gated_gelu(has_kernel, module.gate_proj(hidden), module.up_proj(hidden))
    return module.down_proj(module.dropout(inner))


def _compute_gated_gelu(has_kernel: bool, gate: Tensor, linear: Tensor) -> Any:
    if has_kernel and gate.device.type == "cuda" and gate.dtype == linear.dtype and gate.dtype in KERNEL_DTYPES:
        return gated_gelu(gate.contiguous(), linear.contiguous())
    return _GatedGelu.apply(gate, linear)  # type: ignore[no-untyped-call]


class _RootMeanSquareNorm(torch.autograd.Function):
    """RMSNorm: weight · x / sqrt(mean(x²) + epsilon) (Zhang and Sennrich 2019).

    `dtypes` are those of the mean, of x / sqrt(…) and of the output.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_D: Tensor, epsilon: float, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    ) -> Tensor:
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        mean_dtype, factor_dtype, dtype = dtypes
        scale_N1 = hidden.new_empty(len(hidden_ND), 1, dtype=mean_dtype)
        output = torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
        output_ND = output.view_as(hidden_ND)
        for part in _slice_rows(hidden_ND):
            scale_N1[part] = torch.rsqrt(hidden_ND[part].to(mean_dtype).pow(2).mean(1, keepdim=True) + epsilon)
            normal_CD = hidden_ND[part] * scale_N1[part]
            torch.mul(normal_CD.to(factor_dtype), weight_D, out=output_ND[part])
        ctx.save_for_backward(hidden, weight_D, scale_N1)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight_D, scale_N1 = ctx.saved_tensors
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        grad_ND = grads[0].reshape_as(hidden_ND)
        wants_weight = ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        hidden_grad_ND = hidden_grad.view_as(hidden_ND)
        weight_grad_D = torch.zeros_like(weight_D, dtype=torch.promote_types(weight_D.dtype, torch.float32))
        for part in _slice_rows(hidden_ND):
            normal_CD = hidden_ND[part] * scale_N1[part]
            scaled_CD = grad_ND[part].to(normal_CD.dtype) * weight_D
            along_C1 = (scaled_CD * normal_CD).mean(1, keepdim=True)
            hidden_grad_ND[part] = scaled_CD.addcmul_(normal_CD, along_C1, value=-1).mul_(scale_N1[part])
            if wants_weight:
                weight_grad_D += (grad_ND[part] * normal_CD).sum(0)
        return hidden_grad, weight_grad_D.to(weight_D.dtype) if wants_weight else None, None, None


class _GatedGelu(torch.autograd.Function):
    """GEGLU: gelu(gate) · linear, with GELU's tanh approximation (Shazeer 2020, "GLU Variants Improve Transformer")."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, linear: Tensor) -> Tensor:
        gate_NF, linear_NF = _flatten_rows(gate), _flatten_rows(linear)
        output = torch.empty_like(gate, dtype=torch.result_type(gate, linear), memory_format=torch.contiguous_format)
        output_NF = _flatten_rows(output)
        for part in _slice_rows(gate_NF):
            torch.mul(_gelu(gate_NF[part]), linear_NF[part], out=output_NF[part])
        ctx.save_for_backward(gate, linear)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, linear = ctx.saved_tensors
        gate_NF, linear_NF, grad_NF = _flatten_rows(gate), _flatten_rows(linear), _flatten_rows(grads[0])
        gate_grad = torch.empty_like(gate, memory_format=torch.contiguous_format)
        linear_grad = torch.empty_like(linear, memory_format=torch.contiguous_format)
        gate_grad_NF, linear_grad_NF = _flatten_rows(gate_grad), _flatten_rows(linear_grad)
        for part in _slice_rows(gate_NF):
            gelu_CF, gate_grad_NF[part] = _gelu_and_gradient(gate_NF[part], grad_NF[part] * linear_NF[part])
            linear_grad_NF[part] = gelu_CF.mul_(grad_NF[part])
        return gate_grad, linear_grad


def _gelu(x: Tensor) -> Tensor:
    """Compute x/2 · (1 + tanh(k (x + c x³))), which equals x · sigmoid(2k (x + c x³)).

    On chunks that fit in a CPU's cache, these vectorized operations take half the time of torch's kernel.
    """
    if x.device.type != "cpu":
        return functional.gelu(x, approximate="tanh")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.square().mul_(SLOPE * CUBE).add_(SLOPE).mul_(x).sigmoid_().mul_(x)


def _gelu_and_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compute gelu(x) and grad · gelu'(x); where s is the sigmoid, gelu' = s + x s (1 - s) · 2k (1 + 3c x²)."""
    if x.device.type != "cpu":
        return functional.gelu(x, approximate="tanh"), torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = x.square()
    sigmoid = square.mul(SLOPE * CUBE).add_(SLOPE).mul_(x).sigmoid_()
    gelu = sigmoid * x
    slope = square.mul_(3 * SLOPE * CUBE).add_(SLOPE).mul_(torch.addcmul(gelu, gelu, sigmoid, value=-1))
    return gelu, slope.add_(sigmoid).mul_(grad)


def _flatten_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _slice_rows(rows_ND: Tensor) -> list[slice]:
    """Slice rows so that each slice fits in a CPU's cache; on a GPU, one slice contains all rows."""
    count, width = rows_ND.shape
    on_cpu = rows_ND.device.type == "cpu"
    step = max(1, ELEMENTS_PER_CHUNK * torch.get_num_threads() // width if on_cpu else count)
    return [slice(start, start + step) for start in range(0, count, step)]
