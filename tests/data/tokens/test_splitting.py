"""How vocabularies split texts: pocket's, ByT5's and T5's, compared with the tokenizers of transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from t5tune.data.tokens.splitting import measure_split
from t5tune.data.tokens.tokenizer import load_tokenizer
from tests.support.models.tokenizer_kinds import write_config
from tests.support.paths import REPOSITORY

TEXTS = ["Mba'éichapa neko'ẽ?", "Good morning. How are you?", "mokõi 帽子", "Two hats", "og\u0303uahẽ", "g"]


@pytest.mark.parametrize("kind", ["pocket", "byt5", "t5"])
def test_tokens_are_counted_as_transformers_splits(kind: str, tmp_path: Path, shared: Callable[[str], Path]) -> None:
    write_config(tmp_path, tokenizer_class="ByT5Tokenizer")
    folders = {"pocket": lambda: REPOSITORY / "t5tune" / "pocket", "byt5": lambda: tmp_path}
    folder = folders.get(kind, lambda: shared("tokenizer/flan-t5-base"))()
    stock = ByT5Tokenizer() if kind == "byt5" else AutoTokenizer.from_pretrained(folder)
    counts = [len(stock(text, add_special_tokens=False).input_ids) for text in TEXTS]
    split = measure_split("it", "texts", load_tokenizer(folder), TEXTS)
    assert split.tokens_per_word == pytest.approx(sum(counts) / 13, abs=1e-4)
    assert split.tokens_per_character == pytest.approx(sum(counts) / sum(map(len, TEXTS)), abs=1e-4)
    plain = {"pocket": "▁M b a ' <unk> i", "byt5": "M b a ' <0xC3> <0xA9> i", "t5": "▁M b a ' é ich"}
    assert " ".join(split.pieces).startswith(plain[kind])
    assert sum(piece == "<unk>" for piece in split.pieces) == {"pocket": 2, "byt5": 0, "t5": 1}[kind]


def test_characters_are_unknown_in_their_context(shared: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(shared("tokenizer/flan-t5-base"))
    # a letter and a combining mark that T5's normalizer joins are one known character; two letters share an <unk>
    split = measure_split("it", "texts", tokenizer, ["e\u0301", "g\u0303", "帽子", "帽 ok"])
    assert split.unknown == {"帽": 2, "子": 1, "\u0303": 1}
