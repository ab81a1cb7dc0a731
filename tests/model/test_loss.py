"""The chunked cross-entropy, compared with torch's over all logits."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from t5tune.model import loss as loss_module
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.model.loss import IGNORED_LABEL, HeadLoss, compute_summed_cross_entropy
from t5tune.settings.lora import LoraSettings

TOKENS, VOCABULARY, WIDTH = 300, 97, 16
ROWS = [5, 90, 17]


@pytest.fixture(autouse=True)
def use_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 64 * VOCABULARY)


def make_tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).to(dtype)
    rows = torch.randn(len(ROWS), WIDTH, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    labels[::7] = IGNORED_LABEL
    labels[1::9] = ROWS[0]
    return hidden, weight, rows, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_loss_and_gradients_equal_those_of_torch_in_fp64(smoothing: float, rows: bool, trained: bool) -> None:
    hidden, weight, row_values, labels = make_tensors(torch.float64)
    weight.requires_grad_(trained)
    leaves = [hidden, *([weight] if trained else []), *([row_values] if rows else [])]
    whole = weight.index_copy(0, torch.tensor(ROWS), row_values) if rows else weight
    plain = functional.cross_entropy(
        hidden @ whole.T, labels, ignore_index=IGNORED_LABEL, reduction="sum", label_smoothing=smoothing
    )
    if smoothing:  # torch ignores the smoothed part of ignored labels, too, so the sums are comparable
        assert plain.isfinite()
    expected = torch.autograd.grad(plain * 0.37, leaves)
    given = (row_values, torch.tensor(ROWS)) if rows else (None, None)
    loss = compute_summed_cross_entropy(hidden, weight, labels, smoothing, *given)
    found = torch.autograd.grad(loss * 0.37, leaves)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-13)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()


def test_losses_of_bf16_logits_are_summed_in_fp32() -> None:
    hidden, weight, rows, labels = make_tensors(torch.bfloat16)
    exact = functional.cross_entropy(
        hidden.double() @ weight.double().T, labels, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    in_bf16 = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    loss = compute_summed_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-4)
    assert abs(in_bf16.item() - exact.item()) > 10 * abs(loss.item() - exact.item())


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_the_head_returns_the_loss_while_labels_are_set(kind: str, request: pytest.FixtureRequest) -> None:
    """With trained token rows; the tied base scales the decoder's output."""
    base: Path = request.getfixturevalue(f"{kind}_base")
    model = load_base(base, torch.float32, torch.device("cpu"))
    model, _ = add_lora(model, base, LoraSettings(lora_dropout=0.0), [1500, 1501], torch.float32)
    head_loss = HeadLoss(model, 0.0)
    inputs = {"input_ids": torch.tensor([[5, 1500, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 1501, 10]])}
    labels = torch.tensor([[1501, 10, 1500]])
    trained = [value for value in model.parameters() if value.requires_grad]
    logits = model(**inputs).logits
    plain = functional.cross_entropy(logits[0], labels[0], reduction="sum")
    expected = torch.autograd.grad(plain, trained, allow_unused=True)
    with head_loss.replace_logits_with_sum(labels):
        loss = model(**inputs).logits
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(**inputs).logits, logits)
