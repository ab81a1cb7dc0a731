"""Tokens that are added to a vocabulary, and ByT5, which needs none."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from t5tune.errors import ModelError
from t5tune.planning.known_configs import KNOWN_CONFIGS
from tests.commands.prepare.ids import (
    ANSWERS,
    FASTCHAT_CHARACTERS,
    Prepared,
    decode,
    encode,
    fastchat_ids,
    fastchat_text,
    load_tokenizer_of,
    record,
)


def test_fastchats_tokens_give_fastchats_ids(prepared: Prepared, untied_base: Path) -> None:
    plain = AutoTokenizer.from_pretrained(str(untied_base))
    result, cache = prepared(*[record("Say  it.", answer) for answer in ANSWERS], add_tokens="fastchat")
    assert result.added_tokens == 10
    assert cache.added_tokens == ["[PAD]", *FASTCHAT_CHARACTERS]
    for example, answer in zip(cache, ANSWERS, strict=True):
        joined = [*example.source_S[:-1], *example.target_T[:-1]]
        assert joined == fastchat_ids(plain, fastchat_text(["Say  it.", answer]))


def test_fastchats_tokens_decode_to_the_original_text(prepared: Prepared) -> None:
    answers = [answer for answer in ANSWERS if "~" not in answer]
    _, cache = prepared(*[record("Say it.", answer) for answer in answers], add_tokens="fastchat")
    tokenizer = load_tokenizer_of(cache)
    assert [decode(tokenizer, example.target_T) for example in cache] == [answer + "\n" for answer in answers]


def test_without_added_tokens_the_ids_are_those_of_the_base(prepared: Prepared, untied_base: Path) -> None:
    plain = AutoTokenizer.from_pretrained(str(untied_base))
    result, cache = prepared(record("Hi there", "Yes, two eggs"), add_tokens="none")
    assert result.added_tokens == 0
    joined = [*cache[0].source_S[:-1], *cache[0].target_T[:-1]]
    assert joined == encode(plain, fastchat_text(["Hi there", "Yes, two eggs"]))


def test_the_users_own_tokens_take_the_first_unused_rows(prepared: Prepared, untied_base: Path) -> None:
    plain = AutoTokenizer.from_pretrained(str(untied_base))
    _, cache = prepared(record("Hi", "a =>b => c\n"), add_tokens=["=>", "<think>"])
    tokenizer = load_tokenizer_of(cache)
    assert tokenizer.convert_tokens_to_ids(["=>", "<think>"]) == [len(plain), len(plain) + 1]
    assert cache[0].target_T.tolist().count(len(plain)) == 2
    assert cache.added_tokens == ["=>", "<think>"]
    assert decode(tokenizer, cache[0].target_T) == "a =>b => c "  # newline has no token
    _, cache = prepared(record("Hi", "a =>b => c\n"), add_tokens=["=>", "\n"])
    assert decode(load_tokenizer_of(cache), cache[0].target_T) == "a =>b => c\n\n"


def test_more_added_tokens_than_unused_rows_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"add_tokens: .* 39 unused rows"):
        prepared(record("Hi", "Yes"), add_tokens=[f"@{number}@" for number in range(40)])
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byt5")
    ByT5Tokenizer().save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(KNOWN_CONFIGS["google/byt5-small"]))
    return folder


def test_byt5_gets_no_added_tokens_and_decodes_exactly(prepared: Prepared, byt5: Path) -> None:
    answers = [*ANSWERS, "ü – 한글 😀 ½", "</s><pad>"]
    result, cache = prepared(*[record("Say it.", answer) for answer in answers], base=byt5)
    assert result.added_tokens == 0
    assert result.unknown_tokens == 0
    tokenizer = load_tokenizer_of(cache)
    for example, answer in zip(cache, answers, strict=True):
        target = [int(token) for token in example.target_T[:-1]]
        assert target == [byte + 3 for byte in (answer + "\n").encode()]
        assert decode(tokenizer, example.target_T) == answer + "\n"
        source = [int(token) for token in example.source_S[:-1]]
        assert source == [byte + 3 for byte in (fastchat_text(["Say it."]) + "### Assistant: ").encode()]


def test_byt5_with_the_plain_template_decodes_to_the_original_text(prepared: Prepared, byt5: Path) -> None:
    _, cache = prepared(*[record("How many?", answer) for answer in ANSWERS], base=byt5, conversation_template="plain")
    for example, answer in zip(cache, ANSWERS, strict=True):
        assert example.source_S.tolist() == [*(byte + 3 for byte in b"How many?"), 1]
        assert example.target_T.tolist() == [*(byte + 3 for byte in answer.encode()), 1]
