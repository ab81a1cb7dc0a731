"""The kernels of gated GELU, run by Triton's interpreter on a CPU, compared with the formula in fp64."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from t5tune.model.kernels.gated_gelu import find_kernel_problem
from tests.support.paths import REPOSITORY

SCRIPT = """
import json, torch
from t5tune.model.kernels.gated_gelu import find_kernel_problem, gated_gelu

assert find_kernel_problem(torch.device("cpu")) is None
errors = []
torch.manual_seed(0)
for shape in ((7, 300), (1, 5), (2, 3, 1024)):  # less than one block, some blocks and a remainder, whole blocks
    gate, linear, grad = 6 * torch.randn(shape), torch.randn(shape), torch.randn(shape)
    gate.requires_grad_(), linear.requires_grad_()
    output = gated_gelu(gate, linear)
    x, y = (tensor.detach().double().requires_grad_() for tensor in (gate, linear))
    exact = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) * y
    pairs = [(output, exact), *zip(torch.autograd.grad(output, [gate, linear], grad),
                                   torch.autograd.grad(exact, [x, y], grad.double()))]
    errors += [float((found - wide).norm() / wide.norm()) for found, wide in pairs]
print(json.dumps(errors))
"""


def test_outputs_and_gradients_are_those_of_the_formula() -> None:
    """In a separate process, since Triton reads the variable when it is imported."""
    pytest.importorskip("triton", reason="Triton isn't installed, as always without CUDA")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 9
    assert max(errors) < 1e-6


def test_a_failing_kernel_is_explained_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernel works on this machine")
    problem = find_kernel_problem(torch.device("cuda"))
    assert re.search("CUDA|NVIDIA", problem)
    assert "\n" not in problem
