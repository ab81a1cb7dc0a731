"""Bases, adapters and folders that merge refuses."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5tune.commands.evaluate import evaluate
from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.prepare import prepare
from t5tune.errors import CheckpointError, ModelError, SettingsError
from t5tune.settings import EvaluateSettings, ExportSettings, MergeSettings, PrepareSettings
from tests.merging.cases import PREFIX, change_config, change_tensors, list_folder, read_weights, run_merge
from tests.support.models.adapters import make_rows_adapter, make_stock_adapter
from tests.support.models.bases import make_base

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("changes", "bytes_per_weight"),
    [
        ({}, 4),
        ({"dtype": "bfloat16"}, 2),
        ({"to": "ctranslate2"}, 4 + 4),
        ({"to": "ctranslate2", "dtype": "bfloat16"}, 2 + 2),
        ({"to": "ctranslate2", "quantization": "int8_float16"}, 4 + 1),
        ({"to": "ctranslate2", "quantization": "float16"}, 4 + 2),
        ({"to": "onnx", "quantization": "float32"}, 4 + 1.4 * 4),  # the embedding is in two files
    ],
)
def test_a_disk_without_room_for_the_conversion_is_refused(
    untied_base: Path,
    untied_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    bytes_per_weight: float,
) -> None:
    for name in ("ctranslate2", "ctranslate2.converters", "onnx", "onnxruntime"):  # as if it were installed
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(SettingsError, match="1,000 bytes are free; the weights need") as caught:
        run_merge(untied_base, untied_adapter, tmp_path / "merged", **changes)
    needed = int(caught.value.problems[0].rpartition(" ")[2].replace(",", ""))
    weights = sum(tensor.numel() for tensor in load_file(untied_base / "model.safetensors").values())
    assert 1 < needed / (weights * bytes_per_weight) < 1.15
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", "", "base/tokenizer.json: can't be read"),
        ("config.json", {"decoder_start_token_id": -1}, "decoder_start_token_id: -1: expected the id of a token"),
        ("generation_config.json", {"pad_token_id": "x"}, "pad_token_id: 'x': expected the id of a token"),
        ("generation_config.json", {"num_return_sequences": 2}, "generation_config.json: transformers can't use it"),
    ],
)
def test_a_broken_model_is_not_called_a_wrong_release(
    file: str, content: Any, problem: str, untied_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")
    base = shutil.copytree(untied_base, tmp_path / "base")
    text = json.dumps({**json.loads((base / file).read_text()), **content}) if content else ""
    (base / file).write_text(text)
    with pytest.raises((ModelError, CheckpointError), match=problem):
        merge(MergeSettings(adapter=[base], to="ctranslate2", output_dir=tmp_path / "converted"))
    assert [*tmp_path.iterdir()] == [base]


def test_rows_beyond_the_end_of_a_smaller_vocabulary_are_refused(tmp_path: Path) -> None:
    adapter, _ = make_rows_adapter(make_base(tmp_path / "base", tied=True), tmp_path / "adapter")
    other = make_base(tmp_path / "other", tied=True, vocab_size=205)
    before = list_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"shared\.weight"):
        run_merge(other, adapter, tmp_path / "merged", verify=False)
    assert list_folder(tmp_path) == before


def test_an_output_folder_with_files_is_only_replaced_with_overwrite(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError, match="already contains files") as caught:
        run_merge(untied_base, untied_adapter, output)
    assert "--overwrite" in (caught.value.hint or "")
    assert list_folder(output) == ["mine.txt"]
    run_merge(untied_base, untied_adapter, output, overwrite=True)
    assert "model.safetensors" in list_folder(output)
    assert "mine.txt" not in list_folder(output)
    assert list_folder(tmp_path) == ["merged"]


def test_overwrite_never_replaces_inputs_runs_or_the_current_folder(
    untied_base: Path, untied_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    base, adapter = shutil.copytree(untied_base, out / "base"), shutil.copytree(untied_adapter, out / "adapter")
    run = tmp_path / "run"
    (run / "checkpoint-7").mkdir(parents=True)
    data = out / "data.jsonl"
    data.write_text('{"source": "a", "target": "b"}')
    before = list_folder(out)

    def evaluate_into(folder: Path) -> None:
        settings = {"model_name_or_path": str(untied_base), "data_path": f"{out}/*.jsonl", "use_cpu": True}
        evaluate(EvaluateSettings(**settings, output_dir=folder, overwrite=True))

    for what, command in {
        "adapter, which this command reads": lambda: run_merge(untied_base, adapter, out, overwrite=True),
        "base, which this command reads": lambda: run_merge(base, untied_adapter, out, overwrite=True),
        "run/checkpoint-7": lambda: run_merge(untied_base, untied_adapter, run, overwrite=True),
        "adapter, which this": lambda: export(ExportSettings(checkpoint=adapter, output_dir=adapter, overwrite=True)),
        "data.jsonl, which this command reads": lambda: evaluate_into(out),
    }.items():
        with pytest.raises(SettingsError, match=f"output_dir: .*: contains .*{what}"):
            command()
    monkeypatch.chdir(out)
    with pytest.raises(SettingsError, match="contains the current folder"):
        run_merge(untied_base, untied_adapter, tmp_path / "out" / "..", overwrite=True)
    assert list_folder(out) == before
    assert (run / "checkpoint-7").is_dir()


def test_overwrite_never_replaces_a_base_or_cache_named_by_files(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    models, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    base, adapter = shutil.copytree(untied_base, models / "base"), shutil.copytree(untied_adapter, tmp_path / "adapter")
    change_config(base_model_name_or_path=str(base))(adapter)
    data = tmp_path / "data.jsonl"
    data.write_text('{"source": "a", "target": "b"}')
    settings = {"model_name_or_path": str(base), "add_tokens": ["none"]}
    for folder, paths in ((models / "cache", [data]), (elsewhere, [f"{models / 'cache'}:1", f"{data}:1"])):
        prepare(PrepareSettings(**settings, data_path=[str(path) for path in paths], output_dir=folder))
    before = sorted(models.rglob("*"))
    common: dict[str, Any] = {"output_dir": models, "overwrite": True}

    def evaluate_on(path: Path, model: Path) -> None:
        evaluate(EvaluateSettings(**common, model_name_or_path=str(model), data_path=[str(path)], use_cpu=True))

    given = ExportSettings(**common, checkpoint=untied_adapter, model_name_or_path=str(base))
    onto_base: dict[str, Any] = {**common, "output_dir": base, "adapter": [adapter]}
    converted: dict[str, Any] = {**onto_base, "model_name_or_path": str(base), "to": "ctranslate2"}
    commands: list[tuple[str, Callable[[], Any]]] = [
        ("base", lambda: merge(MergeSettings(**common, adapter=[adapter]))),
        ("base", lambda: merge(MergeSettings(**onto_base))),
        ("base", lambda: merge(MergeSettings(**converted))),
        ("base", lambda: evaluate_on(data, adapter)),
        ("base", lambda: export(ExportSettings(**common, checkpoint=adapter))),
        ("base", lambda: export(given)),
        ("cache/data", lambda: evaluate_on(elsewhere, untied_base)),
    ]
    for what, command in commands:
        with pytest.raises(SettingsError, match=f"output_dir: .*models.*: contains .*models/{what}, which this"):
            command()
    assert sorted(models.rglob("*")) == before


def test_a_result_is_kept_if_another_process_filled_the_folder(
    untied_base: Path, untied_adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"

    def fill(event: Any) -> None:
        output.mkdir(exist_ok=True)
        (output / "theirs.txt").write_text("theirs")

    with pytest.raises(SettingsError, match="merged: another process wrote to it in the meantime") as caught:
        run_merge(untied_base, untied_adapter, output, fill, verify=False)
    assert str(tmp_path / "merged.1") in str(caught.value.hint)
    assert list_folder(output) == ["theirs.txt"]
    run_merge(untied_base, untied_adapter, tmp_path / "expected", verify=False)
    assert read_weights(tmp_path / "merged.1") == read_weights(tmp_path / "expected")


def test_a_base_is_only_merged_in_place_with_overwrite(untied_adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    run_merge(base, untied_adapter, tmp_path / "expected")
    with pytest.raises(SettingsError):
        run_merge(base, untied_adapter, base)
    run_merge(base, untied_adapter, base, overwrite=True)
    assert read_weights(base) == read_weights(tmp_path / "expected")


Q = f"{PREFIX}encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda s: s.pop(f"{Q}.lora_B.weight"), r"SelfAttention\.q.*lora_B"),
        (lambda s: s.pop(f"{Q}.lora_A.weight"), r"SelfAttention\.q.*lora_A"),
        (lambda s: s[f"{Q}.lora_B.weight"].fill_(float("nan")), r"SelfAttention\.q"),
        (lambda s: s.update({f"{PREFIX}shared.lora_embedding_A": torch.ones(4, 1536)}), "lora_embedding_A"),
        (lambda s: s.clear(), "contains no LoRA"),
    ],
    ids=["no B", "no A", "NaN", "an unsupported tensor", "empty"],
)
def test_an_incomplete_lora_adapter_is_refused_with_the_reason(
    untied_base: Path, untied_adapter: Path, tmp_path: Path, damage: Callable[[Any], Any], named: str
) -> None:
    adapter = shutil.copytree(untied_adapter, tmp_path / "adapter")
    change_tensors(damage)(adapter)
    with pytest.raises(CheckpointError, match=named):
        run_merge(untied_base, adapter, tmp_path / "merged", verify=False)
    assert list_folder(tmp_path) == ["adapter"]


def test_a_sum_beyond_the_range_of_fp16_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False, dtype=torch.float16)
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    change_tensors(lambda s: s[f"{Q}.lora_B.weight"].mul_(1e7))(adapter)
    with pytest.raises(CheckpointError, match=r"SelfAttention\.q\.weight"):
        run_merge(base, adapter, tmp_path / "merged", verify=False)
    assert list_folder(tmp_path) == ["adapter", "base"]
