"""T5Gemma and T5Gemma 2: loading, packed rows, soft caps and fused layers, compared with stock transformers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM

from t5tune.checkpoints.base import read_config
from t5tune.families import find_architecture
from t5tune.model.attention.gemma import attend
from t5tune.model.attention.packing import can_pack, switch_off_attention_dropout, use_packing
from t5tune.model.batches import PackedCollator, PaddedCollator
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.load import load_base
from t5tune.model.loss import IGNORED_LABEL
from tests.support.models.checkpointing import enable_checkpointing
from tests.support.models.gemma_models import EOI, KINDS, WINDOW, make_gemma, make_gemma_config
from tests.support.models.gradients import assert_same_gradients, compute_gradients, make_examples

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LENGTHS = [(13, 7), (5, 12), (61, 3), (9, 18), (1, 2), (30, 25)]
EXAMPLES = make_examples(LENGTHS, 480, first_id=3)  # without the token for the end of an image
make_padded, make_packed = PaddedCollator(0, 2), PackedCollator(2, 0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gemma")
    return {kind: make_gemma(kind, folder / kind) for kind in KINDS}


def load(base: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Load a base as for training; its norms, which transformers computes in fp32, are exact in fp64."""
    model = load_base(base, dtype, CPU)
    model.requires_grad_(True)
    use_packing(model)
    use_fused_layers(model)
    return model


def list_losses(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    losses_BT = model(**inputs, reduction="none").detach()
    return losses_BT[inputs["labels"] != IGNORED_LABEL]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loaded_model_has_the_logits_of_stock_transformers(kind: str, bases: dict[str, Path]) -> None:
    stock = AutoModelForSeq2SeqLM.from_pretrained(bases[kind], attn_implementation="eager").eval()
    ours = load_base(bases[kind], torch.float32, CPU)
    assert max(LENGTHS)[0] > 2 * WINDOW
    for example in EXAMPLES:
        inputs = {name: value for name, value in make_padded([example]).items() if name != "labels"}
        with torch.inference_mode():
            torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, rtol=1e-4, atol=1e-5)
    shapes = {name: tuple(value.shape) for name, value in ours.named_parameters(remove_duplicate=False)}
    assert find_architecture(read_config(bases[kind]), bases[kind]).derive_shapes() == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_has_the_logits_of_its_examples(kind: str, bases: dict[str, Path]) -> None:
    model = load(bases[kind]).eval()
    packed, *singles = (
        {name: value for name, value in batch.items() if name != "labels"}
        for batch in (make_packed(EXAMPLES), *(make_padded([example]) for example in EXAMPLES))
    )
    with torch.inference_mode():
        found = model(**packed).logits[0]
        alone = [model(**single).logits[0] for single in singles]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_summed_loss_equals_that_from_stock_capped_logits(kind: str, bases: dict[str, Path]) -> None:
    stock = AutoModelForSeq2SeqLM.from_pretrained(bases[kind], attn_implementation="eager").double().eval()
    ours = load(bases[kind])
    for inputs in (make_padded([example]) for example in EXAMPLES):
        (label,) = inputs["labels"]
        logits = stock(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        expected = functional.cross_entropy(logits[0], label, reduction="sum", label_smoothing=0.1)
        found = ours(**inputs, reduction="sum", label_smoothing=0.1)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        losses = functional.cross_entropy(logits[0], label, reduction="none")
        torch.testing.assert_close(list_losses(ours, inputs), losses, rtol=1e-5, atol=1e-6)
        assert (ours.architecture.logit_cap is None) == (kind == "t5gemma2")


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.variants(
    *(f"{kind}-None" for kind in KINDS), "t5gemma-True", "t5gemma2-capped-False",
)  # fmt: skip
def test_packed_rows_equal_a_padded_batch_and_single_examples(
    kind: str, checkpointing: bool | None, bases: dict[str, Path]
) -> None:
    model = load(bases[kind]).train()
    assert can_pack(model)
    singles = [make_padded([example]) for example in EXAMPLES]
    alone = [compute_gradients(model, model(**single, reduction="sum")) for single in singles]
    expected = {name: sum((each[name] for each in alone), torch.zeros(())) for name in alone[0]}
    losses = torch.cat([list_losses(model, single) for single in singles])
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
        model.enable_input_require_grads()
    for make_batch in (make_padded, make_packed):
        batch = make_batch(EXAMPLES)
        loss = model(**batch, reduction="sum")
        assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-13)
        assert_same_gradients(compute_gradients(model, loss), expected, 1e-10, floor=1e-6)
        torch.testing.assert_close(list_losses(model, batch), losses, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_losses_agree_under_bf16_autocast(kind: str, bases: dict[str, Path]) -> None:
    model = load(bases[kind], torch.float32)
    exact = list_losses(load(bases[kind]), make_padded(EXAMPLES))
    for make_batch in (make_padded, make_packed):
        with torch.autocast("cpu", torch.bfloat16):
            losses = list_losses(model, make_batch(EXAMPLES))
        assert losses.dtype == torch.float32
        assert (losses - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_padding_equals_stock_generation(kind: str, bases: dict[str, Path]) -> None:
    stock = AutoModelForSeq2SeqLM.from_pretrained(bases[kind], attn_implementation="eager").eval()
    ours = load_base(bases[kind], torch.float32, CPU)
    inputs = {name: make_padded(EXAMPLES)[name] for name in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"max_new_tokens": 3 * WINDOW, "do_sample": False}
    for beams in (1, 3):
        expected = stock.generate(**inputs, num_beams=beams, **options)
        assert torch.equal(ours.generate(**inputs, num_beams=beams, **options), expected)
        assert (expected[:, 0] == 2).all()  # it starts with bos
        assert expected.shape[1] > 2 * WINDOW


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_fully_masked_rows_give_no_nan(dtype: torch.dtype, cap: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 16).to(dtype).requires_grad_() for heads in (6, 2, 2))
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, :, 4] = False
    output = attend(query, key, value, mask, 0.3, cap, 0.0)
    assert output.dtype == dtype
    assert output.isfinite().all()
    gradients = torch.autograd.grad(output[:, [0, 3, 8]].float().sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)
    scores = query.double() @ key.double().repeat_interleave(3, 1).mT * 0.3
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights @ value.double().repeat_interleave(3, 1)).transpose(1, 2)
    rows = [0, 3, 8]
    bound = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 3e-2)
    assert (output.double() - expected)[:, rows].abs().max() < bound


def test_the_end_of_an_image_is_embedded_as_in_transformers(bases: dict[str, Path]) -> None:
    stock = AutoModelForSeq2SeqLM.from_pretrained(bases["t5gemma2"]).model.decoder.embed_tokens
    ours = copy.deepcopy(stock)
    use_fused_layers(ours)
    ids = torch.tensor([[5, EOI, 0, 7], [EOI, EOI, 3, 1]])
    results = [
        (output := layer(ids), *torch.autograd.grad(output.pow(3).sum(), layer.parameters())) for layer in (stock, ours)
    ]
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(results[0][0][0, 1], stock.weight[EOI])


@pytest.mark.parametrize("kind", ["t5gemma2", "t5gemma-9b-2b"])
def test_the_dropout_of_attention_can_be_switched_off(kind: str, tmp_path: Path) -> None:
    config = make_gemma_config(kind)
    config.attention_dropout = 0.5
    model = AutoModelForSeq2SeqLM.from_config(type(config).from_dict(config.to_dict())).train()
    model.save_pretrained(tmp_path / "base")
    ours = load(tmp_path / "base", torch.float32).train()
    for batch in (make_packed(EXAMPLES), make_padded(EXAMPLES)):
        assert not torch.equal(list_losses(ours, batch), list_losses(ours, batch))
    switch_off_attention_dropout(ours)
    for batch in (make_packed(EXAMPLES), make_padded(EXAMPLES)):
        assert torch.equal(list_losses(ours, batch), list_losses(ours, batch))
