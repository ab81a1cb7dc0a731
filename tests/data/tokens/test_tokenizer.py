"""Token ids of the tokenizers of other families, for any text: pocket, one like mT5's (byte fallback), and ByT5."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens import encoders
from t5tune.data.tokens.encoders import Beginning, Encoder
from t5tune.data.tokens.encoding import encode_batch
from t5tune.data.tokens.templates import load_template, render_conversation
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from tests.support.models.tokenizer_kinds import train_sentencepiece, write_config
from tests.support.paths import REPOSITORY
from tests.support.prose import english_text

FAMILIES = ["pocket", "mt5", "byt5"]
CONTROLS = ["</s>", "<pad>", "<unk>", "<extra_id_7>", "<extra_id_99>", "<0x0A>"]
PARTS = st.one_of(
    st.sampled_from([*CONTROLS, "<", "/s>", " ", "\n", "  ", "{a: 1}", "two hats", "▁", "1.5", "- x\n"]),
    st.sampled_from(
        ["привет", "你好", "안녕", "é", "e\u0301", "\u200d", "\u00a0", "ﬁ", "😀", "\U0001f469\u200d\U0001f680"]
    ),
    st.characters(exclude_categories=["Cs", "Cc"]),
)
TEXT = st.lists(PARTS, min_size=1, max_size=12).map("".join).filter(str.strip)
TEXTS = st.lists(TEXT, min_size=2, max_size=4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders as on the hub: mT5 with a SentencePiece model with byte fallback, and ByT5 without a vocabulary."""
    folder = tmp_path_factory.mktemp("families")
    for name in ("mt5", "byt5"):
        (folder / name).mkdir()
    lines = english_text().splitlines()[:300]
    lines += ["привет, как дела? 你好，今天天气很好。"] * 30
    train_sentencepiece(folder / "mt5", lines, 700, byte_fallback=True, character_coverage=0.99)
    write_config(folder / "mt5", tokenizer_class="T5Tokenizer", extra_ids=100)
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_config(folder / "byt5", tokenizer_class="ByT5Tokenizer", extra_ids=125, **names)
    return folder


@cache
def make_encoder(bases: Path, name: str, add_tokens: str) -> tuple[Tokenizer, Encoder]:
    """Return the tokenizer and encoder that prepare uses; mT5's embedding has unused rows too."""
    folder = REPOSITORY / "t5tune" / "pocket" if name == "pocket" else bases / name
    plain = load_tokenizer(folder)
    tokenizer, *_ = extend_tokenizer(plain, [add_tokens], len(plain) + 28 if name == "mt5" else 1536)
    return tokenizer, encoders.make_encoder(tokenizer)


@cache
def load_saved(bases: Path, name: str, add_tokens: str) -> Any:
    """Load the tokenizer with transformers from the folder that prepare saves."""
    folder = bases / f"saved-{name}-{add_tokens}"
    save_tokenizer(make_encoder(bases, name, add_tokens)[0], folder)
    return AutoTokenizer.from_pretrained(str(folder))


def render_pieces(texts: list[str]) -> Any:
    turns = tuple(Turn("assistant" if index % 2 else "human", text) for index, text in enumerate(texts))
    return render_conversation(
        Conversation(RecordLocation("a.jsonl", 1, 0, 0), None, turns), load_template("fastchat-t5")
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("add_tokens", ["auto", "none"])
@settings(deadline=None, max_examples=60, database=None, derandomize=True)
@given(texts=TEXTS)
def test_turns_have_the_whole_text_s_ids_without_control_ids(
    bases: Path, name: str, add_tokens: str, texts: list[str]
) -> None:
    tokenizer, encoder = make_encoder(bases, name, add_tokens)
    pieces = render_pieces(texts)
    (encoded,) = encode_batch([pieces], encoder, 4096)
    (whole,) = encoder.encode([Beginning("".join(piece.text for piece in pieces))])
    assert encoded.ids.tolist() == whole.tolist()
    special_ids = set(tokenizer.convert_tokens_to_ids([*tokenizer.special_tokens])) - {tokenizer.unk_token_id}
    if name == "byt5":  # its sentinels follow the bytes
        special_ids |= set(range(259, len(tokenizer)))
    assert len(special_ids) > 3
    assert not special_ids & set(encoded.ids.tolist())
    if name == "byt5":
        assert tokenizer.decode(encoded.ids) == "".join(piece.text for piece in pieces)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mt5", "byt5"])
@pytest.mark.parametrize("add_tokens", ["auto", "none"])
@settings(deadline=None, max_examples=40, database=None, derandomize=True)
@given(texts=TEXTS)
def test_the_saved_tokenizer_gives_equal_ids(bases: Path, name: str, add_tokens: str, texts: list[str]) -> None:
    theirs = load_saved(bases, name, add_tokens)
    pieces = render_pieces([text.replace("<", "(") for text in texts])  # transformers would take `</s>` for the token
    (encoded,) = encode_batch([pieces], make_encoder(bases, name, add_tokens)[1], 4096)
    text = "".join(piece.text for piece in pieces)
    assert encoded.ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_characters_without_a_token_are_decoded_from_byte_tokens(bases: Path) -> None:
    for add_tokens in ("none", "auto"):
        tokenizer, encoder = make_encoder(bases, "mt5", add_tokens)
        (ids,) = encoder.encode([Beginning("한 Ω 😀")])
        (written,) = encoder.encode([Beginning("a<0x0A>b")])
        assert tokenizer.backend.token_to_id("<0x0A>") not in written
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == load_saved(bases, "mt5", add_tokens).decode(ids) == "한 Ω 😀"


def test_repr_is_short() -> None:
    """A notebook shows the repr of a Chatter; the backend's would print its normalizer, 300,000 characters."""
    tokenizer = load_tokenizer(REPOSITORY / "t5tune" / "pocket")
    assert len(repr(tokenizer)) < 1500
