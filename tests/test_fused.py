"""The norms and the activation that training computes in fewer passes, against transformers' own."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, MT5Config, T5Config, UMT5Config

from t5tune.model import fused
from t5tune.model.fused import use_fused

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
    x = (10 * torch.randn(2, fused.ROWS_AT_ONCE + 7, SHAPE["d_model"])).to(values)  # more than one piece, and a rest
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


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_whole_model_gives_the_same_logits_and_gradients(kind: str) -> None:
    stock = model_of(kind)
    ours = copy.deepcopy(stock)
    use_fused(ours)
    ids = torch.randint(1, 60, (3, 150))
    found, expected = ({}, {})
    for model, gradients in ((ours, found), (stock, expected)):
        logits = model(input_ids=ids, decoder_input_ids=ids[:, :40]).logits
        logits.square().sum().backward()
        gradients |= {name: value.grad for name, value in model.named_parameters()} | {"logits": logits.detach()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm().clamp_min(1e-6), name


def test_backward_needs_the_inputs_alone() -> None:
    """What autograd keeps of a norm and an activation, beside their weights, is what went in and a number a row."""
    model = model_of("flan")
    use_fused(model)
    for module, width in ((part(model, "T5LayerNorm"), SHAPE["d_model"]), (part(model, "NewGELUActivation"), 64)):
        x = torch.randn(1, 500, width, requires_grad=True)
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x.mul(1))
        assert sum(kept.values()) <= 4 * (500 * width + 500 + width)
