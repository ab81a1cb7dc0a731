"""The kernels of gated GELU, run by Triton's interpreter on a CPU, compared with the formula in fp64."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from t5tune.model.kernels.gated_gelu import find_kernel_problem
from tests.support.gpu.triton_folder import make_environment
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow

MAX_ROUNDINGS = {"torch.bfloat16": 1, "torch.float16": 1, "torch.float32": 16}  # fp32 is what they compute in


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Results of a separate process, since Triton reads the variable when it is imported."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.gpu.gate_interpreter"]
    environment = make_environment(TRITON_INTERPRET="1")
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if "No module named 'triton'" in done.stderr:
        pytest.skip("Triton isn't installed: make build/triton/installed")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_outputs_and_gradients_are_those_of_the_formula(found: dict[str, Any]) -> None:
    assert found["errors"].keys() == MAX_ROUNDINGS.keys()
    for dtype, error in found["errors"].items():
        assert error <= MAX_ROUNDINGS[dtype], dtype


def test_tensors_may_have_more_elements_than_int32_counts(found: dict[str, Any]) -> None:
    assert found["last"] is True


def test_the_check_before_a_run_finds_a_wrong_derivative(found: dict[str, Any]) -> None:
    assert found["problem"] is None
    assert re.fullmatch(r"the kernel's values differ by \d+\.\d%", found["wrong"])


def test_a_failing_kernel_is_explained_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernel works on this machine")
    problem = find_kernel_problem(torch.device("cuda"))
    assert re.search("CUDA|NVIDIA", problem)
    assert "\n" not in problem
