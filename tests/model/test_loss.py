"""The chunked cross-entropy, compared with torch's over all logits."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from t5tune.model import loss as loss_module
from t5tune.model.load import load_base
from t5tune.model.loss import IGNORED_LABEL, CrossEntropy, HeadWeights, compute_summed_loss, compute_token_losses
from tests.support.models.model_types import load_stock

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
@pytest.mark.parametrize("cap", [None, 3.0])
def test_loss_and_gradients_equal_those_of_torch_in_fp64(
    smoothing: float, rows: bool, trained: bool, cap: float | None
) -> None:
    hidden, weight, row_values, labels = make_tensors(torch.float64)
    weight.requires_grad_(trained)
    leaves = [hidden, *([weight] if trained else []), *([row_values] if rows else [])]
    whole = weight.index_copy(0, torch.tensor(ROWS), row_values) if rows else weight
    logits = hidden @ whole.T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    plain = functional.cross_entropy(
        logits, labels, ignore_index=IGNORED_LABEL, reduction="sum", label_smoothing=smoothing
    )
    each = functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
    if smoothing:  # torch ignores the smoothed part of ignored labels, too, so the sums are comparable
        assert plain.isfinite()
    expected = torch.autograd.grad(plain * 0.37, leaves)
    head = HeadWeights(weight, row_values, torch.tensor(ROWS)) if rows else HeadWeights(weight)
    loss = compute_summed_loss(hidden, CrossEntropy(labels, smoothing), head, cap)
    found = torch.autograd.grad(loss * 0.37, leaves)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-13)
    torch.testing.assert_close(compute_token_losses(hidden, CrossEntropy(labels), head, cap), each, rtol=0, atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()


def test_losses_of_bf16_logits_are_summed_in_fp32() -> None:
    hidden, weight, rows, labels = make_tensors(torch.bfloat16)
    exact = functional.cross_entropy(
        hidden.double() @ weight.double().T, labels, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    in_bf16 = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    loss = compute_summed_loss(hidden, CrossEntropy(labels), HeadWeights(weight))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-4)
    assert abs(in_bf16.item() - exact.item()) > 10 * abs(loss.item() - exact.item())


def test_autocast_affects_only_the_product_with_the_weight() -> None:
    """Trained rows are multiplied in fp32, as they are without autocast if the weight is in bf16."""
    hidden, weight, rows, labels = make_tensors(torch.bfloat16)
    rows_KD, ids_K = rows.detach().float().requires_grad_(), torch.tensor(ROWS)
    results = []
    for weight_VD in (weight, weight.float()):
        head = HeadWeights(weight_VD, rows_KD, ids_K)
        with torch.autocast("cpu", torch.bfloat16, enabled=weight_VD.dtype == torch.float32):
            total = compute_summed_loss(hidden, CrossEntropy(labels), head)
            losses = compute_token_losses(hidden, CrossEntropy(labels), head)
        results.append((total, losses, *torch.autograd.grad(total, (hidden, rows_KD))))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_a_fully_trained_head_determines_the_losses(untied_base: Path) -> None:
    model = load_base(untied_base, torch.float32, torch.device("cpu"))
    model = get_peft_model(model, LoraConfig(target_modules=["q"], modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 11, 10]])}
    labels = torch.tensor([[11, 10, 1]])
    for _ in range(2):
        with torch.no_grad():
            logits = model(**inputs).logits
            losses = model(**inputs, labels=labels, reduction="none")
        torch.testing.assert_close(losses[0], functional.cross_entropy(logits[0], labels[0], reduction="none"))
        model.base_model.disable_adapter_layers()  # then the base's head gives the losses


def test_chunks_of_gpus_are_whole_tiles_of_matrix_products() -> None:
    sizes = {size: loss_module.choose_chunk_size(size, on_gpu=True) for size in (384, 32128, 250112, 256000)}
    assert sizes == {384: 87296, 32128: 1024, 250112: 256, 256000: 256}
    assert loss_module.choose_chunk_size(VOCABULARY, on_gpu=False) == 64
    with loss_module.use_gpu_chunks(32128):
        assert loss_module.choose_chunk_size(32128, on_gpu=False) == 1024
    assert loss_module.choose_chunk_size(VOCABULARY, on_gpu=False) == 64
    chunks = loss_module._slice_into_chunks(2000, 32128, torch.device("cuda"))
    assert chunks == [slice(0, 1024), slice(1024, 2048)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_tied_and_untied_heads_have_the_loss_of_stock_logits(model_type: str, tied: bool, tmp_path: Path) -> None:
    """transformers divides the logits of a tied T5 by √d_model, but not of an mT5."""
    shape = {"vocab_size": 90, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = CONFIG_MAPPING[model_type](**shape, decoder_start_token_id=0, tie_word_embeddings=tied)
    torch.manual_seed(3)
    stock = AutoModelForSeq2SeqLM.from_config(config)
    if not tied:
        stock.lm_head.weight = torch.nn.Parameter(torch.randn(90, 16))
        stock.config.tie_word_embeddings = False
    stock.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[5, 70, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 71, 10]])}
    labels = torch.tensor([[71, 10, 1]])
    model = load_base(tmp_path, torch.float32, torch.device("cpu"))
    assert (model.lm_head.weight is model.shared.weight) == tied
    with torch.no_grad():
        logits = load_stock(tmp_path)(**inputs).logits
        found = model(**inputs, labels=labels, reduction="none")
    torch.testing.assert_close(found[0], functional.cross_entropy(logits[0], labels[0], reduction="none"))
