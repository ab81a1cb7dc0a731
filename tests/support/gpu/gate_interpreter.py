"""Run the kernels of gated GELU in Triton's interpreter on a CPU, and compare them with the formula in fp64.

    TRITON_INTERPRET=1 python -m tests.support.gpu.gate_interpreter

Prints a JSON line:
    errors: the largest error by dtype, where 1 is the largest error of rounding an exact result.
    problem, wrong: what the check before a run finds, and what it finds in a derivative with a wrong factor.
    last: whether the last elements of tensors with more than 2³¹ elements are right.
"""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import interpreter

from t5tune.model.kernels import gated_gelu_kernels as kernels
from t5tune.model.kernels.gated_gelu import CUBE, SLOPE, find_kernel_problem, gated_gelu
from tests.support.gpu.triton_interpreter import correct_bf16

CPU = torch.device("cpu")
# less than one program's elements, some programs and a remainder, whole programs
SHAPES = ((7, 300), (1, 5), (2, 3, 1024))
HUGE = 2**31 + 1000


def compute(gate: torch.Tensor, linear: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compute the output and the gradients in fp64, as Hendrycks and Gimpel 2016 define the approximation."""
    x, y = (tensor.detach().double().requires_grad_() for tensor in (gate, linear))
    output = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) * y
    return output.detach(), *torch.autograd.grad(output, (x, y), grad.double())


def measure_errors(dtype: torch.dtype) -> float:
    """Measure the largest error of the output and the gradients, in roundings."""
    torch.manual_seed(0)
    largest = 0.0
    for shape in SHAPES:
        gate, linear = ((scale * torch.randn(shape)).to(dtype).requires_grad_() for scale in (3, 1))
        grad = torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))  # not contiguous
        output = gated_gelu(gate, linear)
        found = output.detach(), *torch.autograd.grad(output, (gate, linear), grad)
        for ours, exact in zip(found, compute(gate, linear, grad), strict=True):
            unit = torch.finfo(dtype).eps / 2
            error = (ours.double() - exact).abs() / (unit * exact.abs() + 2**-22)
            largest = max(largest, float(error.max()))
    return largest


def check_last_elements() -> bool:
    """Run the last program of each kernel on tensors with more elements than int32 can count, which fill no memory."""
    builder: Any = interpreter.interpreter_builder
    programs = triton.cdiv(HUGE, kernels.PROGRAM_SIZE)
    builder.set_grid_idx = lambda *_: setattr(builder, "grid_idx", (programs - 1, 0, 0))
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # it would write all of the memory to itself
    given, *outputs = (torch.empty(HUGE, dtype=torch.float16) for _ in range(4))
    torch.manual_seed(1)
    given[-500:] = torch.randn(500)
    tail, options = given[-500:], (HUGE, SLOPE, SLOPE * CUBE, kernels.PROGRAM_SIZE)
    kernels._forward_kernel[(1,)](given, given, outputs[0], *options)
    kernels._backward_kernel[(1,)](given, given, given, *outputs[1:], *options)
    expected = compute(tail, tail, tail)
    return all(
        torch.allclose(each[-500:].double(), exact, rtol=1e-3, atol=1e-6)
        for each, exact in zip(outputs, expected, strict=True)
    )


def find_wrong_derivative() -> str | None:
    """Run the check before a run on kernels whose derivative has 2 in place of 3."""
    text = Path(kernels.__file__).read_text().replace("3.0 * slope_cube", "2.0 * slope_cube")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "wrong.py")  # Triton reads a kernel's source
        file.write_text(text)
        spec = importlib.util.spec_from_file_location("wrong", file)
        wrong = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(wrong)
        sys.modules[kernels.__name__] = wrong
        try:
            return find_kernel_problem(CPU)
        finally:
            sys.modules[kernels.__name__] = kernels


def main() -> None:
    correct_bf16()
    parts: dict[str, Callable[[], Any]] = {
        "errors": lambda: {
            str(dtype): measure_errors(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)
        },
        "problem": lambda: find_kernel_problem(CPU),
        "wrong": find_wrong_derivative,
        "last": check_last_elements,
    }
    print(json.dumps({name: part() for name, part in parts.items()}))


if __name__ == "__main__":
    main()
