"""ONNX graphs compute the logits of stock transformers, and `merge --to onnx` gives the merged model's replies."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t5tune.commands.chat import Chatter
from t5tune.commands.merge import MergeResult, merge
from t5tune.commands.train import train
from t5tune.converting import formats
from t5tune.data.reading.formats import Turn
from t5tune.errors import DependencyError, SettingsError, TrainingError, WriteError
from t5tune.inference.prompts import Prompts
from t5tune.model.load import load_base
from t5tune.progress import Note
from t5tune.settings import ChatSettings, MergeSettings, load_settings
from tests.support.models.adapters import load_stock_base, make_stock_adapter
from tests.support.models.bases import make_base
from tests.support.models.model_types import load_stock, make_checkpoint
from tests.support.paths import REPOSITORY
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx", reason="onnx isn't installed: pip install 't5tune[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 't5tune[onnx]'")
onnx_graph = pytest.importorskip("t5tune.converting.onnx_graph")
EXAMPLE: str = pytest.importorskip("t5tune.converting.onnx").EXAMPLE

CPU = torch.device("cpu")
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "index.html", "README.md"}
GRAPHS = {"encoder_model", "decoder_model_merged"}
STEPS = (1, 1, 128, 1, 49)  # target tokens that the decoder gets at a time
ORDERS = [json.loads(line) for line in (REPOSITORY / "examples/quickstart/heldout.jsonl").read_text().splitlines()]
ORDERS = [record["conversations"][0]["value"] for record in ORDERS]


def write_graphs(base: Path, folder: Path, quantized: bool = False) -> tuple[Path, Path]:
    model = load_base(base, torch.float32, CPU)
    paths = folder / "encoder_model.onnx", folder / "decoder_model_merged.onnx"
    for stack, path in zip((model.encoder, model.decoder), paths, strict=True):
        onnx_graph.write_graph(model, stack, path, quantized)
    return paths


def compute_logits(paths: tuple[Path, Path], batch: dict[str, torch.Tensor], steps: tuple[int, ...]) -> torch.Tensor:
    """Compute the logits with the two graphs, giving the decoder `steps` tokens at a time and its cache."""
    encoder, decoder = map(onnxruntime.InferenceSession, paths)
    mask, target = batch["attention_mask"].numpy(), batch["decoder_input_ids"].numpy()
    (states,) = encoder.run(None, {"input_ids": batch["input_ids"].numpy(), "attention_mask": mask})
    past = [each for each in decoder.get_inputs() if each.name.startswith("past_key_values.")]
    # transformers.js finds the empty axis by its name
    sizes = [
        [len(mask) if axis == "batch_size" else axis if type(axis) is int else 0 for axis in p.shape] for p in past
    ]
    cache = {each.name: np.zeros(size, np.float32) for each, size in zip(past, sizes, strict=True)}
    names = [each.name for each in decoder.get_outputs()]
    found, done = [], 0
    for count in steps:
        given = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        outputs = decoder.run(None, {"input_ids": target[:, done : done + count], **given, **cache})
        results, done = dict(zip(names, outputs, strict=True)), done + count
        found.append(torch.from_numpy(results["logits"]))
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    return torch.cat(found, 1)


def make_batch(size: int, num_tokens: int = 600) -> dict[str, torch.Tensor]:
    """Make sources of up to 200 tokens, beyond the last bucket of distances, with padding if there are several."""
    torch.manual_seed(size)
    mask = torch.ones(size, 200, dtype=torch.long)
    mask[1:, 150:], mask[2:, 3:] = 0, 0
    ids, targets = (torch.randint(3, num_tokens, (size, count)) for count in (200, sum(STEPS)))
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets}


@pytest.mark.parametrize("key", ["t5", "flan-t5", "mt5", "umt5", "codet5"])
def test_a_graph_has_the_logits_of_stock_transformers(key: str, tmp_path: Path) -> None:
    base = make_checkpoint(key, tmp_path / key)
    stock, paths = load_stock(base), write_graphs(base, tmp_path)
    for size, steps in ((1, STEPS), (3, STEPS), (3, (sum(STEPS),))):
        batch = make_batch(size)
        with torch.inference_mode():
            expected = stock(**batch).logits
        torch.testing.assert_close(compute_logits(paths, batch, steps), expected, rtol=0, atol=2e-5)
    for path in paths:
        onnx.checker.check_model(str(path), full_check=True)
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in onnx.load(path).graph.node}


def test_a_tied_head_of_an_old_config_is_scaled(tmp_path: Path) -> None:
    """The tied T5 scales the decoder's output; the untied T5 and every mT5 don't."""
    base = make_base(tmp_path / "base", tied=True)
    config = json.loads((base / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (base / "config.json").write_text(json.dumps(config))
    batch = make_batch(1)
    with torch.inference_mode():
        expected = load_base(base, torch.float32, CPU)(**batch, use_cache=False).logits
    torch.testing.assert_close(compute_logits(write_graphs(base, tmp_path), batch, STEPS), expected, rtol=0, atol=2e-5)


def test_int8_files_have_close_logits_and_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False, d_model=128, d_ff=256, num_layers=1)
    batch = make_batch(2)
    with torch.inference_mode():
        expected = load_stock_base(base)(**batch).logits
    sizes = []
    for quantized in (False, True):
        folder = tmp_path / str(quantized)
        folder.mkdir()
        paths = write_graphs(base, folder, quantized)
        error = (compute_logits(paths, batch, STEPS) - expected).abs().max()
        assert error < (0.06 if quantized else 1e-5) * expected.abs().max()
        sizes.append(sum(path.stat().st_size for path in paths))
    assert sizes[1] < 0.3 * sizes[0]


def test_weights_that_do_not_fit_get_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_FILE_BYTES", 100_000)
    base = make_base(tmp_path / "base", tied=False)
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    converted, _ = convert(base, adapter, tmp_path / "web", quantization="float32", verify=False)
    assert converted.replies == converted.same_replies == 4
    config = json.loads((tmp_path / "web/config.json").read_text())
    large = {"encoder_model.onnx", "decoder_model_merged.onnx"}
    assert config["transformers.js_config"] == {"use_external_data_format": dict.fromkeys(large, True)}
    for name in large:
        assert (tmp_path / f"web/onnx/{name}").stat().st_size < 100_000
        assert (tmp_path / f"web/onnx/{name}_data").stat().st_size > 100_000
    files = [path for path in (tmp_path / "web/onnx").iterdir()]
    assert converted.bytes == sum(path.stat().st_size for path in files)


def convert(base: Path | str, adapter: Path, output: Path, **changes: Any) -> tuple[MergeResult, list[Note]]:
    notes: list[Note] = []
    values = {"model_name_or_path": str(base), "adapter": adapter, "output_dir": output, "to": "onnx"}
    report = lambda event: notes.append(event) if isinstance(event, Note) else None  # noqa: E731
    return merge(MergeSettings.model_validate(values | changes), report), notes


@pytest.fixture(scope="module")
def pocket_run(tmp_path_factory: pytest.TempPathFactory, conversations: Path) -> Path:
    """A run of pocket that has begun to write JSON."""
    run = tmp_path_factory.mktemp("pocket") / "run"
    train(make_settings(Path("pocket"), conversations, run, max_steps=40, learning_rate=2e-3, save_steps=40))
    return run


@pytest.fixture(scope="module")
def web(pocket_run: Path) -> Path:
    converted, notes = convert("pocket", pocket_run, pocket_run.parent / "web", verify=False)
    texts = [note.text for note in notes]
    for kind, same in (("float32", 20), ("int8", converted.same_replies)):
        assert any(text.startswith(f"{kind}: onnxruntime gives the same reply for {same} of 20") for text in texts)
    return pocket_run.parent / "web"


def test_the_folder_has_the_files_that_transformers_js_reads(web: Path) -> None:
    assert {path.name for path in web.iterdir() if path.is_file()} == FILES
    assert {path.name for path in (web / "onnx").iterdir()} == {
        f"{name}{suffix}.onnx" for name in GRAPHS for suffix in ("", "_quantized")
    }
    config = json.loads((web / "config.json").read_text())
    assert {name: config[name] for name in ("num_layers", "num_decoder_layers", "num_heads", "d_kv")} == {
        "num_layers": 3, "num_decoder_layers": 3, "num_heads": 6, "d_kv": 32,
    }  # fmt: skip
    generation = json.loads((web / "generation_config.json").read_text())
    assert (generation["decoder_start_token_id"], generation["eos_token_id"]) == (0, [1])


def run_card(web: Path, message: str) -> str:
    """Run the Python code of the model card with a different message, and return what it prints."""
    code = (web / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    printed: list[str] = []
    code = code.replace("THIS_FOLDER", str(web)).replace(EXAMPLE, message)
    exec(code, {"print": printed.append})
    return printed[0]


def test_the_code_in_the_card_replies_as_chat_does(pocket_run: Path, web: Path, tmp_path: Path) -> None:
    """The held-out orders: their replies are equal, from the template in the card to the decoded text."""
    chatter = Chatter.load(ChatSettings(model_name_or_path=str(pocket_run), use_cpu=True, max_new_tokens=64))
    folder = shutil.copytree(web, tmp_path / "web")
    assert len(run_card(folder, ORDERS[0])) > 10  # in int8
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("_quantized.onnx", ".onnx"))
    replies = [chatter.reply([Turn("human", order)]).reply for order in ORDERS[:8]]
    assert [run_card(folder, order) for order in ORDERS[:8]] == replies
    assert len(set(replies)) > 4


def test_onnxruntime_reports_nothing(web: Path, tmp_path: Path) -> None:
    """It stores what it reports to Microsoft in the home folder first."""
    code = "import sys, t5tune.converting, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    command = [sys.executable, "-c", code, str(web / "onnx" / "encoder_model.onnx")]
    subprocess.run(command, env={**environment, "HOME": str(tmp_path)}, check=True)
    assert [*tmp_path.rglob("*")] == []


def test_the_page_and_the_card_have_the_prompt_of_training(web: Path) -> None:
    page = (web / "index.html").read_text()
    assert '"before": "Human: ", "after": " Assistant:", "ending": "", "dtype": "q8"' in page
    assert "__" not in page
    card = (web / "README.md").read_text()
    assert card.count(f'"Human: {EXAMPLE} Assistant:"') == 2
    assert "library_name: transformers.js\n" in card
    assert 'pipeline("text2text-generation", "THIS_FOLDER", { dtype: "q8" })' in card
    assert "npm install --ignore-scripts --prefix ../build" in card  # not among the files to serve or to push


def test_a_prompt_has_the_token_ids_of_training(tmp_path: Path, conversations: Path, untied_base: Path) -> None:
    """With a system message, several lines, a prefix, a text that ends HTML, and text after an answer."""
    from transformers import AutoTokenizer

    from t5tune.converting.onnx import split_prompt
    from t5tune.data.tokens.templates import Template
    from t5tune.data.tokens.tokenizer import load_tokenizer

    template = Template("Be </script> brief.", "{text}\n", "### Human: {text}\n", "### Assistant:", " {text}\n")
    prompts = Prompts(load_tokenizer(untied_base), template, 2048, source_prefix="answer: ")
    before, after = split_prompt(prompts)
    stock = AutoTokenizer.from_pretrained(untied_base)
    assert stock(f"{before}Hello you{after}").input_ids == prompts.encode([Turn("human", "Hello you")]).ids


def test_one_quantization_writes_only_its_files(untied_base: Path, tmp_path: Path) -> None:
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    converted, _ = convert(untied_base, adapter, tmp_path / "web", quantization="float32", verify=False)
    assert {path.name for path in (tmp_path / "web/onnx").iterdir()} == {f"{name}.onnx" for name in GRAPHS}
    assert '"dtype": "fp32"' in (tmp_path / "web/index.html").read_text()
    assert 'dtype: "fp32"' in (tmp_path / "web/README.md").read_text()
    assert converted.replies == converted.same_replies == 4


@pytest.mark.parametrize("kind", ["onnx", "ctranslate2"])
def test_a_whole_model_is_converted_like_its_run(kind: str, pocket_run: Path, web: Path, tmp_path: Path) -> None:
    values = {"adapter": pocket_run, "dtype": "float32", "verify": False}  # as --to onnx computes
    merge(MergeSettings(**values, output_dir=tmp_path / "merged"))
    of_run = web
    if kind == "ctranslate2":
        of_run = tmp_path / "of_run"
        merge(MergeSettings(**values, output_dir=of_run, to=kind))
    result = merge(MergeSettings(adapter=tmp_path / "merged", to=kind, output_dir=tmp_path / "converted"))
    assert (result.replies, result.verified, result.adapted_tensors) == (4, False, 0)
    files = {file.relative_to(of_run): file for file in of_run.rglob("*") if file.is_file()}
    for name, file in files.items():
        found = tmp_path / "converted" / name
        assert name.name in ("README.md", "settings.yaml") or found.read_bytes() == file.read_bytes(), name
    card = (tmp_path / "converted" / "README.md").read_text()
    assert f"Created by `t5tune merge` from `{tmp_path / 'merged'}`." in card
    if kind == "ctranslate2":  # the settings repeat the conversion
        settings, _ = load_settings(MergeSettings, str(tmp_path / "converted" / "settings.yaml"), {})
        assert merge(settings.replace(output_dir=tmp_path / "again")).bytes == result.bytes


def test_a_run_named_pocket_is_not_the_built_in_model(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_stock_adapter(untied_base, Path("pocket"))
    merge(MergeSettings(adapter="pocket", to="ctranslate2", output_dir="converted", verify=False))
    assert "from the adapter `pocket`" in Path("converted/README.md").read_text()


def test_settings_of_adapters_are_refused_without_one(untied_base: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"weights": [0.5]}, "weights: there is no adapter to merge; leave it out"),
        ({"onto": "nf4", "verify": True}, r"onto: there is no adapter .*\nverify: there is no adapter"),
    ):
        with pytest.raises(SettingsError, match=message):
            merge(MergeSettings(adapter=untied_base, to="onnx", output_dir=tmp_path / "web", **given))
    assert [*tmp_path.iterdir()] == []


def test_config_values_that_would_change_the_text_are_left_out(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    config = json.loads((base / "config.json").read_text())
    config |= {"prefix": "summarize: ", "task_specific_params": {"text2text-generation": {"prefix": "x"}}}
    (base / "config.json").write_text(json.dumps(config))
    generation = {"decoder_start_token_id": 5, "eos_token_id": [1, 7], "num_beams": 4, "no_repeat_ngram_size": 2}
    (base / "generation_config.json").write_text(json.dumps(generation))
    _, notes = convert(base, make_stock_adapter(base, tmp_path / "adapter"), tmp_path / "web", quantization="float32")
    assert not {"prefix", "task_specific_params"} & json.loads((tmp_path / "web/config.json").read_text()).keys()
    written = json.loads((tmp_path / "web/generation_config.json").read_text())
    expected = {"decoder_start_token_id": 0, "eos_token_id": [1, 7], "pad_token_id": 0, "no_repeat_ngram_size": 2}
    assert expected.items() <= written.items()
    assert not [note for note in notes if "which CTranslate2 would ignore" in note.text]


def test_umt5_is_converted_as_mt5_with_a_warning(tmp_path: Path) -> None:
    base = make_checkpoint("umt5", tmp_path / "base")
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    converted, notes = convert(base, adapter, tmp_path / "web", quantization="float32", verify=False)
    assert converted.replies == converted.same_replies
    assert json.loads((tmp_path / "web/config.json").read_text())["model_type"] == "mt5"
    assert (tmp_path / "web/tokenizer.json").is_file()  # the base has only a spiece.model
    assert "to: onnx: umT5: transformers.js doesn't know it" in next(note.text for note in notes if note.warning)


@pytest.mark.parametrize(("key", "name"), [("byt5", "ByT5"), ("longt5", "LongT5"), ("flan-ul2", "Flan-UL2")])
def test_models_that_cannot_be_converted_are_refused(key: str, name: str, tmp_path: Path) -> None:
    base = make_checkpoint(key, tmp_path / "base")
    with pytest.raises(SettingsError, match=f"to: onnx: {name} can't be converted; write a checkpoint"):
        convert(base, make_stock_adapter(base, tmp_path / "adapter"), tmp_path / "web")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["adapter", "base"]


def test_a_missing_package_is_named(untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="to: onnx can't be imported: .*onnxruntime") as caught:
        convert(untied_base, adapter, tmp_path / "web")
    assert caught.value.hint == "pip install 't5tune[onnx]'"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_interrupted_import_is_no_missing_package(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise ImportError("initialization failed") from KeyboardInterrupt(15)

    monkeypatch.setattr(formats, "import_module", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(untied_base, make_stock_adapter(untied_base, tmp_path / "adapter"), tmp_path / "web")


def halve_norms(build: Callable[..., str]) -> Callable[..., str]:
    """Change the method that adds a norm: the graph computes something else."""

    def changed(self: Any, norm: Any, hidden: str, scale: float = 1.0) -> str:
        return build(self, norm, hidden, 0.5 * scale)

    return changed


def test_a_graph_with_different_replies_is_not_published(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph._Graph, "normalize", halve_norms(onnx_graph._Graph.normalize))
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    with pytest.raises(TrainingError, match="onnxruntime gives .* differ by .*; nothing was written"):
        convert(untied_base, adapter, tmp_path / "web")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_int8_that_changes_replies_is_written_with_a_warning(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph._Graph, "normalize", halve_norms(onnx_graph._Graph.normalize))
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    converted, notes = convert(untied_base, adapter, tmp_path / "web", quantization="int8")
    assert converted.replies == 4
    assert converted.same_replies is not None
    assert converted.same_replies < 4
    (warned,) = [note.text for note in notes if note.warning]
    assert warned.startswith(f"int8: onnxruntime gives the same reply for {converted.same_replies} of 4 prompts")
    assert warned.endswith("; --quantization float32 changes no reply")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_an_interrupted_conversion_leaves_nothing(
    error: BaseException, untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = onnx_graph._Graph.feed_forward

    def fail(self: Any, layer: Any, hidden: str) -> str:
        add(self, layer, hidden)
        raise error

    monkeypatch.setattr(onnx_graph._Graph, "feed_forward", fail)
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    with pytest.raises(WriteError if isinstance(error, OSError) else KeyboardInterrupt):
        convert(untied_base, adapter, tmp_path / "web")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
