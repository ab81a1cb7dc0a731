"""Encoders with a head of labels, compared with transformers' …ForTokenClassification."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5EncoderModel, T5GemmaConfig, T5GemmaEncoderModel

from t5tune.checkpoints.base import read_config
from t5tune.data.tokens.encoding import LabeledExample
from t5tune.errors import CheckpointError, ModelError, SettingsError
from t5tune.families import find_family
from t5tune.families.encoder import find_encoder_class
from t5tune.model.attention.packing import use_packing
from t5tune.model.batches import LabelCollator
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.labels import LabelScale
from t5tune.model.load import load_base
from t5tune.settings import QuantizationSettings
from tests.support.models.checkpointing import enable_checkpointing
from tests.support.models.gradients import assert_same_gradients, compute_gradients
from tests.support.models.label_models import (
    NAMES,
    TASKS,
    compute_stock_logits,
    load_stock_labels,
    make_labeled_examples,
    sum_losses,
)
from tests.support.models.model_types import make_checkpoint

CPU = torch.device("cpu")
KINDS = ("t5", "flan-t5", "mt5", "umt5", "t5gemma")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: make_checkpoint(kind, folder / kind) for kind in KINDS}


def load_pair(base: Path, kind: str) -> tuple[Any, Any]:
    """Load our model and the stock model, with the same random weights in fp64."""
    ours = load_base(base, torch.float64, CPU, task=TASKS[kind]).requires_grad_(True)
    # stock T5Gemma's sdpa has no soft cap
    stock = load_stock_labels(base, TASKS[kind], dtype=torch.float64, attn_implementation="eager")
    torch.manual_seed(2)
    for parameter in stock.parameters():  # large enough for attention and the position bias to matter
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def compute_padded_logits(stock: Any, batch: dict[str, Any], kind: str) -> torch.Tensor:
    """Compute the logits of a padded batch, averaged as a consumer of the merged checkpoint does."""
    mask_BS, logits_BSK = batch["attention_mask"], stock(batch["input_ids"], batch["attention_mask"]).logits
    mask_BS1 = mask_BS[..., None]
    return logits_BSK if TASKS[kind].per_token else (logits_BSK * mask_BS1).sum(1) / mask_BS1.sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.variants(
    "t5-tag",
    "t5-regress each",
    "flan-t5-classify",
    "mt5-several",
    "umt5-regress",
    "t5gemma-tag",
    "t5gemma-several",
    "t5gemma-classify",
)
def test_a_packed_row_has_the_gradients_of_the_stock_class(kind: str, task: str, bases: dict[str, Path]) -> None:
    ours, stock = load_pair(bases[kind], task)
    examples = make_labeled_examples(TASKS[task])
    padded, packed = (LabelCollator(TASKS[task], 0, is_packed)(examples) for is_packed in (False, True))
    labels = packed.pop("labels")
    if kind == "t5gemma":  # stock T5Gemma in fp64 gives NaN for rows that are padded beyond its window
        expected = sum_losses(TASKS[task], compute_stock_logits(stock, examples, TASKS[task]), labels)
    else:
        expected = sum_losses(TASKS[task], compute_padded_logits(stock, padded, task), padded["labels"])
    use_packing(ours)
    gradients = compute_gradients(stock, expected)
    assert len(gradients) == len(dict(ours.named_parameters()))
    # transformers computes T5Gemma's norms, and the fused layers all means of squares, in fp32
    bounds = {False: 1e-5 if kind == "t5gemma" else 1e-12, True: 1e-5}
    for is_fused, bound in bounds.items():
        if is_fused:
            use_fused_layers(ours)
        loss = sum_losses(TASKS[task], ours(**packed), labels)
        assert loss.item() == pytest.approx(expected.item(), rel=bound)
        assert_same_gradients(compute_gradients(ours, loss), gradients, bound, floor=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flan-t5", "t5gemma"])
def test_a_padded_batch_has_the_logits_of_its_texts(kind: str, bases: dict[str, Path]) -> None:
    for task in ("tag", "classify"):
        ours, stock = load_pair(bases[kind], task)
        examples = make_labeled_examples(TASKS[task])
        batch = LabelCollator(TASKS[task], 0, False)(examples)
        logits = ours(batch["input_ids"], batch["attention_mask"])
        if task == "tag":
            logits = torch.cat([row[: len(each.source_S)] for row, each in zip(logits, examples, strict=True)])[None]
        torch.testing.assert_close(logits, compute_stock_logits(stock, examples, TASKS[task]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(reentrant: bool, bases: dict[str, Path]) -> None:
    ours, _ = load_pair(bases["umt5"], "tag")
    use_packing(ours)
    batch = LabelCollator(TASKS["tag"], 0, True)(make_labeled_examples(TASKS["tag"]))
    labels = batch.pop("labels")
    expected = compute_gradients(ours, sum_losses(TASKS["tag"], ours(**batch), labels))
    ours.enable_input_require_grads()
    enable_checkpointing(ours.train(), reentrant)
    found = compute_gradients(ours, sum_losses(TASKS["tag"], ours(**batch), labels))
    assert_same_gradients(found, expected, 1e-12)


def test_a_new_head_starts_at_zero_in_fp32(bases: dict[str, Path]) -> None:
    quantization = QuantizationSettings(q_lora=True)
    for kind in ("t5", "t5gemma"):
        model = load_base(bases[kind], torch.bfloat16, CPU, quantization, task=TASKS["classify"])
        head = model.get_submodule(model.architecture.head)
        assert head.weight.dtype == torch.float32
        assert not head.weight.any()
        assert not head.bias.any()
        linear = {type(each).__name__ for name, each in model.named_modules() if name.endswith((".q", ".q_proj"))}
        assert linear == {"Linear4bit"}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            head.weight.normal_()
            logits = model(torch.tensor([[5, 6, 7]]))
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


def test_numbers_start_at_their_mean(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_base(bases["t5"], torch.float32, CPU, task=TASKS["regress"], label_scale=LabelScale(8.0, 20.0))
    assert model(torch.tensor([[5, 6, 7]])).tolist() == [[2.5]]
    stock = load_stock_labels(bases["t5"], TASKS["regress"])
    stock.save_pretrained(tmp_path)
    again = load_base(tmp_path, torch.float32, CPU, task=TASKS["regress"], label_scale=LabelScale(8.0, 20.0))
    assert torch.equal(8 * again.classifier.weight, stock.classifier.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_encoder_alone_is_a_base(dtype: torch.dtype, bases: dict[str, Path], tmp_path: Path) -> None:
    T5EncoderModel.from_pretrained(bases["flan-t5"]).to(dtype).save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    whole, alone = (load_base(base, torch.float32, CPU, task=TASKS["tag"]) for base in (bases["flan-t5"], tmp_path))
    for model in (whole, alone):
        torch.nn.init.ones_(model.classifier.weight)
    torch.testing.assert_close(alone(ids), whole(ids), atol=0 if dtype == torch.float32 else 1e-2, rtol=0)
    with pytest.raises(ModelError) as error:
        load_base(tmp_path, torch.float32, CPU)
    assert "decoder" in error.value.message
    assert "objective classify, regress or tag" in str(error.value.hint)


def test_the_encoder_of_a_t5gemma_alone_is_a_base(bases: dict[str, Path], tmp_path: Path) -> None:
    whole = load_base(bases["t5gemma"], torch.float32, CPU, task=TASKS["tag"])
    alone = T5GemmaEncoderModel(T5GemmaConfig.from_pretrained(bases["t5gemma"], is_encoder_decoder=False))
    alone.encoder.load_state_dict(whole.model.encoder.state_dict())
    alone.save_pretrained(tmp_path)
    loaded = load_base(tmp_path, torch.float32, CPU, task=TASKS["tag"])
    assert torch.equal(loaded.model.encoder.norm.weight, whole.model.encoder.norm.weight)


def test_a_head_of_the_same_labels_is_kept(bases: dict[str, Path], tmp_path: Path) -> None:
    stock = load_stock_labels(bases["mt5"], TASKS["tag"])
    stock.config.id2label = dict(enumerate(NAMES))
    stock.save_pretrained(tmp_path)
    model = load_base(tmp_path, torch.float32, CPU, task=TASKS["classify"])
    assert torch.equal(model.classifier.weight, stock.classifier.weight)
    with pytest.raises(CheckpointError) as error:
        load_base(tmp_path, torch.float32, CPU, task=replace(TASKS["tag"], names=tuple(reversed(NAMES))))
    assert "its labels are Nucleus, Cytoplasm" in error.value.message
    assert "but the data's are Vacuole, Golgi" in error.value.message


@pytest.mark.parametrize("kind", ["longt5", "t5gemma2"])
def test_models_without_an_encoder_class_are_refused(kind: str, tmp_path: Path) -> None:
    base = make_checkpoint(kind, tmp_path / kind)
    with pytest.raises(SettingsError, match=f"objective: tag: .* no encoder-only token classifier for {kind}"):
        find_encoder_class(find_family(read_config(base), base).architecture, "tag")


def test_several_labels_become_rows_of_ones() -> None:
    examples = make_labeled_examples(TASKS["several"], (3, 2))
    classes = ([3, 0], [], [np.nan])
    examples = [replace(examples[0], values=np.array(values, np.float32)) for values in classes]
    labels_NK = LabelCollator(TASKS["several"], 0, True)(examples)["labels"]
    assert labels_NK[:2].tolist() == [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert labels_NK[2].isnan().all()


def test_rows_of_whole_blocks_have_no_more_labels() -> None:
    examples = make_labeled_examples(TASKS["tag"])
    batch = LabelCollator(TASKS["tag"], 9, True, divides_rows=True)(examples)
    plain = LabelCollator(TASKS["tag"], 9, True)(examples)
    length = plain["labels"].shape[1]
    assert batch["packing"].rows.source_length == batch["input_ids"].shape[1] == batch["labels"].shape[1] == 256
    assert torch.equal(batch["input_ids"][:, :length], plain["input_ids"])
    torch.testing.assert_close(batch["labels"][:, :length], plain["labels"], equal_nan=True, rtol=0, atol=0)
    assert batch["labels"][:, length:].isnan().all()


def test_a_dummy_example_has_no_effect(bases: dict[str, Path]) -> None:
    model = load_base(bases["t5"], torch.float32, CPU, task=TASKS["classify"])
    use_packing(model)
    dummy = LabeledExample(np.array([1]), np.empty(0, np.int64), np.array([np.nan], np.float32))
    batch = LabelCollator(TASKS["classify"], 0, True)([dummy])
    labels = batch.pop("labels")
    assert sum_losses(TASKS["classify"], model(**batch), labels).item() == 0
