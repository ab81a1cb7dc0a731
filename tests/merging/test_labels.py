"""Adapters with a head of labels, and merged checkpoints, in stock PEFT, transformers and sentence-transformers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

from t5tune.checkpoints.training_data import read_label_task
from t5tune.commands.export import export
from t5tune.errors import CheckpointError, SettingsError
from t5tune.inference.loading import LoadedModel, load_for_inference
from t5tune.settings import ChatSettings, ExportSettings
from tests.merging.cases import run_merge
from tests.support.models.adapters import make_stock_adapter
from tests.support.models.label_models import (
    NAMES,
    TASKS,
    compute_stock_logits,
    encode_labels,
    load_stock_labels,
    make_label_adapter,
    make_labeled_examples,
    make_stock_label_adapter,
)
from tests.support.models.model_types import make_checkpoint

pytestmark = pytest.mark.slow

KINDS = ("t5", "flan-t5", "mt5", "umt5", "t5gemma")
EXAMPLES = {name: make_labeled_examples(task, (7, 31, 2)) for name, task in TASKS.items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: make_checkpoint(kind, folder / kind) for kind in KINDS}


def load(base: Path, adapter: Path | None = None, **options: Any) -> LoadedModel:
    return load_for_inference(ChatSettings(model_name_or_path=str(base), adapter=adapter, use_cpu=True, **options))


def compute_logits(model: Any, task: str) -> torch.Tensor:
    """Compute our model's logits, one text after the other."""
    with torch.inference_mode():
        rows = [model(torch.from_numpy(each.source_S)[None]) for each in EXAMPLES[task]]
    return torch.cat(rows, 1 if TASKS[task].per_token else 0)


def compute_stock(model: Any, task: str) -> torch.Tensor:
    with torch.inference_mode():
        return compute_stock_logits(model.eval(), EXAMPLES[task], TASKS[task])


def load_in_stock_peft(base: Path, adapter: Path, task: str) -> Any:
    stock = load_stock_labels(base, TASKS[task], dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(stock, adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_and_our_loader_give_the_same_logits(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    for task in ("classify", "tag"):
        adapter = make_label_adapter(bases[kind], tmp_path / task, TASKS[task])
        ours, stock = load(bases[kind], adapter), load_in_stock_peft(bases[kind], adapter, task)
        assert ours.label_task == TASKS[task]
        logits = compute_logits(ours.model, task)
        torch.testing.assert_close(logits, compute_stock(stock, task), rtol=1e-4, atol=1e-5)
        assert logits.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_stock_adapter_loads_exports_and_merges(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_stock_label_adapter(bases[kind], tmp_path / "adapter", TASKS["tag"])
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    expected = compute_stock(load_in_stock_peft(bases[kind], adapter, "tag"), "tag")
    base = str(bases[kind])
    export(ExportSettings(checkpoint=adapter, output_dir=tmp_path / "exported", model_name_or_path=base))
    assert run_merge(bases[kind], adapter, tmp_path / "merged", verify=True).verified
    for loaded in (load(bases[kind], adapter), load(bases[kind], tmp_path / "exported"), load(tmp_path / "merged")):
        assert loaded.label_task is not None
        assert loaded.label_task.names == tuple(f"LABEL_{number}" for number in range(len(NAMES)))
        torch.testing.assert_close(compute_logits(loaded.model, "tag"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_checkpoint_has_the_bits_of_a_merge_by_peft(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_label_adapter(bases[kind], tmp_path / "adapter", TASKS["tag"])
    result = run_merge(bases[kind], adapter, tmp_path / "merged", verify=True)
    assert result.max_error is not None
    assert result.max_error < 1e-4
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    merged, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "merged", **options, output_loading_info=True
    )
    assert not any(report.values())
    assert merged.config.id2label == dict(enumerate(NAMES))
    assert merged.config.problem_type == "single_label_classification"
    expected = load_in_stock_peft(bases[kind], adapter, "tag").merge_and_unload()
    assert torch.equal(compute_stock(merged, "tag"), compute_stock(expected, "tag"))
    assert {name: value.tolist() for name, value in merged.state_dict().items()} == {
        name: value.tolist() for name, value in expected.state_dict().items()
    }
    assert not list((tmp_path / "merged").glob("generation_config.json"))


def test_the_code_of_the_cards_computes_logits(bases: dict[str, Path], tmp_path: Path) -> None:
    for task, kind in (("regress", "t5gemma"), ("tag", "umt5")):
        adapter = make_label_adapter(bases[kind], tmp_path / task, TASKS[task])
        run_merge(bases[kind], adapter, tmp_path / f"{task}-merged")
        found = []
        for folder in (adapter, tmp_path / f"{task}-merged"):
            card = (folder / "README.md").read_text().replace("THIS_FOLDER", str(folder))
            scope: dict[str, Any] = {}
            exec(re.findall("```python\n(.*?)```", card, re.DOTALL)[0], scope)
            found.append(scope["logits"].detach())
        loaded = load(bases[kind], adapter)
        ids = AutoTokenizer.from_pretrained(adapter)(["a text"], return_tensors="pt").input_ids
        for logits in found:
            torch.testing.assert_close(logits, loaded.model(ids).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_encodes_texts_to_logits(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers isn't installed")
    adapter = make_label_adapter(bases[kind], tmp_path / "adapter", TASKS["classify"])
    (adapter / "training_data.json").write_bytes(encode_labels(TASKS["classify"], "sort: "))
    result = run_merge(bases[kind], adapter, tmp_path / "encoder", to="sentence-transformers", verify=True)
    assert result.verified
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    texts = ["How is it?", "Where did they go when it began to rain in the park?"]
    stock = load_in_stock_peft(bases[kind], adapter, "classify")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    with torch.inference_mode():
        rows = [stock(**tokenizer([f"sort: {text}"], return_tensors="pt")).logits[0].mean(0) for text in texts]
    torch.testing.assert_close(torch.from_numpy(encoder.encode(texts)), torch.stack(rows), rtol=1e-4, atol=1e-5)
    assert read_label_task(tmp_path / "encoder") is None  # without the head, it has no labels for t5tune


def test_an_encoder_in_bf16_becomes_a_sentence_transformer(bases: dict[str, Path], tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers isn't installed")
    adapter = make_label_adapter(bases["t5"], tmp_path / "adapter", TASKS["several"])
    run_merge(bases["t5"], adapter, tmp_path / "encoder", to="sentence-transformers", dtype="bfloat16")
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    found = torch.from_numpy(encoder.encode("How is it?"))
    ids = AutoTokenizer.from_pretrained(adapter)("How is it?", return_tensors="pt").input_ids
    torch.testing.assert_close(found[None], load(bases["t5"], adapter).model(ids).detach(), rtol=0.1, atol=0.1)


def test_adapters_with_the_same_labels_are_summed(bases: dict[str, Path], tmp_path: Path) -> None:
    first = make_label_adapter(bases["t5"], tmp_path / "first", TASKS["classify"])
    second = shutil.copytree(first, tmp_path / "second")
    tensors = {name: value + 1 for name, value in load_file(second / "adapter_model.safetensors").items()}
    save_file(tensors, second / "adapter_model.safetensors")
    run_merge(bases["t5"], [first, second], tmp_path / "merged", weights=[0.5, 2.0])
    name = "classifier.weight"
    heads = [load_file(each / "adapter_model.safetensors")[f"base_model.model.{name}"] for each in (first, second)]
    merged = load_file(tmp_path / "merged" / "model.safetensors")[name]
    torch.testing.assert_close(merged, 0.5 * heads[0] + 2 * heads[1])
    other = make_label_adapter(bases["t5"], tmp_path / "other", TASKS["regress"])
    with pytest.raises(CheckpointError, match="other: predicts numbers, but .*first predicts Nucleus, Cytoplasm"):
        run_merge(bases["t5"], [first, other], tmp_path / "both", weights=[1, 1])


@pytest.mark.parametrize(
    ("task", "to", "problem"),
    [
        ("classify", "ctranslate2", "to: ctranslate2: objective classify needs an encoder"),
        ("tag", "onnx", "to: onnx: objective tag needs an encoder"),
        ("tag", "sentence-transformers", "to: sentence-transformers: the model predicts labels of words"),
        (None, "sentence-transformers", "to: sentence-transformers: the model predicts texts"),
    ],
)
def test_formats_that_cannot_have_the_head_are_refused(
    task: str | None, to: str, problem: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    if task is None:
        adapter = make_stock_adapter(bases["t5"], tmp_path / "adapter")
    else:
        adapter = make_label_adapter(bases["t5"], tmp_path / "adapter", TASKS[task])
    with pytest.raises(SettingsError, match=problem):
        run_merge(bases["t5"], adapter, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_lost_its_head_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_label_adapter(bases["t5"], tmp_path / "adapter", TASKS["tag"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "classifier" not in name},
        adapter / "adapter_model.safetensors",
    )
    for act in (lambda: load(bases["t5"], adapter), lambda: run_merge(bases["t5"], adapter, tmp_path / "merged")):
        with pytest.raises(CheckpointError, match="classifier"):
            act()
