"""Gated GELU on GPUs: gelu(gate) · linear in one kernel, and both gradients in a second kernel.

    if (problem := find_kernel_problem(device)) is None:
        inner_NF = gated_gelu(gate_NF, linear_NF)

Both are operators of torch, so that torch's tools see each as one operation. The kernels compute in fp32 and round
once. Triton compiles them in the first call, which needs a C compiler.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from t5tune.formatting import shorten
from t5tune.io.reasons import join_lines
from t5tune.model.kernels.build_tools import find_missing_compiler

SLOPE, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715  # 2k and c of GELU's tanh approximation
MAX_DIFFERENCE = 2**-8  # the largest relative error of a number that is rounded to bf16, once
TINY = 2**-10  # near 0, the errors of fp32 count
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.library.custom_op("t5tune::gated_gelu", mutates_args=())
def gated_gelu(gate: Tensor, linear: Tensor) -> Tensor:
    """Compute gelu(gate) · linear, with GELU's tanh approximation, for contiguous tensors of one dtype."""
    from t5tune.model.kernels.gated_gelu_kernels import run_forward

    return run_forward(gate, linear, SLOPE, CUBE)


@torch.library.custom_op("t5tune::gated_gelu_backward", mutates_args=())
def gated_gelu_backward(grad: Tensor, gate: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `gate` and `linear`."""
    from t5tune.model.kernels.gated_gelu_kernels import run_backward

    return run_backward(grad, gate, linear, SLOPE, CUBE)


def _run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = gated_gelu_backward(grad.contiguous(), *ctx.saved_tensors)
    return gradients


gated_gelu.register_fake(lambda gate, linear: torch.empty_like(gate))
gated_gelu_backward.register_fake(lambda grad, gate, linear: (torch.empty_like(gate), torch.empty_like(linear)))
gated_gelu.register_autograd(_run_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def find_kernel_problem(device: torch.device) -> str | None:
    """Compare the kernels with torch's operations on a GPU. Return why they can't be used there, or None."""
    if (missing := find_missing_compiler(on_gpu=True)) is not None:
        return f"{missing.what}; {missing.fix}"
    try:
        differences = _compare_with_torch(device)
    except Exception as error:  # Triton, its C compiler and the GPU's driver raise errors of many kinds
        return f"{type(error).__name__}: {shorten(join_lines(error), 200)}"
    if all(each <= MAX_DIFFERENCE for each in differences):  # NaN isn't less than any number
        return None
    return f"the kernel's values differ by {max(differences):.1%}"


def _compare_with_torch(device: torch.device) -> list[float]:
    """Compute the largest relative difference of a value, for the output and both gradients."""
    values = torch.linspace(-4, 4, 3 * 1030, device=device).view(3, 1030)
    gate, linear = values.bfloat16().requires_grad_(), values.flip(1).bfloat16().requires_grad_()
    exact_gate, exact_linear = (each.detach().float().requires_grad_() for each in (gate, linear))
    exact = functional.gelu(exact_gate, approximate="tanh") * exact_linear
    expected = exact, *torch.autograd.grad(exact.sum(), (exact_gate, exact_linear))
    output = gated_gelu(gate, linear)
    found = output, *torch.autograd.grad(output.float().sum(), (gate, linear))
    pairs = zip(found, expected, strict=True)
    return [float(((a.detach().float() - b).abs() / (b.abs() + TINY)).max()) for a, b in pairs]
