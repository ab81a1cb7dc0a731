"""Packed rows have the same logits, losses and gradients as padded batches, for each kind of head and adapter."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, BartConfig, MT5Config, T5Config, UMT5Config

from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.tokens.encoding import Example
from t5tune.model.attention import t5 as t5_attention
from t5tune.model.attention.packing import can_pack, use_packing
from t5tune.model.attention.segments import Segments, segment_attention
from t5tune.model.batches import PackedCollator, PaddedCollator
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.model.loss import IGNORED_LABEL
from t5tune.progress import silent
from t5tune.settings import QuantizationSettings
from t5tune.settings.groups.lora import LoraSettings
from t5tune.training.build_model import build_model
from tests.support.models.checkpointing import enable_checkpointing
from tests.support.models.gradients import assert_same_gradients, compute_gradients
from tests.support.models.gradients import make_examples as make_random_examples
from tests.support.train_runs import make_settings

SHAPE = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
CONFIGS = {
    "t5": T5Config(**SHAPE, feed_forward_proj="relu", tie_word_embeddings=True),
    "flan-t5": T5Config(**SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "flan-ul2": T5Config(**SHAPE, feed_forward_proj="gated-silu", tie_word_embeddings=False),
    "mt5": MT5Config(**SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5": UMT5Config(**SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
LENGTHS = [(5, 3), (41, 1), (1, 29), (200, 64), (17, 150), (33, 33)]


def make_examples(lengths: list[tuple[int, int]] = LENGTHS, vocabulary: int = SHAPE["vocab_size"]) -> list[Example]:
    return make_random_examples(lengths, vocabulary)


def make_random_model(kind: str, dtype: torch.dtype, dropout: float = 0.0) -> Any:
    torch.manual_seed(3)
    config = copy.deepcopy(CONFIGS[kind])
    config.dropout_rate = dropout
    config.decoder_start_token_id = 0
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_()
    return model.train()


def compute_padded_loss(model: Any, batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (summed cross-entropy, the logits of the target tokens) with transformers' own forward."""
    inputs = PaddedCollator(0, 0)(batch)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
    return loss, logits[labels != IGNORED_LABEL]


def compute_packed_loss(
    model: Any, batch: list[Example], divides_rows: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = PackedCollator(0, 0, divides_rows)(batch)
    labels_T = inputs.pop("labels")[0]
    logits_TV = model(**inputs).logits[0][labels_T != IGNORED_LABEL]
    return functional.cross_entropy(logits_TV, labels_T[labels_T != IGNORED_LABEL], reduction="sum"), logits_TV


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_all_gradients_equal_those_of_the_padded_batch(kind: str) -> None:
    model = make_random_model(kind, torch.float64)
    loss, logits = compute_padded_loss(model, make_examples())
    expected = compute_gradients(model, loss)
    assert can_pack(model)
    use_packing(model)
    packed, packed_logits = compute_packed_loss(model, make_examples())
    found = compute_gradients(model, packed)
    assert (packed_logits - logits).abs().max() < 1e-12 * logits.abs().max()
    assert packed.item() == pytest.approx(loss.item(), rel=1e-12)
    assert_same_gradients(found, expected, 1e-12)


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_the_packing_argument_logits_and_generation_are_unchanged(kind: str) -> None:
    model = make_random_model(kind, torch.float32).eval()
    inputs = PaddedCollator(0, 0)(make_examples())
    inputs.pop("labels")
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        use_packing(model)
        assert torch.equal(model(**inputs).logits, logits)
        again = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(again, ids)


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "all-linear dora": {"lora_target_modules": ["all-linear"], "use_dora": True},
    "norms and biases": {"modules_to_save": ["layer_norm", "relative_attention_bias"]},
    "nf4": {"q_lora": True},
    "checkpointing": {"checkpointing": False},
    "reentrant": {"checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.variants(
    "untied-lora",
    "untied-nf4",
    "untied-reentrant",
    "tied-all-linear dora",
    "tied-checkpointing",
    "tied-norms and biases",
)
def test_packed_adapters_and_token_rows_get_the_padded_gradients(variant: str, base: Path) -> None:
    """In fp32, with rows of added tokens and the chunked loss, on a tied and an untied base."""
    options = dict(VARIANTS[variant])
    quantization = QuantizationSettings(q_lora=options.pop("q_lora", False))
    reentrant = options.pop("checkpointing", None)
    torch.manual_seed(0)
    model = load_base(base, torch.float32, torch.device("cpu"), quantization)
    model.config.dropout_rate = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "key_value_proj_dim"):
            module.dropout = 0.0
    model, _ = add_lora(model, base, LoraSettings(lora_dropout=0.0, **options), [1500, 1501, 1502], torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if reentrant is not None:
        model.enable_input_require_grads()
        enable_checkpointing(model.base_model.model, reentrant)
    model.train()
    batch = make_examples(vocabulary=1536)
    batch[3].source_S[::7] = 1500
    batch[4].target_T[::5] = 1501
    expected = compute_gradients(model, compute_padded_loss(model, batch)[0])
    use_packing(model)
    found = compute_gradients(model, model(**PackedCollator(0, 0)(batch), reduction="sum"))
    assert any("trainable_tokens_delta" in name for name in found)
    assert_same_gradients(found, expected, 1e-5)


@pytest.mark.parametrize("is_on", [True, False])
def test_attention_dropout_can_be_switched_off_alone(
    is_on: bool, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    settings = make_settings(untied_base, conversations, tmp_path, attention_dropout=is_on, lora_dropout=0.2)
    cache = SimpleNamespace(manifest={"added_token_ids": [1500]}, label_task=None)
    loaded: Any = SimpleNamespace(base=untied_base, base_metadata={}, examples=cache, files={}, deepspeed=None)
    device, plan = torch.device("cpu"), make_run_plan(settings).model
    model = build_model(plan, loaded, settings.model_dump(), device, silent).model
    layers = [module for module in model.modules() if type(module).__name__ == "T5Attention"]
    assert [layer.dropout for layer in layers] == [0.1 if is_on else 0.0] * 6
    others = {module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert others == {0.1, 0.2}


def test_reentrant_checkpointing_gives_the_bias_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bias that does, torch wouldn't choose its fused kernels."""
    model = make_random_model("t5", torch.float32).requires_grad_(False)
    model.enable_input_require_grads()
    enable_checkpointing(model, reentrant=True)
    use_packing(model)
    needs: list[bool] = []

    def note_bias(*args: Any) -> torch.Tensor:
        if (bias := args[5]) is not None:
            needs.append(bias.requires_grad)
        return segment_attention(*args)

    monkeypatch.setattr(t5_attention, "segment_attention", note_bias)
    compute_packed_loss(model, make_examples())[0].backward()
    assert needs == [False] * 12  # self-attention in six blocks, forward and recomputed


def test_attention_dropout_has_the_same_statistics_in_every_segment() -> None:
    """With values of 1, outputs average kept / (1 - p): their mean is 1, their variance p / (1 - p) / length."""
    torch.manual_seed(0)
    lengths = [64, 128, 8]
    query, key = torch.zeros(1, 512, 200, 4), torch.zeros(1, 512, 200, 4)
    output = segment_attention(query, key, torch.ones(1, 512, 200, 4), lengths, lengths, None, dropout=0.25)
    for part, length in zip(output[0, :, :, 0].split(lengths), lengths, strict=True):
        assert part.mean().item() == pytest.approx(1, abs=0.01)
        assert part.var().item() == pytest.approx(0.25 / 0.75 / length, rel=0.1)


@pytest.mark.slow
@pytest.mark.long
def test_dropout_has_the_same_statistics_packed_as_padded() -> None:
    model = make_random_model("flan-t5", torch.float32, dropout=0.3)
    use_packing(model)
    batch = make_examples([(12, 6)] * 2)
    with torch.no_grad():
        padded = torch.stack([compute_padded_loss(model, batch)[1] for _ in range(250)])
        packed = torch.stack([compute_packed_loss(model, batch)[1] for _ in range(250)])
    assert packed.std(0).mean().item() == pytest.approx(padded.std(0).mean().item(), rel=0.03)
    assert (packed.mean(0) - padded.mean(0)).abs().mean() < 0.1 * packed.std(0).mean()


def test_can_pack_is_false_for_other_attention_classes() -> None:
    config = BartConfig(vocab_size=120, d_model=32, encoder_layers=1, decoder_layers=1)
    assert not can_pack(AutoModelForSeq2SeqLM.from_config(config))


def test_packed_collator_describes_the_segments() -> None:
    batch = PackedCollator(9, 0)(make_examples([(3, 2), (4, 1)]))
    first, second = make_examples([(3, 2), (4, 1)])
    assert batch["packing"] == Segments((3, 4), (2, 1))
    assert batch["input_ids"].tolist() == [[*first.source_S, *second.source_S]]
    assert batch["decoder_input_ids"].tolist() == [[9, first.target_T[0], 9]]
    assert batch["labels"].tolist() == [[*first.target_T, *second.target_T]]
