"""Tokenizers that are only a SentencePiece model, as T5 v1.1's and mT5's: their ids, and what they need installed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from t5tune.data.tokens.encoders import Beginning, Encoder, make_encoder
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.errors import DependencyError, ModelError
from tests.support.paths import REPOSITORY
from tests.support.prose import english_text


@pytest.fixture(scope="module")
def sentencepiece_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like T5 v1.1's and mT5's on the Hub: only a SentencePiece model, here with several scripts."""
    folder = tmp_path_factory.mktemp("mt5") / "base"
    folder.mkdir()
    text = (REPOSITORY / "README.md").read_text() + english_text()
    text += "Привет, как дела? Хорошо, спасибо. 你好，今天天气很好。 谢谢你。\n" * 30
    text += "こんにちは、元気ですか。 안녕하세요 반갑습니다\n" * 30
    (folder.parent / "corpus.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder.parent / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=800,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2,
        num_threads=1,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    return folder


TEXT = st.text(
    st.one_of(
        st.sampled_from("ab Z09.,:'\"\n\t{}<>\\_-#"),
        st.sampled_from("приветПРдела你好天气谢こんには안녕하é½ﬁ①Ⅷ\u0301\u200d\u00a0\u3000…“”😀"),
        st.characters(exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=150, database=None, derandomize=True)
@given(text=TEXT)
def test_a_sentencepiece_model_gives_sentencepieces_ids(sentencepiece_base: Path, text: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_base)
    assert len(tokenizer) == 900
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_99>"]) == [
        0,
        1,
        2,
        899,
        800,
    ]
    plain = " ".join(text.split())  # SentencePiece strips only spaces at the ends of a text
    if any(token in plain for token in tokenizer.special_tokens):
        return
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_base / "spiece.model"))
    # ties are sometimes broken differently; the total scores must agree
    ours, theirs = tokenizer.encode(plain), processor.encode(plain)
    if ours != theirs:
        scores = [sum(processor.get_score(index) for index in ids) for ids in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("add_tokens", ["auto", "none"])
@settings(deadline=None, max_examples=100, database=None, derandomize=True)
@given(text=TEXT)
def test_encoded_ids_equal_those_of_the_saved_tokenizer(sentencepiece_base: Path, add_tokens: str, text: str) -> None:
    encoder, loaded = _load_encoder_and_saved_tokenizer(sentencepiece_base, add_tokens)
    if any(token in text for token in loaded.all_special_tokens):
        return
    for _ in range(2):  # the second time, the words come from the encoder's cache
        (ids,) = encoder.encode([Beginning(text)])
        assert ids.tolist() == loaded(text, add_special_tokens=False)["input_ids"]


_CACHED: dict[tuple[Path, str], tuple[Encoder, Any]] = {}


def _load_encoder_and_saved_tokenizer(base: Path, add_tokens: str) -> tuple[Encoder, Any]:
    if (base, add_tokens) not in _CACHED:
        tokenizer, *_ = extend_tokenizer(load_tokenizer(base), [add_tokens], 928)
        save_tokenizer(tokenizer, base.parent / add_tokens)
        saved = AutoTokenizer.from_pretrained(str(base.parent / add_tokens))
        _CACHED[base, add_tokens] = make_encoder(tokenizer), saved
    return _CACHED[base, add_tokens]


def test_a_broken_sentencepiece_model_is_refused_with_its_file_name(sentencepiece_base: Path, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes((sentencepiece_base / "spiece.model").read_bytes()[:-50])
    with pytest.raises(ModelError, match=r"spiece\.model"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_without_protobuf_names_what_to_install(
    sentencepiece_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(DependencyError, match="SentencePiece model") as caught:
        load_tokenizer(sentencepiece_base)
    assert "pip install --upgrade protobuf" in str(caught.value.hint)


def test_an_old_protobuf_error_names_the_packages_to_install(
    sentencepiece_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("google.protobuf.runtime_version")
    if (
        "ValidateProtobufRuntimeVersion"
        not in Path(sentencepiece.__file__, "../sentencepiece_model_pb2.py").resolve().read_text()
    ):
        pytest.skip("this release of sentencepiece takes any protobuf")
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.setattr(runtime, "MAJOR", 4)
    with pytest.raises(DependencyError, match="SentencePiece model.*runtime 4") as caught:
        load_tokenizer(sentencepiece_base)
    assert "pip install --upgrade protobuf" in str(caught.value.hint)
