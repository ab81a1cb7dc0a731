"""Merged checkpoints work in other tools: llama.cpp's converter, CTranslate2 and transformers 4."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, GenerationConfig

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.commands.merge import MergeResult, merge
from t5tune.compat.ctranslate2_patches import load_translator
from t5tune.data.tokens.chat_template import build_chat_template, write_chat_template
from t5tune.data.tokens.templates import load_template
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.errors import CheckpointError, DependencyError, TrainingError
from t5tune.inference.generation import Decoding, generate
from t5tune.merging.shards import estimate_converted_size
from t5tune.model.load import load_base
from t5tune.progress import Note
from t5tune.settings import MergeSettings
from tests.support.models.adapters import load_stock_base, make_rows_adapter, make_stock_adapter
from tests.support.models.bases import make_base
from tests.support.models.other_python import ask_transformers_4, needs_transformers_4
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow

HARD_TEXTS = ["two words", "a\nline  and\ttabs {x}", "<extra_id_1> end", " begins with a space", "{\n    1\n}"]
MESSAGES = [
    {"role": role, "content": text}
    for role, text in zip(["user", "assistant", "user"], HARD_TEXTS[:2] * 2, strict=False)
]


def run_merge(base: Path, adapter: Path, output: Path, **changes: Any) -> Path:
    merge(MergeSettings(model_name_or_path=str(base), adapter=adapter, output_dir=output, **changes))
    return output


@pytest.fixture(scope="module")
def sentencepiece_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose tokenizer is only a spiece.model, as in T5's first release."""
    base = make_base(tmp_path_factory.mktemp("sentencepiece") / "base", tied=True)
    for file in base.glob("tokenizer*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(REPOSITORY / "examples" / "quickstart" / "train.jsonl"), model_prefix=str(base / "spiece"),
        vocab_size=250, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1,
        input_sentence_size=300, minloglevel=2,
    )  # fmt: skip
    (base / "spiece.vocab").unlink()
    return base


@pytest.fixture(scope="module")
def adapter_with_tokens(sentencepiece_base: Path) -> Path:
    """An adapter with the base's tokenizer and added tokens, as train writes it."""
    adapter = make_stock_adapter(sentencepiece_base, sentencepiece_base.with_name("adapter"))
    tokenizer, added, _ = extend_tokenizer(load_tokenizer(sentencepiece_base), ["auto"], num_rows=1536)
    assert "\n" in added
    save_tokenizer(tokenizer, adapter)
    write_chat_template(adapter, build_chat_template(load_template("fastchat-t5"), tokenizer), tokenizer)
    return adapter


def read_converter_vocabulary(folder: Path) -> dict[str, int]:
    """Return token -> id as llama.cpp's converter reads it: spiece.model, overridden by added_tokens.json."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokens = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    return tokens | json.loads((folder / "added_tokens.json").read_text())


def test_merge_adds_spiece_model_and_added_tokens_to_the_tokenizer(
    sentencepiece_base: Path, adapter_with_tokens: Path, tmp_path: Path
) -> None:
    merged = run_merge(sentencepiece_base, adapter_with_tokens, tmp_path / "merged")
    assert (merged / "spiece.model").read_bytes() == (sentencepiece_base / "spiece.model").read_bytes()
    vocabulary = load_tokenizer(merged).get_vocab()
    assert {"\n", "{", "<extra_id_0>"} <= vocabulary.keys()
    assert read_converter_vocabulary(merged) == vocabulary
    # the added files don't change the ids in transformers
    ours = load_tokenizer(adapter_with_tokens)
    theirs = AutoTokenizer.from_pretrained(merged)
    for text in HARD_TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def test_an_added_tokens_file_of_the_adapter_is_kept(
    sentencepiece_base: Path, adapter_with_tokens: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(adapter_with_tokens, tmp_path / "adapter")
    (adapter / "added_tokens.json").write_text('{"mine": 400}')
    merged = run_merge(sentencepiece_base, adapter, tmp_path / "merged")
    assert (merged / "added_tokens.json").read_text() == '{"mine": 400}'


@pytest.mark.parametrize(
    "text",
    [
        '{"added_tokens": [' + " " * (8 << 20),
        '{"added_tokens": [{"id": "1", "content": "a"}]}',
        '{"added_tokens": ' + "[" * 9999,
    ],
    ids=["that never ends", "of text", "nested"],
)
def test_an_invalid_list_of_added_tokens_is_refused(
    sentencepiece_base: Path, adapter_with_tokens: Path, tmp_path: Path, text: str
) -> None:
    adapter = shutil.copytree(adapter_with_tokens, tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: added_tokens"):
        run_merge(sentencepiece_base, adapter, tmp_path / "merged", verify=False)


def merge_with_notes(base: Path, adapter: Path, output: Path, **changes: object) -> tuple[MergeResult, list[str]]:
    notes: list[str] = []
    values = {"model_name_or_path": str(base), "adapter": adapter, "output_dir": output, "to": "ctranslate2"}
    report = lambda event: notes.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    return merge(MergeSettings.model_validate(values | changes), report), notes


def test_without_ctranslate2_the_error_says_how_to_install_it(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    with pytest.raises(DependencyError, match="ctranslate2 can't be imported") as caught:
        merge_with_notes(untied_base, adapter, tmp_path / "merged")
    assert caught.value.hint == "pip install ctranslate2"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def ctranslate2() -> Any:
    return pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed: pip install ctranslate2")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.variants("untied")
def test_ctranslate2_gives_our_replies_from_the_converted_folder(tied: bool, ctranslate2: Any, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_stock_adapter(base, tmp_path / "adapter")
    checkpoint = run_merge(base, adapter, tmp_path / "merged")
    merged, _ = merge_with_notes(base, adapter, tmp_path / "converted")
    assert (merged.same_replies, merged.replies) == (4, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "converted", "merged"]
    assert merged.bytes == (tmp_path / "converted" / "model.bin").stat().st_size
    assert "to: ctranslate2\n" in (tmp_path / "converted" / "settings.yaml").read_text()

    # follow the model card by hand: the tokens and the scale of the logits are those of transformers
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    model = load_stock_base(checkpoint)
    ids = tokenizer("Name a color.").input_ids
    model.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    labels = expected[0, 1:]
    with torch.inference_mode():
        log_probs = model(torch.tensor([ids]), decoder_input_ids=expected[:, :-1]).logits[0].log_softmax(-1)
    translator = load_translator(tmp_path / "converted", compute_type="float32")
    source = tokenizer.convert_ids_to_tokens(ids)
    (reply,) = translator.translate_batch([source], beam_size=1, max_decoding_length=8, max_input_length=0)
    assert tokenizer.convert_tokens_to_ids(reply.hypotheses[0]) == [i for i in labels.tolist() if i != 1]
    (score,) = translator.score_batch([source], [tokenizer.convert_ids_to_tokens(labels.tolist())])
    theirs = torch.tensor(score.log_probs[: len(labels)])
    torch.testing.assert_close(theirs, log_probs[torch.arange(len(labels)), labels], rtol=0, atol=1e-3)


@pytest.mark.usefixtures("ctranslate2")
def test_int8_is_smaller_and_reports_the_equal_replies(untied_base: Path, tmp_path: Path) -> None:
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    whole, _ = merge_with_notes(untied_base, adapter, tmp_path / "whole")
    small, notes = merge_with_notes(untied_base, adapter, tmp_path / "small", quantization="int8")
    assert small.bytes < 0.5 * whole.bytes
    assert any(f"CTranslate2 gives the same reply for {small.same_replies} of 4 prompts" in note for note in notes)
    assert small.replies == 4


@pytest.mark.usefixtures("ctranslate2")
@pytest.mark.parametrize("quantization", [None, "int8", "int8_float16", "int16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_size_of_a_conversion_is_estimated_from_above(
    tied: bool, dtype: torch.dtype, quantization: str | None, tmp_path: Path
) -> None:
    from t5tune.converting.ctranslate2 import convert

    base = Checkpoint(make_base(tmp_path / "base", tied=tied, dtype=dtype))
    convert(base.folder, tmp_path, quantization)
    size = (tmp_path / "model.bin").stat().st_size
    weights = {name: base.get_dtype_and_shape(name) for name in base.list_names()}
    assert size <= estimate_converted_size(weights, quantization, base.architecture) < 1.2 * size


@pytest.mark.usefixtures("ctranslate2")
def test_a_conversion_with_different_replies_is_not_published(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctranslate2.converters.transformers import T5Loader

    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    get_model_spec = T5Loader.get_model_spec

    def scaled(self: Any, model: Any) -> Any:
        spec = get_model_spec(self, model)
        spec.decoder.scale_outputs = 0.5
        return spec

    monkeypatch.setattr(T5Loader, "get_model_spec", scaled)
    with pytest.raises(TrainingError, match="the same reply for 4 of 4 prompts; log-probabilities differ by at most"):
        merge_with_notes(untied_base, adapter, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.usefixtures("ctranslate2")
def test_a_failing_converter_is_reported_with_the_versions(
    untied_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctranslate2.converters.transformers import T5Loader

    def fails(self: Any, model: Any) -> Any:
        raise AttributeError("no such layer")

    monkeypatch.setattr(T5Loader, "get_model_spec", fails)
    adapter = make_stock_adapter(untied_base, tmp_path / "adapter")
    with pytest.raises(DependencyError, match=r"CTranslate2 \d.* with transformers 5.*no such layer"):
        merge_with_notes(untied_base, adapter, tmp_path / "converted")


@needs_transformers_4
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_4_and_its_conversion_give_our_logits_and_replies(tied: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter, _ = make_rows_adapter(base, tmp_path / "adapter")
    checkpoint = run_merge(base, adapter, tmp_path / "merged")
    source, target = [[5, 210, 17, 203, 99, 1], [201, 8, 8, 44, 12, 1]], [[0, 203, 31, 7], [0, 210, 201, 12]]
    converted = str(tmp_path / "converted")
    found = ask_transformers_4(checkpoint, tmp_path, inputs=source, decoder_inputs=target, converted=converted)
    assert found["tied"] is tied
    model = load_base(checkpoint, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        ours = model(input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target), use_cache=False).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), ours, rtol=0, atol=1e-5)
    replies = [generate(model, [ids], Decoding(1, 0, max_new_tokens=12))[0] for ids in source]
    assert [cut_at_end_token(reply) for reply in found["replies"]] == replies
    assert found["converted_replies"] == replies


@needs_transformers_4
def test_transformers_4_gives_the_token_ids_of_the_adapters_tokenizer(
    sentencepiece_base: Path, adapter_with_tokens: Path, tmp_path: Path
) -> None:
    merged = run_merge(sentencepiece_base, adapter_with_tokens, tmp_path / "merged")
    found = ask_transformers_4(
        merged, tmp_path, inputs=[[5, 1]], decoder_inputs=[[0]], texts=HARD_TEXTS, messages=MESSAGES
    )
    ours = load_tokenizer(adapter_with_tokens)
    assert [ids[:-1] for ids in found["ids"]] == [ours.encode(text) for text in HARD_TEXTS]
    theirs = AutoTokenizer.from_pretrained(merged)
    assert found["source"] == theirs.apply_chat_template(MESSAGES, add_generation_prompt=True).input_ids


def cut_at_end_token(ids: list[int]) -> list[int]:
    return ids[: ids.index(1)] if 1 in ids else ids
