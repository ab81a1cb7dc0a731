"""T5's norms and activation with fewer trips through memory, for training.

    use_fused(model)
    use_compiled(model)  # instead

On a CPU they take a fifth of a step as transformers writes them: each sum or product of a whole batch's tensor goes to
memory and back. The norm here gives the same bits, some rows at a time, which stay in the cache, and its gradient in
closed form; the activation is torch's own kernel for the formula that transformers spells out, and is multiplied by
its gate's other half while it is in the cache. All keep for the backward what went in, and nothing else.

N tokens, D width, F width of the feed-forward layer.
"""

import math
from functools import partial
from typing import Any

import torch
from torch.nn import functional

ELEMENTS_AT_ONCE = 1 << 17  # for each thread: 512 KiB in fp32
SLOPE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715  # 2k and c of GELU by tanh
HALVES = (torch.float16, torch.bfloat16)


def use_fused(model: Any) -> None:
    """Let each norm, `gelu_new` and gated product of a T5, mT5 or umT5, adapted or not, compute so."""
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("T5LayerNorm"):
            module.forward = partial(_norm, module)
        elif name.endswith("T5DenseGatedActDense") and type(module.act).__name__ == "NewGELUActivation":
            module.forward = partial(_gated_feed_forward, module)
        elif name == "NewGELUActivation":
            module.forward = partial(functional.gelu, approximate="tanh")


def use_compiled(model: Any) -> None:
    """Let torch.compile make few kernels of each norm and each feed-forward layer, for batches of any lengths.

    Attention stays as it is: packed rows loop over their segments.
    """
    for module in model.modules():
        if type(module).__name__.endswith(("T5LayerNorm", "T5LayerFF")):
            module.compile(dynamic=True)


def _norm(module: Any, hidden: torch.Tensor) -> Any:
    return _RootMeanSquareNorm.apply(hidden, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]


def _gated_feed_forward(module: Any, hidden: torch.Tensor) -> Any:
    """T5DenseGatedActDense's."""
    inner = _GatedGelu.apply(module.wi_0(hidden), module.wi_1(hidden))  # type: ignore[no-untyped-call]
    inner = module.dropout(inner)
    weight = module.wo.weight
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        inner = inner.to(weight.dtype)
    return module.wo(inner)


class _RootMeanSquareNorm(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + epsilon), the mean in fp32 (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        scale_N1 = hidden.new_empty(len(hidden_ND), 1, dtype=torch.float32)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dtype = weight_D.dtype if weight_D.dtype in HALVES else torch.promote_types(wide, weight_D.dtype)
        output = torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
        output_ND = output.view_as(hidden_ND)
        for part in _parts(hidden_ND):
            scale_N1[part] = torch.rsqrt(hidden_ND[part].to(torch.float32).pow(2).mean(1, keepdim=True) + epsilon)
            normal_CD = hidden_ND[part] * scale_N1[part]
            torch.mul(normal_CD.to(dtype), weight_D, out=output_ND[part])
        ctx.save_for_backward(hidden, weight_D, scale_N1)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden, weight_D, scale_N1 = ctx.saved_tensors
        hidden_ND = hidden.reshape(-1, hidden.shape[-1])
        grad_ND = grads[0].reshape_as(hidden_ND)
        wants_weight = ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        hidden_grad_ND = hidden_grad.view_as(hidden_ND)
        weight_grad_D = torch.zeros_like(weight_D, dtype=torch.promote_types(weight_D.dtype, torch.float32))
        for part in _parts(hidden_ND):
            normal_CD = hidden_ND[part] * scale_N1[part]
            scaled_CD = grad_ND[part].to(normal_CD.dtype) * weight_D
            along_C1 = (scaled_CD * normal_CD).mean(1, keepdim=True)
            hidden_grad_ND[part] = scaled_CD.addcmul_(normal_CD, along_C1, value=-1).mul_(scale_N1[part])
            if wants_weight:
                weight_grad_D += (grad_ND[part] * normal_CD).sum(0)
        return hidden_grad, weight_grad_D.to(weight_D.dtype) if wants_weight else None, None


class _GatedGelu(torch.autograd.Function):
    """gelu(gate) · linear, with GELU's approximation by tanh (Shazeer 2020, "GLU Variants Improve Transformer")."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        gate_NF, linear_NF = _rows(gate), _rows(linear)
        output = torch.empty_like(gate, dtype=torch.result_type(gate, linear), memory_format=torch.contiguous_format)
        output_NF = _rows(output)
        for part in _parts(gate_NF):
            torch.mul(_gelu(gate_NF[part]), linear_NF[part], out=output_NF[part])
        ctx.save_for_backward(gate, linear)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, linear = ctx.saved_tensors
        gate_NF, linear_NF, grad_NF = _rows(gate), _rows(linear), _rows(grads[0])
        gate_grad = torch.empty_like(gate, memory_format=torch.contiguous_format)
        linear_grad = torch.empty_like(linear, memory_format=torch.contiguous_format)
        gate_grad_NF, linear_grad_NF = _rows(gate_grad), _rows(linear_grad)
        for part in _parts(gate_NF):
            gelu_CF, gate_grad_NF[part] = _gelu_and_gradient(gate_NF[part], grad_NF[part] * linear_NF[part])
            linear_grad_NF[part] = gelu_CF.mul_(grad_NF[part])
        return gate_grad, linear_grad


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """x/2 · (1 + tanh(k (x + c x³))), which is x · sigmoid(2k (x + c x³)).

    Made of whole vectors' operations, which stay in a CPU's cache, it takes half of the time of torch's own kernel.
    """
    if x.device.type != "cpu":
        return functional.gelu(x, approximate="tanh")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.square().mul_(SLOPE * CUBE).add_(SLOPE).mul_(x).sigmoid_().mul_(x)


def _gelu_and_gradient(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu(x) and grad · gelu'(x); with s the sigmoid, gelu' is s + x s (1 - s) · 2k (1 + 3c x²)."""
    if x.device.type != "cpu":
        return functional.gelu(x, approximate="tanh"), torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = x.square()
    sigmoid = square.mul(SLOPE * CUBE).add_(SLOPE).mul_(x).sigmoid_()
    gelu = sigmoid * x
    slope = square.mul_(3 * SLOPE * CUBE).add_(SLOPE).mul_(torch.addcmul(gelu, gelu, sigmoid, value=-1))
    return gelu, slope.add_(sigmoid).mul_(grad)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _parts(rows_ND: torch.Tensor) -> list[slice]:
    """Pieces that fit a CPU's cache; a GPU takes all rows at once."""
    count, width = rows_ND.shape
    on_cpu = rows_ND.device.type == "cpu"
    step = max(1, ELEMENTS_AT_ONCE * torch.get_num_threads() // width if on_cpu else count)
    return [slice(start, start + step) for start in range(0, count, step)]
