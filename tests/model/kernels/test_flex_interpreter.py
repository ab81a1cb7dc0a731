"""The kernels that torch compiles for attention over packed rows, run by Triton's interpreter, compared with fp64.

Other tests compute attention by torch's own formulas, which never read the lists of blocks.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest

from t5tune.model.kernels.flex_check import KEY, OUTPUT, QUERY, SOURCES, TARGETS, VALUE, compute_bound
from tests.support.gpu.flex_interpreter import BF16_CASES, LONG_CASES, SHORT_CASES, Case
from tests.support.gpu.triton_folder import make_environment
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow
MAX_ERROR = 2e-6  # in fp32
NAMES = {"output": OUTPUT, "query": QUERY, "key": KEY, "value": VALUE}


def run_cases(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Run cases in a separate process: Triton reads a variable when it is imported, and torch believes in a GPU."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.gpu.flex_interpreter", *names]
    done = subprocess.run(command, cwd=REPOSITORY, env=make_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    if reason := found.get("unavailable"):
        pytest.skip(f"the kernels can't be interpreted here: {reason}")
    return found


def assert_right(case: Case, errors: dict[str, float]) -> None:
    assert errors.pop("unaligned") == 0
    assert len(errors) == (4 if case.has_gradients else 1)
    assert all(error < MAX_ERROR for error in errors.values()), errors


def test_compiled_kernels_equal_attention_in_fp64() -> None:
    found = run_cases([*SHORT_CASES])
    for name, case in SHORT_CASES.items():
        assert_right(case, found[name])


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_CASES)
def test_compiled_kernels_have_the_gradients_of_fp64(name: str) -> None:
    assert_right(LONG_CASES[name], run_cases([name])[name])


@pytest.mark.long
@pytest.mark.parametrize("name", BF16_CASES)
def test_rounding_to_bf16_explains_the_self_check_s_bounds(name: str) -> None:
    """The errors are at least a quarter of the bounds, and at most three quarters, so no right kernel is refused."""
    assert (BF16_CASES[name].sources, BF16_CASES[name].targets) == (SOURCES, TARGETS)
    errors = run_cases([name])[name]
    assert errors.pop("unaligned") == 0
    for result, error in errors.items():
        bound = compute_bound(NAMES[result], BF16_CASES[name].dropout)
        assert 0.25 * bound < error < 0.75 * bound, result
