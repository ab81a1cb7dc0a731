"""LongT5: its weights, and packed rows against padded batches and single examples of stock transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSeq2SeqLM, LongT5Config

from t5tune.commands.merge import merge
from t5tune.commands.train import train
from t5tune.inference.loading import load_adapter
from t5tune.model.attention.packing import can_pack, use_packing
from t5tune.model.batches import PackedCollator, PaddedCollator
from t5tune.model.load import load_base
from t5tune.model.loss import IGNORED_LABEL
from t5tune.settings import MergeSettings
from tests.support.models.bases import copy_pocket_tokenizer
from tests.support.models.checkpointing import enable_checkpointing
from tests.support.models.gradients import compute_gradients, compute_relative_error
from tests.support.models.gradients import make_examples as make_random_examples
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
KINDS = ("local", "transient-global")
SHAPE = {
    "d_model": 36, "d_kv": 5, "d_ff": 50, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3, "local_radius": 6,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VOCABULARY = 1536
# shorter than a sum's 16 tokens, longer than the neighborhood, and with tokens that don't fill a sum
LENGTHS = [(13, 7), (1, 12), (61, 3), (16, 1), (40, 18), (5, 2)]


def save_longt5(folder: Path, kind: str = "transient-global", **changes: Any) -> Path:
    """Save a random LongT5 with stock transformers, and the config.json of the published ones: untied in name only."""
    torch.manual_seed(5)
    config = LongT5Config(
        **SHAPE | changes, vocab_size=VOCABULARY, encoder_attention_type=kind, tie_word_embeddings=False
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "bias" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def write_published_config(folder: Path) -> None:
    """Replace the config.json with one of the time before `scale_decoder_outputs`."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["scale_decoder_outputs"]
    path.write_text(json.dumps(values | {"tie_word_embeddings": False}))


def add_own_head(folder: Path) -> torch.Tensor:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.randn(tensors["shared.weight"].shape) * 0.2
    save_file(tensors, path, {"format": "pt"})
    return tensors["lm_head.weight"]


def make_examples(lengths: list[tuple[int, int]] = LENGTHS) -> list[Any]:
    return make_random_examples(lengths, VOCABULARY)


def compute_loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(**batch, reduction="sum")
    return loss.item(), compute_gradients(model, loss)


def compute_logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("published", [False, True])
def test_a_file_without_a_head_has_unscaled_tied_logits(kind: str, published: bool, tmp_path: Path) -> None:
    base = save_longt5(tmp_path, kind)
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    if published:
        write_published_config(base)
    stock = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    model = load_base(base, torch.float32, CPU)
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    (example,) = make_examples([(40, 9)])
    batch = PaddedCollator(0, 0)([example])
    with torch.no_grad():
        expected = compute_logits(stock, batch)
        torch.testing.assert_close(compute_logits(model, batch), expected, rtol=0, atol=1e-6)
        loss = functional.cross_entropy(expected[0], batch["labels"][0], reduction="sum")
        assert model(**batch, reduction="sum").item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_file_with_a_head_is_untied(tmp_path: Path) -> None:
    base = save_longt5(tmp_path)
    head = add_own_head(base)
    model = load_base(base, torch.float32, CPU)
    assert model.lm_head.weight.equal(head)
    assert model.shared.weight.equal(load_file(base / "model.safetensors")["shared.weight"])
    batch = PaddedCollator(0, 0)(make_examples([(40, 9)]))
    labels = batch.pop("labels")
    with torch.no_grad():
        hidden = model.architecture.compute_hidden_states(model, **batch)
        torch.testing.assert_close(compute_logits(model, batch), hidden @ head.T)
        model(**batch, labels=labels, reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [None, False, True])  # whether it is reentrant
def test_packed_padded_and_single_examples_have_the_same_gradients(
    kind: str, checkpointing: bool | None, tmp_path: Path
) -> None:
    """transformers computes attention's softmax in fp32 whatever the dtype, which limits the precision of padding."""
    base = save_longt5(tmp_path, kind)
    model = load_base(base, torch.float64, CPU).requires_grad_(True).train()
    examples = make_examples()
    padded_loss, padded = compute_loss_and_gradients(model, PaddedCollator(0, 0)(examples))
    alone = [compute_loss_and_gradients(model, PaddedCollator(0, 0)([example])) for example in examples]
    if checkpointing is not None:
        enable_checkpointing(model, reentrant=checkpointing)
        model.enable_input_require_grads()
    assert can_pack(model)
    use_packing(model)
    packed_loss, packed = compute_loss_and_gradients(model, PackedCollator(0, 0)(examples))
    assert packed_loss == pytest.approx(padded_loss, rel=1e-7)
    assert packed_loss == pytest.approx(sum(loss for loss, _ in alone), rel=1e-7)
    assert packed.keys() == padded.keys() == {name for name, _ in model.named_parameters()}
    assert all(value.any() for value in packed.values())
    for name, value in packed.items():
        assert compute_relative_error(value, padded[name]) < 1e-6, name
        assert compute_relative_error(value, sum(each.get(name, 0) for _, each in alone)) < 1e-6, name
    each_packed = [compute_loss_and_gradients(model, PackedCollator(0, 0)([example])) for example in examples]
    for name, value in packed.items():
        assert compute_relative_error(value, sum(each[name] for _, each in each_packed)) < 1e-12, name


@pytest.mark.parametrize("kind", KINDS)
def test_segments_without_sums_have_the_padded_gradients(kind: str, tmp_path: Path) -> None:
    """All sources are shorter than 16 tokens. Weights that only sums use get zeros."""
    model = load_base(save_longt5(tmp_path, kind), torch.float64, CPU).requires_grad_(True).train()
    examples = make_examples([(5, 3), (15, 2), (1, 4)])
    _, expected = compute_loss_and_gradients(model, PaddedCollator(0, 0)(examples))
    use_packing(model)
    _, found = compute_loss_and_gradients(model, PackedCollator(0, 0)(examples))
    assert found.keys() >= expected.keys()
    for name, value in found.items():
        if name in expected and expected[name].any():
            assert compute_relative_error(value, expected[name]) < 1e-6, name
        else:
            assert not value.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_reentrant_checkpointing_gives_a_frozen_bias_no_gradient(kind: str, tmp_path: Path) -> None:
    """Reentrant checkpointing marks all outputs of a block as requiring one."""
    model = load_base(save_longt5(tmp_path, kind), torch.float32, CPU).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".q.weight", ".v.weight")))
    enable_checkpointing(model, reentrant=True)
    model.enable_input_require_grads()
    use_packing(model)
    needs: list[bool] = []
    for module in model.encoder.modules():
        if type(module).__name__ in ("LongT5LocalAttention", "LongT5TransientGlobalAttention"):
            module.register_forward_hook(lambda *arguments: needs.append(arguments[2][1].requires_grad))
    _, found = compute_loss_and_gradients(model, PackedCollator(0, 0)(make_examples()))
    assert needs == [False] * 6  # three blocks, forward and recomputed
    assert all(name.endswith((".q.weight", ".v.weight")) for name in found)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is computed."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_of_3000_tokens_needs_no_square(kind: str, tmp_path: Path) -> None:
    shape = {"num_layers": 2, "num_heads": 2, "local_radius": 127, "num_decoder_layers": 1}
    base = save_longt5(tmp_path, kind, **shape)
    stock = AutoModelForSeq2SeqLM.from_pretrained(base).double().eval()
    model = load_base(base, torch.float64, CPU)
    use_packing(model)
    examples = make_examples([(3000, 9), (9, 4), (140, 5)])
    with torch.no_grad():
        logits = torch.cat([compute_logits(stock, PaddedCollator(0, 0)([each]))[0] for each in examples])
        expected = functional.cross_entropy(logits, torch.cat([torch.tensor(each.target_T) for each in examples]))
        with LargestTensor() as largest:
            losses = model(**PackedCollator(0, 0)(examples), reduction="none")
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-6)
    num_tokens, num_seen = 25 * 128, 3 * 128 + 3000 // 16 + 10  # keys and sums for a block's tokens
    assert largest.size <= 2 * num_tokens * num_seen < 2 * 3000**2


def test_sums_of_different_segments_are_not_compared(tmp_path: Path) -> None:
    model = load_base(save_longt5(tmp_path, local_radius=31), torch.float32, CPU)
    use_packing(model)
    with torch.no_grad(), LargestTensor() as largest:
        model(**PackedCollator(0, 0)(make_examples([(320, 1)] * 20)), reduction="none")
    # a block has tokens of at most two segments, of 20 sums each
    assert largest.size <= 3 * 6400 * (3 * 32 + 2 * 20)


def test_a_merged_model_with_a_head_keeps_its_logits(conversations: Path, tmp_path: Path) -> None:
    """tests/end_to_end/test_families.py merges a published one, whose head is tied."""
    base = save_longt5(tmp_path / "base", "local")
    copy_pocket_tokenizer(base)
    add_own_head(base)
    train(make_settings(base, conversations, tmp_path / "run", max_steps=2, save_steps=2))
    settings = {"model_name_or_path": str(base), "adapter": tmp_path / "run", "output_dir": tmp_path / "merged"}
    merge(MergeSettings(**settings, verify=True))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged"))
    assert after == before
    batch = PaddedCollator(0, 0)(make_examples([(40, 9), (9, 4)]))
    kept = batch["labels"] != IGNORED_LABEL
    adapted = load_adapter(load_base(base, torch.float32, CPU), tmp_path / "run")
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = compute_logits(adapted, batch)[kept]
        for merged in (stock, load_base(tmp_path / "merged", torch.float32, CPU)):
            torch.testing.assert_close(compute_logits(merged, batch)[kept], expected, rtol=1e-4, atol=1e-5)
