"""A test of the tests: one mistake at a time in a copy of the package, and the test that must find it.

LONG_TESTS=1 pytest tests/model/kernels/test_mistakes.py -k "int32 or contiguous"
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.gpu.triton_folder import has_triton, make_environment
from tests.support.paths import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not has_triton(), reason="Triton isn't installed: make build/triton/installed"),
]
KERNELS = "t5tune/model/kernels"
TESTS = "tests/model/kernels"
GATE_TEST = f"{TESTS}/test_gated_gelu.py"
FORWARD_TEST = f"{TESTS}/test_flex_interpreter.py::test_compiled_kernels_equal_attention_in_fp64"
GRADIENTS_TEST = f"{TESTS}/test_flex_interpreter.py::test_compiled_kernels_have_the_gradients_of_fp64"
FLEX_TESTS = f"{TESTS}/test_flex_attention.py"


@dataclass(frozen=True)
class Mistake:
    """A replacement in a file, and the test that finds it. `right` occurs once in the file."""

    file: str
    right: str
    wrong: str
    test: str


def _of_gate(right: str, wrong: str, test: str = GATE_TEST) -> Mistake:
    return Mistake(f"{KERNELS}/gated_gelu_kernels.py", right, wrong, test)


def _of_flex(right: str, wrong: str, test: str = FORWARD_TEST) -> Mistake:
    return Mistake(f"{KERNELS}/flex_attention.py", right, wrong, test)


MISTAKES = {
    "int32 index": _of_gate(
        "block: tl.constexpr):\n    index = tl.program_id(0).to(tl.int64) *",
        "block: tl.constexpr):\n    index = tl.program_id(0) *",
    ),
    "int32 index, backward": _of_gate(
        "# fmt: skip\n    index = tl.program_id(0).to(tl.int64) *", "# fmt: skip\n    index = tl.program_id(0) *"
    ),
    "bf16 arithmetic": _of_gate("(gelu * y)", "(gelu.to(output.dtype.element_ty) * y)"),
    "bf16 arithmetic, backward": _of_gate("(g * y * derivative)", "((g * y).to(grad.dtype.element_ty) * derivative)"),
    "derivative": _of_gate("3.0 * slope_cube", "2.0 * slope_cube"),
    "gradient not contiguous": Mistake(f"{KERNELS}/gated_gelu.py", "grad.contiguous()", "grad", GATE_TEST),
    "gate not contiguous": Mistake(
        f"{KERNELS}/fused.py", "gated_gelu(gate.contiguous(), ", "gated_gelu(gate, ",
        f"{TESTS}/test_fused.py::test_the_gate_kernel_gets_contiguous_tensors",
    ),
    "blocks: the last is left out": _of_flex("< -(-high // BLOCK)[:, None]", "< (high // BLOCK)[:, None]"),
    "blocks: the first is left out": _of_flex(
        "is_seen = (column >= (low // BLOCK)[:, None])", "is_seen = (column >= -(-low // BLOCK)[:, None])"
    ),
    "blocks: several segments seen as one": _of_flex("    is_whole &= (first == last)[:, None]\n", ""),
    "blocks: later keys seen": _of_flex("np.minimum(high, first_query)\n", "np.minimum(high, first_query + BLOCK)\n"),
    "blocks: keys in place of queries": _of_flex(
        "is_partial.T, is_whole.T", "is_partial, is_whole", f"{GRADIENTS_TEST}[cross, pairs, dropout 0.0]"
    ),
    "blocks: unseen blocks first": _of_flex("np.argsort(~is_in", "np.argsort(is_in"),
    "cross-attention numbered by targets": _of_flex("(by_source, target_length)", "(targets, target_length)"),
    "distance off by one": _of_flex("distance + self.max_distance]", "distance + self.max_distance - 1]"),
    "blocks at a wrong offset": _of_flex("start += _align(math.prod(size))", "start += math.prod(size)"),
    "signed hash": _of_flex("(x ^ ((x >> 15) & 0x1FFFF))", "(x ^ (x >> 15))"),
    "uint8 segments": _of_flex(
        "np.repeat(np.arange(len(each)), ", "np.repeat(np.arange(len(each)).astype(np.uint8), ",
        f"{FLEX_TESTS}::test_blocks_are_those_of_create_block_mask",
    ),
    "unaligned blocks": _of_flex("BUFFER_ALIGNMENT = 4", "BUFFER_ALIGNMENT = 1"),
    "unaligned bias": Mistake(
        "t5tune/model/attention/t5.py", "BIAS_ALIGNMENT = 8", "BIAS_ALIGNMENT = 1",
        f"{FLEX_TESTS}::test_rows_of_the_loops_bias_are_aligned",
    ),
    "the CPU's chunks of the loss": Mistake(
        "t5tune/model/loss.py", 'on_gpu=device.type == "cuda"', "on_gpu=False",
        "tests/model/test_loss.py::test_chunks_of_gpus_are_whole_tiles_of_matrix_products",
    ),
    "the CPU's chunks of rows": Mistake(
        f"{KERNELS}/fused.py", 'on_cpu = rows_ND.device.type == "cpu"', "on_cpu = True",
        f"{TESTS}/test_fused.py::test_a_gpu_computes_a_whole_batch_at_once",
    ),
    "a loose check before a run": Mistake(
        f"{KERNELS}/flex_check.py", "return ROUNDING * ", "return 5 * ROUNDING * ",
        f"{TESTS}/test_flex_check.py::test_a_kernel_that_is_wrong_is_found",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests, so that the checkout never changes."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("t5tune", "tests", "templates"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def run_test(folder: Path, test: str) -> tuple[int, str]:
    """Run a test in the copy. Return the exit status and the output."""
    environment = make_environment(LONG_TESTS="1", PYTHONDONTWRITEBYTECODE="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-rs", "--tb", "line", test]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


run_right_test = cache(run_test)


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_fails_its_test(name: str, copy: Path) -> None:
    mistake = MISTAKES[name]
    status, output = run_right_test(copy, mistake.test)
    assert status == pytest.ExitCode.OK, output
    if "SKIPPED" in output:
        pytest.skip("its test can't run here")
    file = copy / mistake.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mistake.right) == 1
    file.write_text(text.replace(mistake.right, mistake.wrong), encoding="utf-8")
    status, output = run_test(copy, mistake.test)
    file.write_text(text, encoding="utf-8")
    assert status == pytest.ExitCode.TESTS_FAILED, output
