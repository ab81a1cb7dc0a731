"""Triton kernels of gated GELU. Importing this module needs Triton, which torch installs along with CUDA.

With s = sigmoid(2k (x + c x³)), gelu(x) = x s and gelu'(x) = s + x s (1 - s) · 2k (1 + 3c x²). Callers pass
`slope` 2k and `cube` c.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAM_SIZE = 1024  # elements of a program


def run_forward(gate: Tensor, linear: Tensor, slope: float, cube: float) -> Tensor:
    """Compute gelu(gate) · linear."""
    output = torch.empty_like(gate)
    count = gate.numel()
    _forward_kernel[(triton.cdiv(count, PROGRAM_SIZE),)](gate, linear, output, count, slope, slope * cube, PROGRAM_SIZE)
    return output


def run_backward(grad: Tensor, gate: Tensor, linear: Tensor, slope: float, cube: float) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `gate` and `linear`."""
    gate_grad, linear_grad = torch.empty_like(gate), torch.empty_like(linear)
    count = gate.numel()
    _backward_kernel[(triton.cdiv(count, PROGRAM_SIZE),)](
        grad, gate, linear, gate_grad, linear_grad, count, slope, slope * cube, PROGRAM_SIZE
    )
    return gate_grad, linear_grad


@triton.jit
def _forward_kernel(gate, linear, output, count, slope: tl.constexpr, slope_cube: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_inside = index < count
    x = tl.load(gate + index, mask=is_inside, other=0.0).to(tl.float32)
    y = tl.load(linear + index, mask=is_inside, other=0.0).to(tl.float32)
    gelu = x * tl.sigmoid(x * (slope + slope_cube * x * x))
    tl.store(output + index, (gelu * y).to(output.dtype.element_ty), mask=is_inside)


@triton.jit
def _backward_kernel(
    grad, gate, linear, gate_grad, linear_grad, count,
    slope: tl.constexpr, slope_cube: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    is_inside = index < count
    g = tl.load(grad + index, mask=is_inside, other=0.0).to(tl.float32)
    x = tl.load(gate + index, mask=is_inside, other=0.0).to(tl.float32)
    y = tl.load(linear + index, mask=is_inside, other=0.0).to(tl.float32)
    square = x * x
    s = tl.sigmoid(x * (slope + slope_cube * square))
    derivative = s + x * s * (1.0 - s) * (slope + 3.0 * slope_cube * square)
    tl.store(gate_grad + index, (g * y * derivative).to(gate_grad.dtype.element_ty), mask=is_inside)
    tl.store(linear_grad + index, (g * x * s).to(linear_grad.dtype.element_ty), mask=is_inside)
