"""Texts of a model with labels: their words with places, the tokens that carry labels, and what was cut off."""

from dataclasses import replace

import numpy as np
import pytest

from t5tune.data.labels import LabelTask
from t5tune.data.tokens.encoders import make_encoder
from t5tune.data.tokens.source_words import SourceEncoder
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.inference.label_sources import SourceReader
from tests.support.models.tokenizer_kinds import make_gemma_tokenizer

TAG = LabelTask("tag", per_token=True, several=False, names=("a", "b"), source_words="text")
CLASSIFY = replace(TAG, objective="classify", per_token=False)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with a special token before each text, which moves all tokens."""
    folder = tmp_path_factory.mktemp("gemma")
    make_gemma_tokenizer(folder)
    return load_tokenizer(folder)


def make_reader(tokenizer: Tokenizer, task: LabelTask, prefix: str = "", max_length: int = 99) -> SourceReader:
    return SourceReader(task, SourceEncoder(tokenizer, task, prefix), make_encoder(tokenizer), max_length)


@pytest.mark.parametrize("prefix", ["", "tag: "])
def test_words_have_their_places_and_first_tokens(prefix: str, tokenizer: Tokenizer) -> None:
    text = "  Two\u200b red\r\nhats ,\u200b\u3000\u200b x"
    source = make_reader(tokenizer, TAG, prefix).read(text)
    assert [word.text for word in source.words] == ["Two", "red", "hats", ",", "x"]
    assert [text[word.start : word.end].replace("\u200b", "") for word in source.words] == [
        "Two",
        "red",
        "hats",
        ",",
        "x",
    ]
    ids = source.example.source_S.tolist()
    assert ids == tokenizer.special_ids.surround_source(tokenizer.encode(f"{prefix}Two red hats , x"))
    for word in source.words:
        assert word.token is not None
        spelled = tokenizer.decode(ids[word.token : word.token + 1]).strip()
        assert spelled != ""
        assert word.text.startswith(spelled)
    assert source.num_tokens == len(ids) - 1
    assert np.isnan(source.example.values).all()
    assert len(source.example.values) == len(ids)
    given = make_reader(tokenizer, TAG, prefix).read(["Two", "red", "hats", ",", "x"])
    assert given.example.source_S.tolist() == ids
    assert ["Two red hats , x"[word.start : word.end] for word in given.words] == ["Two", "red", "hats", ",", "x"]


def test_residues_and_characters_are_words(tokenizer: Tokenizer) -> None:
    residues = make_reader(tokenizer, replace(TAG, source_words="residues")).read("MK UT")
    assert [(word.text, word.start) for word in residues.words] == [("M", 0), ("K", 1), ("U", 3), ("T", 4)]
    same = make_reader(tokenizer, replace(TAG, source_words="residues")).read("MKXT")
    assert residues.example.source_S.tolist() == same.example.source_S.tolist()
    characters = make_reader(tokenizer, replace(TAG, source_words="characters")).read("a b")
    assert [word.text for word in characters.words] == ["a", " ", "b"]
    assert [word.token is None for word in characters.words] == [False, True, False]


def test_a_text_keeps_its_beginning(tokenizer: Tokenizer) -> None:
    whole = make_reader(tokenizer, TAG).read("Two red hats")
    length = whole.words[2].token
    assert length is not None
    cut = make_reader(tokenizer, TAG, max_length=length).read("Two red hats")
    assert cut.example.source_S.tolist() == whole.example.source_S[:length].tolist()
    assert [word.token for word in cut.words] == [whole.words[0].token, whole.words[1].token, None]
    assert cut.cut_tokens == whole.num_tokens - cut.num_tokens > 0
    found = make_reader(tokenizer, TAG).describe(cut, np.array([[0.0, 9]] * length, np.float32))
    assert found == {"prediction": ["b", "b", None], "probabilities": [pytest.approx(1, abs=1e-3)] * 2 + [None]}


def test_a_text_with_one_label_is_read_as_a_whole(tokenizer: Tokenizer) -> None:
    reader = make_reader(tokenizer, CLASSIFY, "topic: ")
    source = reader.read("Two  red\r\nhats")
    ids = tokenizer.encode("topic: Two  red\nhats")
    assert source.example.source_S.tolist() == tokenizer.special_ids.surround_source(ids)
    assert source.words == []
    assert len(source.example.values) == 1
    assert reader.read(["Two", "red"]).example.source_S.tolist() == reader.read("Two red").example.source_S.tolist()
