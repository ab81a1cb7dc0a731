"""LoRA layers with fewer operations, compared with PEFT's and with the formula in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from t5tune.model.kernels import fused_lora
from t5tune.model.kernels.fused_lora import compute_lora_linear, use_fused_lora

TOKENS, WIDTH, OUT, RANK = 37, 24, 40, 4


def make_tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(2)
    shapes = (2, TOKENS, WIDTH), (OUT, WIDTH), (RANK, WIDTH), (OUT, RANK), (2, TOKENS, OUT)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, bound: float, is_quantized: bool, dropout: float
) -> None:
    """The adapter's matrices are in fp32 where the rest is in bf16, as with autocast."""
    hidden, weight, a, b, grad = make_tensors(dtype)
    if dtype == torch.bfloat16:
        a, b = a.float(), b.float()
    torch.manual_seed(3)
    mask = torch.native_dropout(torch.ones(2 * TOKENS, WIDTH, dtype=dtype), dropout, True)[1].view(2, TOKENS, WIDTH)
    assert mask.double().mean() == pytest.approx(1 - dropout, abs=0.05)
    wide = [tensor.to(dtype).double().requires_grad_() for tensor in (hidden, a, b)]
    kept = wide[0] * mask / (1 - dropout)
    expected = wide[0] @ weight.double().T + 1.7 * (kept @ wide[1].T) @ wide[2].T
    expected_gradients = torch.autograd.grad(expected, wide, grad.double())

    given = [tensor.clone().requires_grad_() for tensor in (hidden, a, b)]
    base_output = given[0] @ weight.T if is_quantized else None
    torch.manual_seed(3)
    found = compute_lora_linear(
        given[0], base_output, None if is_quantized else weight, given[1], given[2], 1.7, dropout, dtype
    )
    gradients = torch.autograd.grad(found, given, grad)
    assert found.dtype == dtype
    for ours, exact, tensor in zip((found, *gradients), (expected, *expected_gradients), (found, *given), strict=True):
        assert ours.dtype == tensor.dtype
        assert (ours.double() - exact).norm() <= bound * exact.norm()


def make_peft_model(**options: Any) -> nn.Module:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(WIDTH, OUT, bias=False))
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **options)
    return get_peft_model(model, config)


def pretend_to_be_on_a_gpu(tensor: torch.Tensor) -> torch.Tensor:
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    return tensor.as_subclass(OnGpu)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that compute a layer here instead of in PEFT."""
    made: list[Any] = []
    monkeypatch.setattr(
        fused_lora, "compute_lora_linear", lambda *args: made.append(args) or compute_lora_linear(*args)
    )
    return made


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize(
    ("options", "is_fused"),
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"lora_dropout": 0.9}, True),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
    ],
)
def test_only_plain_lora_is_fused(options: dict[str, Any], is_fused: bool, calls: list[Any]) -> None:
    """As in an evaluation, so without dropout."""
    model = make_peft_model(**options).eval()
    x = torch.randn(3, 5, WIDTH)
    expected = model(x)
    use_fused_lora(model)
    assert torch.equal(model(x), expected)  # on a CPU, PEFT computes all of it
    assert not calls
    found = model(pretend_to_be_on_a_gpu(x))
    assert len(calls) == is_fused
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


def make_base_bf16(model: Any) -> None:
    model.base_model.model[0].base_layer.bfloat16()


def train_base(model: Any) -> None:
    model.base_model.model[0].base_layer.requires_grad_(True)


def shard_as_zero_3(model: Any) -> None:
    model.base_model.model[0].lora_A["default"].weight.ds_id = 0


def use_two_adapters(model: Any) -> None:
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    "change",
    [
        make_base_bf16,
        train_base,
        shard_as_zero_3,
        use_two_adapters,
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.model[0].merge(),
    ],
)
def test_peft_computes_all_other_adapters(change: Callable[[Any], None], calls: list[Any]) -> None:
    model = make_peft_model()
    change(model)
    x = torch.randn(3, 5, WIDTH, dtype=model.base_model.model[0].weight.dtype)
    expected = model(x)
    use_fused_lora(model)
    assert torch.equal(model(pretend_to_be_on_a_gpu(x)).as_subclass(torch.Tensor), expected)
    assert not calls
