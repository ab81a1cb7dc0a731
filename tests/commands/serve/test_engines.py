"""`t5tune serve` as a command: its engines, and what it converts for them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5tune.commands.chat import chat
from t5tune.commands.merge import merge
from t5tune.commands.serve import serve
from t5tune.commands.train import train
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.errors import CheckpointError, ModelError, SettingsError
from t5tune.progress import Event, Note
from t5tune.settings import ChatSettings, MergeSettings, ServeSettings, TrainSettings
from tests.serving.raw_http import make_chat, send
from tests.support.models.adapters import make_stock_adapter

pytestmark = pytest.mark.slow
pytest.importorskip("starlette", reason="the extra `serve` isn't installed")


def test_a_broken_conversion_or_unwritable_folder_is_named(untied_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    num_threads = torch.get_num_threads()
    values: dict[str, Any] = {"models": {"m": str(untied_base)}, "port": 0, "use_cpu": True}
    with serve(ServeSettings(**values, converted_dir=tmp_path / "made")):
        pass
    (made,) = (folder for folder in (tmp_path / "made").iterdir() if folder.name != "hashes")
    with open(made / "model.bin", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ModelError) as caught:
        serve(ServeSettings(**values, converted_dir=tmp_path / "made"))
    assert caught.value.message.startswith(f"{made}: CTranslate2 can't load this converted model: ")
    assert caught.value.hint == "delete the folder, so that it is converted again"
    assert torch.get_num_threads() == num_threads
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="converted_dir: .*file/made: Not a directory; choose another folder"):
        serve(ServeSettings(**values, converted_dir=tmp_path / "file" / "made"))


@pytest.mark.parametrize(
    ("weights", "bf16", "expected"),
    [
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float16", False, "float32"),
        ("int8_bfloat16", False, "int8_float32"),
        ("int8_float32", False, "int8_float32"),
    ],
)
def test_merged_folders_compute_in_their_dtype_except_with_no_bf16(
    weights: str, bf16: bool | None, expected: str, untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with bf16. This CPU doesn't support the dtypes, so a fake translator records the requested dtype."""
    pytest.importorskip("ctranslate2")
    from t5tune.converting.ctranslate2 import convert
    from t5tune.serving import engines

    convert(untied_base, tmp_path / "served", weights)
    save_tokenizer(load_tokenizer(untied_base), tmp_path / "served")
    load = engines.load_translator

    def load_as_on_gpu(folder: Path, compute_type: str, **options: Any) -> Any:
        found = load(folder, compute_type="float32", **options)
        named = weights if compute_type == "default" else compute_type
        return SimpleNamespace(compute_type=named, translate_batch=found.translate_batch)

    monkeypatch.setattr(engines, "load_translator", load_as_on_gpu)
    notes: list[str] = []
    settings = ServeSettings(models=str(tmp_path / "served"), port=0, use_cpu=True, bf16=bf16)
    with serve(settings, lambda event: notes.append(event.text) if isinstance(event, Note) else None) as server:
        assert send(server.url, body=make_chat(model="served", max_tokens=4))[0] == 200
    assert f"served: with CTranslate2, {expected}" in notes


def test_a_model_that_ctranslate2_only_loads_is_served_by_transformers(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU without cuBLAS 12, where CTranslate2 fails at its first computation."""
    pytest.importorskip("ctranslate2")
    from t5tune.converting.ctranslate2 import convert
    from t5tune.serving import engines

    convert(untied_base, tmp_path / "folder", None)
    save_tokenizer(load_tokenizer(untied_base), tmp_path / "folder")
    problem = "Library libcublas.so.12 is not found or cannot be loaded"

    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError(problem)

    loaded = SimpleNamespace(compute_type="float32", translate_batch=fail)
    monkeypatch.setattr(engines, "load_translator", lambda folder, **options: loaded)
    values: dict[str, Any] = {"port": 0, "use_cpu": True, "converted_dir": tmp_path / "made"}
    models = {"m": str(untied_base)}
    notes: list[str] = []
    with serve(
        ServeSettings(models=models, **values),
        lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    ) as server:
        assert server.address.models == {"m": "transformers"}
        assert send(server.url, body=make_chat(model="m", max_tokens=4))[0] == 200
    assert f"m: with transformers: CTranslate2 can't compute on cpu: {problem}" in notes
    with pytest.raises(SettingsError, match=f"engine: ctranslate2: m: CTranslate2 can't compute on cpu: {problem}"):
        serve(ServeSettings(models=models, engine="ctranslate2", **values))
    with pytest.raises(ModelError, match=f"CTranslate2 can't compute on cpu: {problem}"):
        serve(ServeSettings(models={"folder": str(tmp_path / "folder")}, **values))


def test_a_model_is_converted_once_until_it_is_retrained(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")

    def train_run(rate: float) -> None:
        train(
            TrainSettings(
                model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=tmp_path / "run",
                max_steps=3, learning_rate=rate, use_cpu=True, report_samples=0, fresh=True,
            )
        )  # fmt: skip

    def ask_served(*names: str) -> tuple[list[str], list[str]]:
        notes: list[str] = []

        def report(event: Event) -> None:
            if isinstance(event, Note):
                notes.append(event.text)

        models = {name: str(tmp_path / "run") for name in names}
        settings = ServeSettings(models=models, port=0, use_cpu=True, converted_dir=tmp_path / "made", max_new_tokens=8)
        with serve(settings, report) as server:
            answers = [send(server.url, body=make_chat(model=name))[1] for name in names]
        texts = [answer["choices"][0]["message"]["content"] for answer in answers]
        return texts, [note for note in notes if "converted to CTranslate2" in note]

    train_run(2e-2)
    first, notes = ask_served("tuned")
    assert [note.partition(": /")[0] for note in notes] == ["tuned: converted to CTranslate2"]
    both, notes = ask_served("tuned", "other")
    assert both == first * 2
    assert [note.partition(": /")[0] for note in notes] == [
        f"{name}: already converted to CTranslate2" for name in ("tuned", "other")
    ]
    train_run(5e-2)
    again, notes = ask_served("tuned")
    assert [note.partition(": /")[0] for note in notes] == ["tuned: converted to CTranslate2"]
    assert again != first
    folders = [folder.name for folder in (tmp_path / "made").iterdir() if folder.name != "hashes"]
    assert len(folders) == 2
    assert all(name.startswith("tuned-exact-") for name in folders)


def test_a_converted_run_has_its_tokenizer_without_its_settings(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """A URL among the settings may contain a secret, which only the run folder may contain."""
    pytest.importorskip("ctranslate2")
    train(
        TrainSettings(
            model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=tmp_path / "run",
            train_mode="full", max_steps=1, use_cpu=True, report_samples=0,
        )
    )  # fmt: skip
    models = {"tuned": str(tmp_path / "run")}
    with serve(ServeSettings(models=models, port=0, use_cpu=True, converted_dir=tmp_path / "made")) as server:
        assert server.address.models == {"tuned": "ctranslate2"}
    (made,) = (tmp_path / "made").glob("tuned-*")
    assert {file.name for file in made.iterdir()} >= {"tokenizer.json", "template.yaml", "training_data.json"}
    assert not (made / "settings.yaml").exists()


def test_a_wrong_engine_is_refused_with_the_reason(untied_base: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"models": {"m": str(untied_base)}, "port": 0, "use_cpu": True}
    config = untied_base / "generation_config.json"
    assert json.loads(config.read_text()).get("repetition_penalty") is None
    folder = shutil.copytree(untied_base, tmp_path / "penalized")
    (folder / config.name).write_text(json.dumps({"repetition_penalty": 1.5, "decoder_start_token_id": 0}))
    penalized = values | {"models": {"m": str(folder)}}
    with pytest.raises(SettingsError, match="m: generation_config.json sets repetition_penalty, which CTranslate2"):
        serve(ServeSettings(**penalized, engine="ctranslate2"))
    notes: list[Any] = []
    with serve(ServeSettings(**penalized), notes.append) as server:
        assert server.address.models == {"m": "transformers"}
    assert any(
        "with transformers: generation_config.json sets" in note.text for note in notes if isinstance(note, Note)
    )
    with pytest.raises(SettingsError) as caught:  # transformers would ignore it
        serve(ServeSettings(**penalized, quantization="int8"))
    problem = "quantization: int8: only with CTranslate2, which can't serve m: generation_config.json sets repetition"
    assert caught.value.message.startswith(problem)
    assert caught.value.hint == ("leave out --quantization; transformers quantizes with --q-lora --quant-type int8")
    with serve(ServeSettings(**penalized, q_lora=True, quant_type="int8")) as server:
        assert server.address.models == {"m": "transformers"}
        assert send(server.url, body=make_chat(model="m", max_tokens=4))[0] == 200


@pytest.mark.long
def test_merged_folders_keep_the_bases_generation_config(untied_base: Path, tmp_path: Path) -> None:
    """Penalties are refused as for other checkpoints, but transformers can't serve these folders, as merge says."""
    pytest.importorskip("ctranslate2")
    base = shutil.copytree(untied_base, tmp_path / "base")
    notes: list[Any] = []
    adapter = make_stock_adapter(base, tmp_path / "adapter")

    def serve_merged(name: str, **generation: Any) -> list[int]:
        """Return the reply lengths (tokens) of the adapter and of the folder that merge made of it."""
        (base / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 0, **generation}))
        values = {"model_name_or_path": str(base), "adapter": adapter, "output_dir": tmp_path / name}
        merge(MergeSettings(**values, to="ctranslate2", verify=False), notes.append)
        models = {"adapter": str(adapter), "folder": str(tmp_path / name)}
        settings = ServeSettings(
            models=models, model_name_or_path=str(base), port=0, use_cpu=True, converted_dir=tmp_path / "made"
        )
        with serve(settings) as server:
            assert set(server.address.models.values()) == {"ctranslate2"}
            answers = [send(server.url, body=make_chat(model=model, max_tokens=20))[1] for model in models]
        return [answer["usage"]["completion_tokens"] for answer in answers]

    assert serve_merged("plain", eos_token_id=1) == [20, 20]
    every_token = list(range(1, json.loads((base / "config.json").read_text())["vocab_size"]))
    assert serve_merged("ending", eos_token_id=every_token) == [0, 0]
    assert not [note for note in notes if isinstance(note, Note) and "generation_config" in note.text]
    lost = "generation_config.json sets repetition_penalty, no_repeat_ngram_size, which CTranslate2 would ignore"
    with pytest.raises(SettingsError, match=f"folder: {lost}; name the ada"):
        serve_merged("penalized", repetition_penalty=1.5, no_repeat_ngram_size=2)
    (warned,) = [note for note in notes if isinstance(note, Note) and "generation_config" in note.text]
    assert warned.text.startswith(f"to: ctranslate2: {lost}, so `serve` refuses the converted model; serve the adapter")
    assert warned.warning


@pytest.mark.parametrize(
    ("reason", "warning"),
    [("not the base that", "but loaded onto"), ("the base's layer has no bias to add it to", None)],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")  # PEFT's
def test_an_adapter_that_merge_refuses_is_served_anyway(
    reason: str, warning: str | None, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")
    base, adapter = shutil.copytree(untied_base, tmp_path / "base"), tmp_path / "run"
    if warning is None:
        make_stock_adapter(base, adapter, lora_bias=True)
    else:
        train(
            TrainSettings(
                model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=adapter, max_steps=3,
                learning_rate=2e-2, use_cpu=True, report_samples=0,
            )
        )  # fmt: skip
        weights = load_file(base / "model.safetensors")
        save_file({name: 1.1 * value for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    used = {"model_name_or_path": str(base), "use_cpu": True, "max_new_tokens": 8}
    served = {**used, "models": {"tuned": str(adapter)}, "port": 0, "converted_dir": tmp_path / "made"}
    notes: list[Note] = []
    with serve(
        ServeSettings(**served), lambda event: notes.append(event) if isinstance(event, Note) else None
    ) as server:
        assert server.address.models == {"tuned": "transformers"}
        answer = send(server.url, body=make_chat("Hello", "tuned"))[1]
    assert (
        answer["choices"][0]["message"]["content"] == chat(ChatSettings(**used, adapter=adapter, prompt="Hello")).reply
    )
    (said,) = (note.text for note in notes if "with transformers" in note.text)
    assert said.startswith("tuned: with transformers: its adapter can't be merged for CTranslate2: ")
    assert reason in said
    assert warning is None or any(note.warning and warning in note.text for note in notes)
    for changes, hint in (
        ({"engine": "ctranslate2"}, "leave out --engine, to use transformers"),
        ({"quantization": "int8"}, "leave out --quantization; transformers quantizes with --q-lora --quant-type int8"),
    ):
        with pytest.raises(SettingsError, match=reason) as caught:
            serve(ServeSettings(**served, **changes))
        assert caught.value.hint == hint
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value * torch.nan for name, value in state.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="contains NaN or infinity"):
        serve(ServeSettings(**served))
