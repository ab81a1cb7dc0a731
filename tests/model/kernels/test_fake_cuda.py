"""Steps, evaluation and generation on fake CUDA tensors: devices, waits for the GPU, copies, dtypes, launches."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from tests.support.gpu.fake_cuda import CASES, GOLDEN_FILE, LARGE_CASES
from tests.support.paths import REPOSITORY
from tests.support.processes.runs import LONG

pytestmark = [pytest.mark.slow, pytest.mark.long]  # one run of several models takes half a minute

QUICK = {"packed", "packed, NF4", "losses, packed", "generation", "mistake: mask on the CPU", "mistake: item"}
CHOSEN = {name: case for name, case in CASES.items() if LONG or name in QUICK}
TRAINING = [name for name, case in CHOSEN.items() if case.task == "train" and case.mistake is None]
LOSSES = [name for name, case in CHOSEN.items() if case.task == "losses"]
GENERATION = [name for name, case in CHOSEN.items() if case.task == "generate"]
AUTOCAST = [name for name in GENERATION if CHOSEN[name].autocast]
SCORES = [name for name, case in CHOSEN.items() if case.task == "scores"]
LARGE = [*LARGE_CASES] if LONG else []
TOKEN_ROW_PRODUCTS = 2  # the logits of the trained rows, in fp32, and their gradient
MAX_LAUNCHES = 6000
LORA_LAYERS = 12  # the queries and values of two layers in the encoder and, with cross-attention, in the decoder


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Results of each case, from a separate process, which can't use torch for anything else."""
    command = [sys.executable, "-m", "tests.support.gpu.fake_cuda", *([] if LONG else CHOSEN)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if reason := result.get("unavailable"):
        pytest.skip(f"no fake CUDA tensors: {reason}")
    cases: dict[str, Any] = result["cases"]
    return cases


def without_lines(places: dict[str, int]) -> Counter[str]:
    """Counts by file and kind, without line numbers."""
    counts: Counter[str] = Counter()
    for place, count in places.items():
        counts[re.sub(r":\d+", "", place)] += count
    return counts


@pytest.mark.parametrize("name", [*TRAINING, *LOSSES, *SCORES, *GENERATION, *LARGE])
def test_no_tensor_is_left_on_the_cpu(found: dict[str, Any], name: str) -> None:
    assert "error" not in found[name]
    assert found[name]["total"] > 0


@pytest.mark.parametrize("name", [*TRAINING, *LARGE])
def test_a_step_waits_only_for_the_gradient_norm(found: dict[str, Any], name: str) -> None:
    assert without_lines(found[name]["waits"]) == {"t5tune/training/non_finite.py item": 1}


@pytest.mark.parametrize("name", [*TRAINING, *LARGE])
def test_a_step_copies_only_its_batch_and_does_not_block(found: dict[str, Any], name: str) -> None:
    uses_flex = name not in CASES or CASES[name].flex and CASES[name].settings.get("packing") != "off"
    expected = {"accelerate/utils/operations.py copy to cuda": 4 if "padded" in name else 3}
    if uses_flex and "loop" not in name:
        expected["t5tune/model/kernels/flex_attention.py copy to cuda"] = 1
    assert without_lines(found[name]["copies"]) == expected


@pytest.mark.parametrize("name", LOSSES)
def test_measuring_losses_waits_once_per_batch(found: dict[str, Any], name: str) -> None:
    waits = without_lines(found[name]["waits"])
    assert waits.pop("t5tune/evaluation/scoring.py tolist") == 1
    # transformers asks whether a mask has padding, in encoder and decoder
    assert waits == ({"transformers/masking_utils.py item": 2} if "padded" in name else {})


@pytest.mark.parametrize("name", GENERATION)
def test_only_transformers_waits_for_the_gpu_during_generation(found: dict[str, Any], name: str) -> None:
    waits = without_lines(found[name]["waits"])
    ours = {place: count for place, count in waits.items() if place.startswith("t5tune")}
    assert ours == {"t5tune/inference/generation.py tolist": 1}
    assert waits["transformers/generation/utils.py item"] >= 3  # whether all replies have ended, after each token


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_measured_in_the_run_s_dtype_without_dropout(found: dict[str, Any], name: str) -> None:
    products, launches = dict(found[name]["products"]), found[name]["launches"]
    assert products.pop("float32") == 1  # the logits of the trained rows
    assert set(products) == {"bfloat16"}
    assert launches["addmm_"] == LORA_LAYERS  # each is computed by fused_lora.py, which adds the adapter's output
    assert "native_dropout" not in launches


@pytest.mark.parametrize("name", SCORES)
def test_evaluate_uses_the_kernels_of_training(found: dict[str, Any], name: str) -> None:
    launches, in_training = found[name]["launches"], found["losses, packed, DeepSpeed"]["launches"]
    for kernel in ("flex_attention", "gated_gelu", "_fused_rms_norm", "addmm_", "mm"):
        assert launches[kernel] == in_training[kernel], kernel
    assert "_scaled_dot_product_efficient_attention" not in launches


@pytest.mark.parametrize("name", AUTOCAST)
def test_generation_in_training_computes_products_in_bf16(found: dict[str, Any], name: str) -> None:
    """The adapter's matrices are in fp32, the base's in bf16."""
    assert found[name]["products"].keys() == {"bfloat16"}
    # two layers, in the encoder and for each of three tokens in the decoder
    assert found[name]["launches"]["gated_gelu"] == 2 + 3 * 2


@pytest.mark.parametrize("name", TRAINING)
def test_products_are_computed_in_the_dtype_of_the_run(found: dict[str, Any], name: str) -> None:
    products = dict(found[name]["products"])
    if "fp32" in name:
        assert set(products) == {"float32"}
        return
    assert products.pop("float32", 0) == (0 if "full" in name else TOKEN_ROW_PRODUCTS)
    assert set(products) == {"bfloat16"}


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("mask on the CPU", "FakeTensorDeviceMismatchError: .* cuda:0 and cpu"),
        ("boolean index", "DynamicOutputShapeException: aten.nonzero"),
    ],
)
@pytest.mark.variants(1)
def test_mistakes_that_end_a_step_are_caught(found: dict[str, Any], mistake: str, error: str) -> None:
    assert re.match(error, found[f"mistake: {mistake}"]["error"])


@pytest.mark.parametrize(
    ("mistake", "kind", "expected"),
    [
        ("item", "waits", {"tests/support/gpu/fake_cuda.py item": 1}),
        ("fp32 product", "products", {"float32": 2}),
        ("hidden copy", "copies", {"tests/support/gpu/fake_cuda.py blocking copy to cuda": 1}),
    ],
)
@pytest.mark.variants(1)
def test_other_mistakes_are_counted_with_their_places(
    found: dict[str, Any], mistake: str, kind: str, expected: dict[str, int]
) -> None:
    right, wrong = found["packed"], found[f"mistake: {mistake}"]
    assert "error" not in wrong
    assert without_lines(wrong[kind]) - without_lines(right[kind]) == expected
    assert wrong["total"] > right["total"]


def test_the_launches_are_those_of_the_golden_file(found: dict[str, Any]) -> None:
    """After a change that is meant to launch other kernels: `python -m tests.support.gpu.fake_cuda --update`."""
    golden = json.loads(GOLDEN_FILE.read_text())
    for library in (torch, transformers, accelerate):
        expected, version = golden.pop(library.__name__), library.__version__.partition("+")[0]
        if version != expected:
            pytest.skip(f"the launches were counted with {library.__name__} {expected}, and this is {version}")
    totals = {name: case["total"] for name, case in found.items() if not name.startswith("mistake")}
    assert totals == {name: total for name, total in golden.items() if LONG or name in CHOSEN}


@pytest.mark.long
def test_a_step_of_flan_t5_large_launches_few_kernels(found: dict[str, Any]) -> None:
    """The number decides whether the GPU waits for the CPU, which takes some microseconds for each launch."""
    assert found["Flan-T5-large"]["total"] <= MAX_LAUNCHES


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch needs no compiler for this")
def test_without_a_compiler_the_tool_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "tests.support.gpu.fake_cuda", "packed"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"unavailable": "no-compiler: no such C++ compiler"}
