"""The norms and the activation that training computes in fewer passes, against transformers' own."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, UMT5Config

from t5tune.model import fused
from t5tune.model.fused import use_compiled, use_fused

SHAPE = {"vocab_size": 64, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2}
CONFIGS = {
    "t5": T5Config(**SHAPE, feed_forward_proj="relu"),
    "flan": T5Config(**SHAPE, feed_forward_proj="gated-gelu"),
    "mt5": MT5Config(**SHAPE),
    "umt5": UMT5Config(**SHAPE),
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[kind]).eval()
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


def part(model: nn.Module, ending: str) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__.endswith(ending))


@pytest.mark.parametrize("kind", CONFIGS)
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
def test_norms_are_transformers_to_the_bit_and_so_are_their_gradients_nearly(
    kind: str, values: torch.dtype, weights: torch.dtype
) -> None:
    stock = part(model_of(kind), "T5LayerNorm").to(weights)
    ours = copy.deepcopy(stock)
    use_fused(ours)
    length = fused.ELEMENTS_AT_ONCE * torch.get_num_threads() // SHAPE["d_model"] + 7  # more than one piece, and a rest
    x = (10 * torch.randn(2, length, SHAPE["d_model"])).to(values)
    grad = torch.randn(x.shape).to(stock(x).dtype)
    outputs, gradients = [], []
    for module in (stock, ours):
        given = x.clone().requires_grad_()
        output = module(given)
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output, [given, module.weight], grad))
    assert outputs[0].dtype == outputs[1].dtype
    assert torch.equal(*outputs)
    bound = 2e-2 if torch.bfloat16 in (values, weights) else 1e-6
    for expected, found in zip(*gradients, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).double().norm() < bound * expected.double().norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # what torch compiles with
@pytest.mark.parametrize(("kind", "use"), [*((kind, use_fused) for kind in CONFIGS), ("flan", use_compiled)])
def test_a_whole_model_gives_the_same_logits_and_gradients(
    kind: str, use: Callable[[nn.Module], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if use is use_compiled and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile makes its kernels with a C++ compiler, and there is none here")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stock = model_of(kind)
    ours = copy.deepcopy(stock)
    use(ours)
    ids = torch.randint(1, 60, (3, 150))
    found, expected = ({}, {})
    for model, gradients in ((ours, found), (stock, expected)):
        logits = model(input_ids=ids, decoder_input_ids=ids[:, :40]).logits
        logits.square().sum().backward()
        gradients |= {name: value.grad for name, value in model.named_parameters()} | {"logits": logits.detach()}
    assert found.keys() == expected.keys()
    assert any(tmp_path.glob("**/*.so")) is (use is use_compiled)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm().clamp_min(1e-6), name


def test_gated_products_and_their_gradients_are_transformers_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "ELEMENTS_AT_ONCE", 7 * SHAPE["d_ff"])
    stock = part(model_of("flan"), "GatedActDense").double()
    ours = copy.deepcopy(stock)
    use_fused(ours)
    x = 30 * torch.randn(3, 41, SHAPE["d_model"], dtype=torch.float64)  # gelu of up to ±30
    grad = torch.randn_like(x)
    outputs, gradients = [], []
    for module in (stock, ours):
        given = x.clone().requires_grad_()
        output = module(given)
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output, [given, *module.parameters()], grad))
    assert stock.wi_0(x).abs().max() > 10
    assert (outputs[1] - outputs[0]).norm() < 1e-12 * outputs[0].norm()
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).norm() < 1e-12 * expected.norm()


def test_the_closed_form_of_gelu_is_torchs_nearly_to_the_last_bit() -> None:
    x, grad = torch.linspace(-20, 20, 100_001), torch.randn(100_001)
    gelu, gradient = fused._gelu_and_gradient(x, grad)
    wide, wide_grad = x.double(), grad.double()
    expected = torch.nn.functional.gelu(wide, approximate="tanh")
    expected_gradient = torch.ops.aten.gelu_backward(wide_grad, wide, approximate="tanh")
    assert torch.equal(gelu, fused._gelu(x))
    assert ((gelu - expected).abs() <= 2e-7 * wide.abs().clamp_min(1)).all()
    assert ((gradient - expected_gradient).abs() <= 3e-6 * wide_grad.abs()).all()


def test_backward_needs_the_inputs_alone() -> None:
    """What autograd keeps of each, beside weights, is what went in and of norms a number a row."""
    model = model_of("flan")
    use_fused(model)

    def gated(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = fused._GatedGelu.apply(x, x.mul(1))
        return product

    cases = [
        (part(model, "T5LayerNorm"), SHAPE["d_model"], 500),
        (part(model, "NewGELUActivation"), 64, 0),
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
