"""The kernels of attention over packed rows compile for NVIDIA GPUs. They can't run here."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.fake_cuda_watch import COMPILED_BACKWARD, COMPILED_FORWARD
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.variants("90")
def test_all_kinds_of_attention_compile(capability: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.flex_compilation", str(capability)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if reason := found.get("unavailable"):
        pytest.skip(f"no kernels can be compiled for a GPU here: {reason}")
    assert len(found) == 6
    for name, kernels in found.items():
        assert "error" not in kernels, name
        attention = [kernel for kernel in kernels if kernel.startswith("triton_tem_")]
        has_dropout = name.endswith("0.1")
        assert len(attention) == (4 if has_dropout else 2), name  # forward and backward, twice with dropout
        if has_dropout:
            assert len(kernels) == 4 + COMPILED_FORWARD + COMPILED_BACKWARD, name
