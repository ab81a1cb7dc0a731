"""Real tokenizers and real data."""

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.commands.prepare.ids import (
    ANSWERS,
    Prepared,
    decode,
    encode,
    fastchat_ids,
    fastchat_text,
    join_sides,
    load_tokenizer_of,
    record,
)
from tests.support.caches import find_cache


@pytest.fixture
def flan(shared: Callable[[str], Path], tmp_path: Path) -> Path:
    """The real tokenizer with its config, as a base model folder."""
    folder = tmp_path / "flan"
    shutil.copytree(shared("tokenizer/flan-t5-base"), folder)
    return folder


@pytest.mark.slow
def test_fastchats_example_data_gives_a_thousand_correct_examples(
    prepared: Prepared, shared: Callable[[str], Path], flan: Path
) -> None:
    data = shared("data/conversations/fastchat_dummy_conversation.json")
    result, cache = prepared(data=data, base=flan)
    assert (result.conversations, result.examples, result.rejected) == (500, 1000, 0)
    assert result.added_tokens == 17
    answers = [
        turn["value"]
        for item in json.loads(data.read_text())
        for turn in item["conversations"]
        if turn["from"] == "gpt"
    ]
    tokenizer = load_tokenizer_of(cache)
    compared = 0
    for example, answer in zip(cache, answers, strict=True):
        if unicodedata.normalize("NFKC", answer) == answer and tokenizer.unk_token_id not in example.target_T:
            assert decode(tokenizer, example.target_T) == answer + "\n"
            compared += 1
    assert compared > 900


@pytest.mark.slow
def test_the_real_tokenizer_decodes_code_unchanged(prepared: Prepared, flan: Path) -> None:
    result, cache = prepared(*[record("Say it.", answer) for answer in ANSWERS], base=flan)
    tokenizer = load_tokenizer_of(cache)
    assert [decode(tokenizer, example.target_T) for example in cache] == [answer + "\n" for answer in ANSWERS]
    assert result.unknown_tokens == 0
    for example, answer in zip(cache, ANSWERS, strict=True):
        assert join_sides(example, answer, cache, tokenizer) == encode(tokenizer, fastchat_text(["Say it.", answer]))


@pytest.mark.slow
def test_fastchats_tokens_on_the_real_tokenizer_give_fastchats_ids(
    prepared: Prepared, shared: Callable[[str], Path], flan: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(str(flan))
    records = json.loads(shared("data/conversations/fastchat_dummy_conversation.json").read_text())[:100]
    _, cache = prepared(*records, base=flan, add_tokens="fastchat")
    number = 0
    for item in records:
        texts = [turn["value"] for turn in item["conversations"]]
        for end in range(2, len(texts) + 1, 2):
            joined = [*cache[number].source_S[:-1], *cache[number].target_T[:-1]]
            assert joined == fastchat_ids(plain, fastchat_text(texts[:end]))
            number += 1
    assert number == len(cache)


@pytest.mark.slow
def test_every_record_of_hh_helpful_is_either_used_or_rejected(
    prepared: Prepared, shared: Callable[[str], Path], flan: Path
) -> None:
    result, cache = prepared(data=shared("data/conversations/hh_helpful.sharegpt.json"), base=flan)
    assert result.conversations + result.rejected == 2354
    rejected = (find_cache(result.cache) / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rejected) == result.rejected == sum(cache.manifest["rejected_by_reason"].values())
