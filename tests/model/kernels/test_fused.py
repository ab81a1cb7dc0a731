"""The norms and activations with less memory traffic, compared with transformers."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, UMT5Config

from t5tune.model.kernels import fused
from t5tune.model.kernels.fused import compile_layers, normalize_in_one_kernel, use_fused_layers
from t5tune.progress import Event, Note, silent
from tests.model.kernels.test_fused_lora import pretend_to_be_on_a_gpu
from tests.support.models.gemma_models import make_gemma_config
from tests.support.models.gradients import compute_relative_error, run_layer
from tests.support.processes.runs import LONG

SHAPE = {"vocab_size": 64, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
CONFIGS = {
    "t5": T5Config(**SHAPE, feed_forward_proj="relu"),
    "flan": T5Config(**SHAPE, feed_forward_proj="gated-gelu"),
    "mt5": MT5Config(**SHAPE),
    "umt5": UMT5Config(**SHAPE),
}


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    is_gemma = kind.startswith("t5gemma")
    model = AutoModelForSeq2SeqLM.from_config(make_gemma_config(kind) if is_gemma else CONFIGS[kind]).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.0 if is_gemma else 1.0, 0.3)
    return model


def find_module(model: nn.Module, ending: str) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__.endswith(ending))


@pytest.mark.parametrize("kind", [*CONFIGS, "t5gemma", "t5gemma2"])
@pytest.mark.parametrize(
    ("values", "weights"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_norms_have_the_bits_of_transformers(kind: str, values: torch.dtype, weights: torch.dtype) -> None:
    if kind.startswith("t5gemma") and values == torch.float64:
        pytest.skip("transformers computes Gemma's norms in fp32")
    stock = find_module(make_model(kind), "Norm").to(weights)
    ours, width = copy.deepcopy(stock), stock.weight.numel()
    use_fused_layers(ours)
    # more than one chunk, and a remainder
    x = (10 * torch.randn(2, fused.ELEMENTS_PER_CHUNK * torch.get_num_threads() // width + 7, width)).to(values)
    grad = torch.randn(x.shape).to(stock(x).dtype)
    expected, found = run_layer(stock, x, grad), run_layer(ours, x, grad)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert torch.equal(found[0], expected[0])
    bound = 2e-2 if torch.bfloat16 in (values, weights) else 1e-6
    assert all(compute_relative_error(*pair) < bound for pair in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("kind", ["flan", "t5gemma", "t5gemma2"])
def test_chunked_gated_activations_equal_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = find_module(make_model(kind), "GatedActDense" if kind == "flan" else "MLP").double()
    ours, gate = copy.deepcopy(stock), stock.wi_0 if kind == "flan" else stock.gate_proj
    monkeypatch.setattr(fused, "ELEMENTS_PER_CHUNK", 7 * gate.out_features)
    use_fused_layers(ours)
    x = 100 * torch.randn(3, 41, gate.in_features, dtype=torch.float64)
    assert gate(x).abs().max() > 10
    grad = torch.randn_like(x)
    for found, expected in zip(run_layer(ours, x, grad), run_layer(stock, x, grad), strict=True):
        assert compute_relative_error(found, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # raised within torch.compile
@pytest.mark.parametrize(
    ("kind", "use"), [*((kind, use_fused_layers) for kind in CONFIGS), *([("flan", compile_layers)] if LONG else [])]
)
def test_a_whole_model_has_the_same_logits_and_gradients(
    kind: str, use: Callable[[nn.Module], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if use is compile_layers and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stock = make_model(kind)
    ours = copy.deepcopy(stock)
    use(ours)
    ids = torch.randint(1, 60, (3, 150))
    found, expected = ({}, {})
    for model, gradients in ((ours, found), (stock, expected)):
        logits = model(input_ids=ids, decoder_input_ids=ids[:, :40]).logits
        logits.square().sum().backward()
        gradients |= {name: value.grad for name, value in model.named_parameters()} | {"logits": logits.detach()}
    assert found.keys() == expected.keys()
    assert any(tmp_path.glob("**/*.so")) is (use is compile_layers)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm().clamp_min(1e-6), name


def test_gelu_and_its_gradient_nearly_equal_torch() -> None:
    x, grad = torch.linspace(-20, 20, 100_001), torch.randn(100_001)
    gelu, gradient = fused._gelu_and_gradient(x, grad)
    wide, wide_grad = x.double(), grad.double()
    expected = torch.nn.functional.gelu(wide, approximate="tanh")
    expected_gradient = torch.ops.aten.gelu_backward(wide_grad, wide, approximate="tanh")
    assert torch.equal(gelu, fused._gelu(x))
    assert ((gelu - expected).abs() <= 2e-7 * wide.abs().clamp_min(1)).all()
    assert ((gradient - expected_gradient).abs() <= 3e-6 * wide_grad.abs()).all()


def test_only_inputs_are_saved_for_the_backward_pass() -> None:
    """Except for weights, autograd saves only the inputs of a layer, and one number per row of a norm."""
    model = make_model("flan")
    use_fused_layers(model)

    def gated(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = fused._GatedGelu.apply(x, x.mul(1))
        return product

    cases = [
        (find_module(model, "T5LayerNorm"), SHAPE["d_model"], 500),
        (find_module(model, "NewGELUActivation"), 64, 0),
        (gated, 64, 500 * 64),
    ]
    for module, width, more in cases:
        x = torch.randn(1, 500, width, requires_grad=True)
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x.mul(1))
        assert sum(kept.values()) <= 4 * (500 * width + more + width)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_gpu_norm_and_its_gradients_follow_the_formula(dtype: torch.dtype, bound: float) -> None:
    """Under autocast, too, which would return fp32. Here it runs as torch's operators for CPUs."""
    torch.manual_seed(5)
    x, grad = (10 * torch.randn(3, 7, 48, dtype=torch.float64)).to(dtype), torch.randn(3, 7, 48).to(dtype)
    weight = torch.randn(48, dtype=torch.float64).to(dtype)
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    exact = wide[1] * wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = exact, *torch.autograd.grad(exact, wide, grad.double())
    given = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = normalize_in_one_kernel(*given, 1e-6)
    found = output, *torch.autograd.grad(output, given, grad)
    for ours, exactly in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exactly).norm() <= bound * exactly.norm()
    if dtype == torch.bfloat16:  # rounded once
        assert torch.equal(output, exact.to(dtype))


def test_a_gate_kernel_that_fails_is_reported_and_replaced() -> None:
    stock = make_model("flan")
    ours, events = copy.deepcopy(stock), list[Event]()
    if torch.cuda.is_available():
        pytest.skip("the kernel compiles on this machine")
    use_fused_layers(ours, torch.device("cuda"), events.append)
    (note,) = events
    assert isinstance(note, Note)
    assert note.warning
    assert note.text.startswith("gated activations use torch's operations, which is slower on a GPU: ")
    assert not fused._has_gate_kernel(stock, torch.device("cuda"), silent)
    ids = torch.randint(1, 60, (2, 9))
    torch.testing.assert_close(
        ours(input_ids=ids, decoder_input_ids=ids).logits, stock(input_ids=ids, decoder_input_ids=ids).logits
    )


@pytest.mark.parametrize(("weights", "is_used"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_gpu_norm_needs_weights_and_values_of_one_dtype(
    weights: torch.dtype, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = find_module(make_model("flan"), "T5LayerNorm").to(weights)
    ours, x, calls = copy.deepcopy(stock), torch.randn(2, 7, SHAPE["d_model"]).bfloat16(), list[Any]()
    use_fused_layers(ours)
    monkeypatch.setattr(fused, "normalize_in_one_kernel", lambda *args: calls.append(args) or stock(x))
    assert torch.equal(ours(pretend_to_be_on_a_gpu(x)).as_subclass(torch.Tensor), stock(x))
    assert len(calls) == is_used


@pytest.mark.parametrize(("dtype", "is_used"), [(torch.bfloat16, True), (torch.float32, True), (torch.float64, False)])
def test_the_gate_kernel_is_used_in_its_dtypes(
    dtype: torch.dtype, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = find_module(make_model("flan"), "GatedActDense").to(dtype)
    ours, x, calls = copy.deepcopy(stock), torch.randn(2, 7, SHAPE["d_model"]).to(dtype), list[Any]()
    monkeypatch.setattr(fused, "find_kernel_problem", lambda device: None)
    monkeypatch.setattr(fused, "gated_gelu", lambda *args: calls.append(args) or stock.act(args[0]) * args[1])
    use_fused_layers(ours, torch.device("cuda"))
    torch.testing.assert_close(ours(pretend_to_be_on_a_gpu(x)).as_subclass(torch.Tensor), stock(x))
    assert len(calls) == is_used


def test_the_gate_kernel_gets_contiguous_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    monkeypatch.setattr(fused, "gated_gelu", lambda *args: given.extend(args))
    fused._compute_gated_gelu(True, *(pretend_to_be_on_a_gpu(torch.randn(8, 6).T) for _ in range(2)))
    assert [tensor.is_contiguous() for tensor in given] == [True, True]


def test_a_gpu_computes_a_whole_batch_at_once() -> None:
    rows_ND = torch.empty(3 * fused.ELEMENTS_PER_CHUNK * torch.get_num_threads() // 64, 64)
    assert len(fused._slice_rows(rows_ND)) == 3
    assert fused._slice_rows(pretend_to_be_on_a_gpu(rows_ND)) == [slice(0, len(rows_ND))]
