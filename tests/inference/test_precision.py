"""An adapter is used in the precision of its training, and answers alike in evaluate, chat, serve and merge."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t5tune.commands.chat import Chatter
from t5tune.commands.evaluate import evaluate
from t5tune.commands.merge import merge
from t5tune.commands.serve import serve
from t5tune.commands.train import train
from t5tune.errors import DependencyError, SettingsError
from t5tune.inference import precision
from t5tune.inference.loading import load_for_inference
from t5tune.inference.precision import resolve_precision
from t5tune.settings import ChatSettings, EvaluateSettings, MergeSettings, ServeSettings
from t5tune.settings.groups.base import InferenceSettings
from tests.serving import raw_http
from tests.serving.raw_http import make_chat
from tests.support.models.adapters import compute_logits
from tests.support.models.bases import make_base
from tests.support.notes import Notes
from tests.support.train_runs import make_settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROMPTS = ["two teas and a muffin", "Ruth: no eggs", "what is the capital of Peru?", "1 + 1", "I'd like three toasts"]
FP4 = {"q_lora": True, "quant_type": "fp4", "double_quant": False, "bf16": False}


@pytest.mark.parametrize(
    ("given", "trained", "on_gpu", "expected", "notes"),
    [
        ({}, {}, False, "fp32", []),
        ({}, {}, True, "bf16", []),
        ({"bf16": False}, {}, True, "fp32", []),
        ({}, {"bf16": True, "q_lora": False}, False, "bf16", ["as in training: bf16"]),
        ({}, {"bf16": True, "q_lora": False}, True, "bf16", []),
        ({}, {"bf16": False, "q_lora": False}, True, "fp32", ["as in training: fp32"]),
        ({"bf16": True}, {"bf16": False, "q_lora": False}, True, "bf16", []),
        ({}, FP4, False, "fp4 without double quantization, fp32",
         ["as in training: fp4 without double quantization, fp32"]),
        ({"q_lora": False}, FP4, True, "fp32", ["as in training: fp32"]),
        ({"quant_type": "nf4", "bf16": True}, FP4, True, "nf4 without double quantization, bf16",
         ["as in training except for quant_type: nf4 without double quantization"]),
        ({"q_lora": True}, {"bf16": True, "q_lora": False}, True, "nf4, bf16", []),
    ],
)  # fmt: skip
def test_settings_win_over_training_and_training_over_the_device(
    given: dict[str, Any], trained: dict[str, Any], on_gpu: bool, expected: str, notes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(precision, "has_bf16", lambda device: device.type == "cuda")
    monkeypatch.setattr(precision, "can_compute_bf16", lambda device: True)
    monkeypatch.setattr(precision, "check_bf16", lambda device: None)
    found_notes = Notes()
    found = resolve_precision(given, trained, GPU if on_gpu else CPU, found_notes)
    assert (str(found), found_notes) == (expected, notes)


def test_a_gpu_without_bf16_computes_in_fp32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    notes = Notes()
    assert not resolve_precision({}, {"bf16": True, "q_lora": False}, GPU, notes).bf16
    assert notes.warnings == ["trained in bf16, which Tesla T4 can't compute; computing in fp32"]
    with pytest.raises(SettingsError, match="bf16: Tesla T4 has no bf16 arithmetic"):
        resolve_precision({"bf16": True}, {}, GPU)


def test_a_device_that_bitsandbytes_cannot_use_gets_the_unquantized_base(monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = SimpleNamespace(type="xla", __str__=lambda: "xla")
    monkeypatch.setattr(precision, "describe_device", lambda _: "the device xla:0")
    notes = Notes()
    assert resolve_precision({}, FP4, device, notes).quantization is None
    problem = "bitsandbytes can't compute on the device xla:0; using the unquantized base"
    assert notes == [f"trained on an fp4 base without double quantization, but {problem}"]


# one adapter in all commands


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", tied=False, d_model=64, d_kv=16, d_ff=128)


@pytest.fixture(scope="module")
def conversation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"source": text, "target": text[::-1]}) + "\n" for text in PROMPTS))
    return path


@pytest.fixture(scope="module")
def run(base: Path, conversation_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "quantized"
    return train(make_settings(base, conversation_file, folder, learning_rate=3e-2, **FP4)).run


@pytest.fixture(scope="module")
def plain_run(base: Path, conversation_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return train(make_settings(base, conversation_file, folder, learning_rate=3e-2)).run


def load_chatter(model: Path, **changes: Any) -> tuple[Chatter, list[str]]:
    notes = Notes()
    settings = ChatSettings(model_name_or_path=str(model), use_cpu=True, max_new_tokens=12, **changes)
    return Chatter.load(settings, notes), notes


def ask_chat(model: Path, **changes: Any) -> list[str]:
    chatter, _ = load_chatter(model, **changes)
    return [chatter.reply(prompt).reply for prompt in PROMPTS]


def ask_server(models: dict[str, Path], folder: Path, **changes: Any) -> tuple[dict[str, list[str]], list[str]]:
    notes = Notes()
    named = {name: str(model) for name, model in models.items()}
    settings = ServeSettings(models=named, port=0, use_cpu=True, converted_dir=folder, **changes)
    options = {"max_tokens": 12, "temperature": 0}
    with serve(settings, notes) as server:
        bodies = {name: [make_chat(text, model=name, **options) for text in PROMPTS] for name in models}
        replies = {name: [raw_http.ask(server.url, body) for body in each] for name, each in bodies.items()}
    return replies, notes


@pytest.mark.slow
def test_a_qlora_adapter_gives_the_same_replies_everywhere(run: Path, conversation_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="the extra `serve` isn't installed")
    replies = ask_chat(run)
    assert replies != ask_chat(run, q_lora=False)
    found = evaluate(
        EvaluateSettings(
            model_name_or_path=str(run), data_path=str(conversation_file), output_dir=tmp_path / "scores",
            use_cpu=True, max_new_tokens=12,
        )
    )  # fmt: skip
    assert [json.loads(line)["prediction"] for line in found.predictions.read_text().splitlines()] == replies
    served, notes = ask_server({"run": run}, tmp_path / "made", engine="transformers")
    assert served["run"] == replies
    assert "run: as in training: fp4 without double quantization, fp32" in notes
    merged = merge(MergeSettings(adapter=run, output_dir=tmp_path / "merged"))
    assert merged.onto == "fp4"
    assert ask_chat(merged.checkpoint) == replies
    settings = [InferenceSettings(model_name_or_path=str(path), use_cpu=True) for path in (run, merged.checkpoint)]
    logits = [compute_logits(load_for_inference(each).model) for each in settings]
    assert torch.allclose(logits[0], logits[1], rtol=0, atol=1e-4 * float(logits[0].abs().max()))
    unquantized = load_for_inference(InferenceSettings(model_name_or_path=str(run), q_lora=False, use_cpu=True))
    assert (compute_logits(unquantized.model) - logits[0]).abs().max() > 100 * (logits[1] - logits[0]).abs().max()


@pytest.mark.long
@pytest.mark.slow
def test_ctranslate2_serves_a_merge_into_the_trained_weights(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    pytest.importorskip("starlette", reason="the extra `serve` isn't installed")
    for _ in range(2):  # the second time, it is converted already
        served, notes = ask_server({"run": run}, tmp_path, engine="ctranslate2")
        assert served["run"] == ask_chat(run)
        assert "run: its adapter is merged into the fp4 weights of training" in notes
    # the conversion with quantized weights isn't used for the unquantized weights
    served, notes = ask_server({"run": run}, tmp_path, engine="ctranslate2", q_lora=False)
    assert served["run"] == ask_chat(run, q_lora=False)
    assert not [note for note in notes if "of training" in note]
    with pytest.raises(SettingsError, match="quantized by bitsandbytes in a different way than in training"):
        ask_server({"run": run}, tmp_path, engine="ctranslate2", quant_type="nf4")


@pytest.mark.slow
def test_adapters_trained_differently_do_not_share_a_base(run: Path, plain_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="the extra `serve` isn't installed")
    served, notes = ask_server({"run": run, "plain": plain_run}, tmp_path, engine="transformers")
    assert served == {"run": ask_chat(run), "plain": ask_chat(plain_run)}
    again = "plain: loading the base once more, in fp32: run has it in fp4 without double quantization, fp32"
    assert again in notes


@pytest.mark.slow
def test_a_chat_uses_each_adapter_in_its_training_precision(run: Path, plain_run: Path) -> None:
    chatter, notes = load_chatter(run)
    assert "as in training: fp4 without double quantization, fp32" in notes
    assert str(chatter.precision) == "fp4 without double quantization, fp32"
    alone = chatter.with_adapter(None)
    assert alone.precision == chatter.precision
    plain = alone.with_adapter(plain_run)
    assert [plain.reply(prompt).reply for prompt in PROMPTS] == ask_chat(plain_run)
    assert str(plain.precision) == "fp32"
    assert str(plain.with_adapter(run).precision) == "fp4 without double quantization, fp32"


@pytest.mark.slow
def test_without_bitsandbytes_the_unquantized_base_is_used(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask_chat(run, q_lora=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    chatter, notes = load_chatter(run)
    assert [chatter.reply(prompt).reply for prompt in PROMPTS] == expected
    (note,) = [note for note in notes if "bitsandbytes" in note]
    assert note.startswith("trained on an fp4 base without double quantization, but bitsandbytes can't be imported: ")
    assert note.endswith("; using the unquantized base")
    with pytest.raises(DependencyError, match="q_lora: bitsandbytes can't be imported"):
        load_chatter(run, q_lora=True)
    with pytest.raises(DependencyError, match="onto: fp4: bitsandbytes can't be imported") as caught:
        merge(MergeSettings(adapter=run, output_dir=tmp_path / "merged"))
    assert caught.value.hint is not None
    assert "--onto base" in caught.value.hint
    assert not (tmp_path / "merged").exists()
    notes = Notes()
    merge(MergeSettings(adapter=run, output_dir=tmp_path / "merged", onto="base", verify=True), notes)
    assert any(text.startswith("not compared with the model as trained") for text in notes)
    assert ask_chat(tmp_path / "merged") == expected
