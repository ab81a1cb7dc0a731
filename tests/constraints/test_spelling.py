"""Joined spellings are the decoder's text, for each kind of tokenizer."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.constraints.spelling import Spellings, spell
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from tests.support.models.tokenizer_kinds import (
    make_codet5_tokenizer,
    make_gemma_tokenizer,
    make_madlad_tokenizer,
    make_mt5_tokenizer,
)
from tests.support.paths import SHARED


def load_kind(name: str, folder: Path) -> tuple[Tokenizer, int]:
    """Return a tokenizer of this kind, and a number of embedding rows."""
    makers: dict[str, Callable[[Path], int]] = {
        "gemma": make_gemma_tokenizer,
        "codet5": make_codet5_tokenizer,
        "madlad": make_madlad_tokenizer,
        "mt5": make_mt5_tokenizer,
    }
    if name.endswith("-added"):
        plain, rows = load_kind(name.removesuffix("-added"), folder)
        return extend_tokenizer(plain, ["auto"], rows).tokenizer, rows
    if name in makers:
        rows = makers[name](folder)
        return load_tokenizer(folder), rows + 20
    if name == "byt5":
        config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(folder), 384
    if name.startswith("flan-t5"):
        if not (real := SHARED / "tokenizer" / "flan-t5-base").exists():
            pytest.skip("tokenizer/flan-t5-base: the real inputs are not next to this checkout")
        plain, rows = load_tokenizer(real), 32128
    else:
        plain, rows = load_tokenizer(pocket_folder()), 1536
    if name in ("pocket", "flan-t5-plain"):
        return plain, rows
    return extend_tokenizer(plain, ["fastchat"] if name.endswith("fastchat") else ["auto"], rows).tokenizer, rows


def join(spellings: Spellings, ids: list[int]) -> bytes:
    """Join the spellings of a reply's ids, all of them allowed."""
    return b"".join((spellings.later if place else spellings.first)[index] or b"" for place, index in enumerate(ids))


@pytest.mark.parametrize(
    "kind", ["pocket", "added", "fastchat", "gemma", "codet5", "madlad", "mt5", "mt5-added", "byt5"]
)
def test_joined_spellings_are_the_decoded_text(kind: str, tmp_path: Path) -> None:
    tokenizer, num_rows = load_kind(kind, tmp_path)
    spellings = spell(tokenizer, num_rows)
    assert len(spellings.later) == len(spellings.first) == num_rows
    special = {index for index in tokenizer.convert_tokens_to_ids(list(tokenizer.special_tokens)) if index >= 0}
    assert all(spellings.later[index] is None and spellings.first[index] is None for index in special)
    allowed = [index for index, spelling in enumerate(spellings.later) if spelling is not None]
    assert len(allowed) > 200
    chooser, compared = random.Random(3), 0
    while compared < 2000:
        ids = chooser.choices(allowed, k=chooser.randint(1, 8))
        try:
            text = join(spellings, ids).decode()
        except UnicodeDecodeError:  # a part of a character, which decoders write in ways of their own
            continue
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, ids
        compared += 1


def test_a_word_keeps_its_space_except_at_the_beginning(tmp_path: Path) -> None:
    tokenizer, num_rows = load_kind("pocket", tmp_path)
    spellings = spell(tokenizer, num_rows)
    index = tokenizer.get_vocab()["▁the"]
    assert (spellings.later[index], spellings.first[index]) == (b" the", b"the")
    assert spellings.drops_space
    assert not spell(*load_kind("byt5", tmp_path)).drops_space
