"""The kernels of attention over packed rows compile for NVIDIA GPUs. They can't run here."""

import json
import subprocess
import sys
from typing import Any

import pytest

from t5tune.model.kernels.flex_check import FEW_STAGES
from tests.support.gpu.fake_cuda_watch import COMPILED_BACKWARD, COMPILED_FORWARD
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow


def compile_kernels(*arguments: int) -> dict[str, dict[str, int]]:
    """Compile for a compute capability, a head width, and perhaps a number of stages."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.gpu.flex_compilation", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if reason := found.get("unavailable"):
        pytest.skip(f"no kernels can be compiled for a GPU here: {reason}")
    assert len(found) == 6
    for name, kernels in found.items():
        assert "error" not in kernels, name
    return found


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.variants("90")
def test_all_kinds_of_attention_compile(capability: int) -> None:
    for name, kernels in compile_kernels(capability, 64).items():
        attention = [kernel for kernel in kernels if kernel.startswith("triton_tem_")]
        has_dropout = name.endswith("0.1")
        assert len(attention) == (4 if has_dropout else 2), name  # forward and backward, twice with dropout
        if has_dropout:
            assert len(kernels) == 4 + COMPILED_FORWARD + COMPILED_BACKWARD, name


@pytest.mark.long
@pytest.mark.parametrize(("capability", "width", "available"), [(89, 128, 101_376), (100, 64, 232_448)])
def test_two_stages_fit_into_less_shared_memory(capability: int, width: int, available: int) -> None:
    """Heads of 128 on RTX 40, and of 64 on B200."""

    def measure(*stages: int) -> int:
        return max(
            size for kernels in compile_kernels(capability, width, *stages).values() for size in kernels.values()
        )

    assert measure() > available
    assert measure(FEW_STAGES) <= available
