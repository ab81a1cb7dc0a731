"""The kernels of attention over packed rows compile for NVIDIA GPUs, and fit in their shared memory."""

import json
from typing import Any

import pytest

from tests.support.gpu.fake_cuda_stubs import StubsUnavailable
from tests.support.gpu.fake_cuda_watch import COMPILED_BACKWARD, COMPILED_FORWARD
from tests.support.gpu.pretend_gpu import GPUS
from tests.support.gpu.shared_memory import GOLDEN_FILE, WIDTHS, compile_kernels, measure, read_versions
from tests.support.gpu.triton_folder import has_triton
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow
needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton isn't installed: make build/triton/installed")
GOLDEN = json.loads(GOLDEN_FILE.read_text())


def run(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except StubsUnavailable as error:
        pytest.skip(f"no kernels can be compiled for a GPU here: {error}")


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kinds_of_attention_compile(capability: int) -> None:
    found = run(compile_kernels, capability, 64)
    assert len(found) == 6
    for name, kernels in found.items():
        attention = [kernel for kernel in kernels if kernel.startswith("triton_tem_")]
        has_dropout = name.endswith("0.1")
        assert len(attention) == (4 if has_dropout else 2), name  # forward and backward, twice with dropout
        if has_dropout:
            assert len(kernels) == 4 + COMPILED_FORWARD + COMPILED_BACKWARD, name
        assert max(kernels.values()) <= GPUS[capability][1], name


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("capability", GPUS)
def test_kernels_take_the_shared_memory_of_the_table(capability: int, width: int) -> None:
    """After an update of torch: `python -m tests.support.gpu.shared_memory --update`, and `make generate`."""
    if read_versions() != {name: GOLDEN[name] for name in ("torch", "triton")}:
        pytest.skip("the table is for different releases of torch and Triton")
    for stages, expected in GOLDEN["gpus"][str(capability)]["sizes"][str(width)].items():
        assert run(measure, capability, width, stages) == expected, stages


def test_kernels_fit_on_each_gpu_of_the_table() -> None:
    """The last number of stages fits, and a run tries fewer stages only where more don't fit."""
    assert f"TRITON_RELEASE := {GOLDEN['triton']}\n" in (REPOSITORY / "Makefile").read_text()
    for capability, (_, available) in GPUS.items():
        for width in WIDTHS:
            *refused, last = GOLDEN["gpus"][str(capability)]["sizes"][str(width)].values()
            assert max(last.values()) <= available
            assert all(max(each.values()) > available for each in refused)
