"""Sources with labels: the ids of the whole text, and each word's label on its first token."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from t5tune.data.labels import LabelTask, TextLabels
from t5tune.data.reading.rejections import Rejection
from t5tune.data.tokens.encoding import extract_labels
from t5tune.data.tokens.source_words import EncodedLabels, SourceEncoder
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.support.models.tokenizer_kinds import (
    make_codet5_tokenizer,
    make_gemma_tokenizer,
    make_madlad_tokenizer,
    make_mt5_tokenizer,
    make_protein_tokenizer,
    read_corpus,
    write_config,
)
from tests.support.paths import REPOSITORY

MAKERS: dict[str, Callable[[Path], int]] = {
    "gemma": make_gemma_tokenizer, "codet5": make_codet5_tokenizer, "madlad": make_madlad_tokenizer,
    "mt5": make_mt5_tokenizer,
}  # fmt: skip
ODD = ["字", "é", "naïve", "{x}", "New York", "a,b", "\u00adx", "😀", "</s>s", "<2de>", "#1", "…"]


def make_task(objective: Any = "tag", source_words: Any = "text", names: tuple[str, ...] = ()) -> LabelTask:
    return LabelTask(objective, objective == "tag", False, names, source_words)


def encode(tokenizer: Tokenizer, words: Any, task: LabelTask | None = None, prefix: str = "") -> tuple[list[int], Any]:
    (source,) = SourceEncoder(tokenizer, task or make_task(), prefix).encode([words])
    return source.ids.tolist(), source.firsts


def find_stock_firsts(words: list[str], encoding: Any) -> list[int]:
    """Find the first token whose offsets are in each word, apart from a token of the space before it."""
    found, start = [], 0
    for word in words:
        end = start + len(word)
        inside = (
            number
            for number, ((first, last), token) in enumerate(zip(encoding.offsets, encoding.tokens, strict=True))
            if first < end and last > start and token.strip("▁Ġ")
        )
        found.append(next(inside))
        start = end + 1
    return found


@pytest.fixture(scope="module", params=["t5", *MAKERS])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "t5":
        return load_tokenizer(REPOSITORY / "t5tune" / "pocket")
    folder = tmp_path_factory.mktemp("tokenizer") / request.param
    folder.mkdir()
    MAKERS[request.param](folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("prefix", ["", "find names: "])
def test_ids_and_first_tokens_equal_the_stock_tokenizers(prefix: str, tokenizer: Tokenizer) -> None:
    words = [*ODD[:6], *" ".join(read_corpus()).split()[:300], *ODD[6:]]
    words = [word for word in words if word not in ("</s>s", "<2de>")]  # special tokens stay text: see below
    before = prefix.split()
    stock = tokenizer.backend.encode(" ".join([*before, *words]), add_special_tokens=False)
    ids, firsts = encode(tokenizer, words, prefix=prefix)
    assert ids == stock.ids
    assert firsts == find_stock_firsts([*before, *words], stock)[len(before) :]


@pytest.mark.parametrize("prefix", ["", "find names: ", "find names:"])
def test_a_word_inside_a_token_of_the_text_before_it_has_no_first_token(prefix: str, tmp_path: Path) -> None:
    make_gemma_tokenizer(tmp_path, splits_words=False)
    tokenizer = load_tokenizer(tmp_path)
    counts = Counter[bool]()
    for words in filter(None, map(str.split, read_corpus())):
        stock = tokenizer.backend.encode(prefix + " ".join(words), add_special_tokens=False)
        (source,) = SourceEncoder(tokenizer, make_task(), prefix).encode([words])
        assert source.ids.tolist() == stock.ids
        expected, start = [], len(prefix)
        for word in words:
            # the token of the word's first character, and what it has before that
            lengths = [*accumulate(map(len, stock.tokens))]
            token = bisect_right(lengths, start)
            before = stock.tokens[token][: start - lengths[token]]
            expected.append(None if before.strip("▁") else token)
            start += len(word) + 1
        assert source.firsts == expected
        assert source.unaligned == [number for number, first in enumerate(expected) if first is None]
        counts.update(first is None for first in expected)
    assert min(counts[True], counts[False]) > 100


def test_special_tokens_have_no_values(tokenizer: Tokenizer) -> None:
    special, task = tokenizer.special_ids, make_task(names=("A", "B"))
    words = ["two", "hats"]
    (encoded,) = SourceEncoder(tokenizer, task, "").encode_labels([TextLabels(words, ("A", "B"), True, False)], 64)
    example = extract_labels(encoded.conversation.ids, encoded.conversation.spans[0], special, task)
    ids, firsts = encode(tokenizer, words)
    assert example.source_S.tolist() == [*special.source_start, *ids, *special.source_end]
    assert len(example.values) == len(example.source_S)
    assert np.flatnonzero(~np.isnan(example.values)).tolist() == [len(special.source_start) + first for first in firsts]


def test_a_record_whose_label_has_no_token_is_rejected(tmp_path: Path) -> None:
    make_gemma_tokenizer(tmp_path, splits_words=False)
    encoder = SourceEncoder(load_tokenizer(tmp_path), make_task(names=("A", "B")), "")
    texts = [TextLabels(["of", "the", "x"], values, True, False) for values in (("A", None, "B"), ("A", "B", None))]
    kept, rejected = encoder.encode_labels(texts, 64)
    assert isinstance(kept, EncodedLabels)
    problem = "word 2, 'the', begins inside a token of the text before it, so no token can have its label"
    assert rejected == Rejection("unaligned_word", problem)


def test_a_text_as_a_whole_has_the_stock_ids(tokenizer: Tokenizer) -> None:
    text = "Two  red hats, \u00e9 {x}"
    for prefix in ("", "rate: ", "rate:"):
        stock = tokenizer.backend.encode(prefix + text, add_special_tokens=False)
        assert encode(tokenizer, [text], make_task("classify"), prefix)[0] == stock.ids


def test_a_word_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    ids, firsts = encode(tokenizer, ["a", "</s>", "<unk>"])
    assert tokenizer.eos_token_id not in ids or tokenizer.eos_token_id == tokenizer.unk_token_id
    assert None not in firsts


def test_a_word_of_bytes_has_its_label_after_the_space(tmp_path: Path) -> None:
    write_config(tmp_path, tokenizer_class="ByT5Tokenizer")
    ids, firsts = encode(load_tokenizer(tmp_path), ["é", "no", " ", "b"], prefix="x: ")
    assert ids == ByT5Tokenizer()("x: é no   b", add_special_tokens=False)["input_ids"]
    assert firsts == [3, 6, None, 11]
    ids, firsts = encode(load_tokenizer(tmp_path), "MKU", make_task(source_words="residues"))
    assert (bytes(index - 3 for index in ids), firsts) == (b"MKX", [0, 1, 2])


@pytest.mark.parametrize(("letters", "text"), [("▁", "M K T X X X X A"), ("", "MKTXXXXA")])
def test_each_residue_is_the_token_that_the_vocabulary_has(letters: str, text: str, tmp_path: Path) -> None:
    make_protein_tokenizer(tmp_path, letters)
    tokenizer = load_tokenizer(tmp_path)
    stock = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert len(stock) == 8
    assert 2 not in stock
    assert encode(tokenizer, "MKTUZOBA", make_task(source_words="residues")) == (stock, [*range(8)])
    assert encode(tokenizer, "MKTUZOBA", make_task("classify", "residues"))[0] == stock
    (unknown,) = SourceEncoder(tokenizer, make_task(source_words="characters"), "").encode(["MKTUZOBA"])
    text = (" " if letters else "").join("MKTUZOBA")
    assert unknown.ids.tolist() == tokenizer.backend.encode(text, add_special_tokens=False).ids
    # without spaces, neighbors share a single unknown token
    assert (unknown.firsts, unknown.unaligned) == (
        ([*range(8)], []) if letters else ([0, 1, 2, 3, None, None, None, 4], [4, 5, 6])
    )


def test_labels_are_cut_with_the_tokens_that_predict_them() -> None:
    tokenizer = load_tokenizer(REPOSITORY / "t5tune" / "pocket")
    task = make_task(names=("A", "B"))
    labels = TextLabels(["two", "lamps", " ", "hats", "lamps"], ("B", None, "C", "A", "D"), True, False)
    encoder = SourceEncoder(tokenizer, task, "")
    stock = tokenizer.backend.encode("two lamps hats lamps", add_special_tokens=False).ids
    (whole,) = encoder.encode_labels([labels], 64)
    assert (whole.names, whole.lost) == (("B", "A", "D"), {"blank_words": 1})
    size = len(tokenizer.encode("two lamps hats"))
    (cut,) = encoder.encode_labels([labels], size + 1)
    assert (cut.names, cut.lost) == (("B", "A"), {"blank_words": 1, "truncated_labels": 1})
    (span,) = cut.conversation.spans
    example = extract_labels(cut.conversation.ids, span, tokenizer.special_ids, task)
    assert example.source_S.tolist() == [*stock[:size], 1]
    learned = {int(place): float(example.values[place]) for place in np.flatnonzero(~np.isnan(example.values))}
    assert learned == {0: 0.0, len(tokenizer.encode("two lamps")): 1.0}
    assert len(example.values) == size + 1
    (lost,) = encoder.encode_labels([TextLabels(["two", "lamps"], (None, "A"), True, False)], 2)
    assert lost.conversation.spans == []
    assert lost.lost == {"truncated_labels": 1, "texts_without_labels": 1}


@pytest.mark.parametrize(
    ("task", "labels", "values"),
    [
        (make_task("classify", names=("a", "b")), TextLabels(["Hi"], ("b",), False, False), [0.0]),
        (LabelTask("classify", False, True, (), "text"), TextLabels(["Hi"], ("b", "a"), False, True), [0.0, 1.0]),
        (LabelTask("classify", False, True, (), "text"), TextLabels(["Hi"], (), False, True), []),
        (make_task("regress"), TextLabels(["Hi"], (-2.5,), False, False), [-2.5]),
    ],
)
def test_a_text_has_its_values_after_its_ids(task: LabelTask, labels: TextLabels, values: list[float]) -> None:
    tokenizer = load_tokenizer(REPOSITORY / "t5tune" / "pocket")
    (encoded,) = SourceEncoder(tokenizer, task, "").encode_labels([labels], 64)
    (span,) = encoded.conversation.spans
    example = extract_labels(encoded.conversation.ids, span, tokenizer.special_ids, task)
    assert example.source_S.tolist() == [*tokenizer.encode("Hi"), 1]
    assert (example.values.tolist(), example.target_T.size) == (values, 0)
    assert json.loads(json.dumps(encoded.names)) == list(labels.values if task.objective == "classify" else ())
