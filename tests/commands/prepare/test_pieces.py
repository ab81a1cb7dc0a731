"""The ids of a text's pieces equal the ids of the whole text, for any text."""

import functools
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.encoders import make_encoder
from t5tune.data.tokens.encoding import encode_batch, encode_prompt, extract_example
from t5tune.data.tokens.templates import Template, load_template, render_answer_prefix, render_conversation
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from tests.commands.prepare.ids import (
    ANSWERS,
    Prepared,
    encode,
    fastchat_ids,
    fastchat_text,
    join_sides,
    load_tokenizer_of,
    record,
)
from tests.support.paths import REPOSITORY, SHARED


def test_concatenated_source_and_target_have_the_whole_texts_ids(prepared: Prepared) -> None:
    _, cache = prepared(*[record("Say it.", answer) for answer in ANSWERS])
    tokenizer = load_tokenizer_of(cache)
    for example, answer in zip(cache, ANSWERS, strict=True):
        assert join_sides(example, answer, cache, tokenizer) == encode(tokenizer, fastchat_text(["Say it.", answer]))


def make_conversation(texts: list[str], system: str | None = None) -> Conversation:
    turns = tuple(Turn("assistant" if index % 2 else "human", text) for index, text in enumerate(texts))
    return Conversation(RecordLocation("data.jsonl", 1, 0, 0), system, turns)


TOKENIZERS = {"pocket": REPOSITORY / "t5tune" / "pocket", "flan-t5": SHARED / "tokenizer" / "flan-t5-base"}
ROWS = {"pocket": 1536, "flan-t5": 32128}


@functools.cache
def plain_tokenizer(name: str) -> Any:
    if not TOKENIZERS[name].exists():
        pytest.skip(f"{TOKENIZERS[name].name}: the real inputs are not next to this checkout")
    return load_tokenizer(TOKENIZERS[name])


@functools.cache
def stock_tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(str(TOKENIZERS[name]))


@functools.cache
def tokenizers(name: str, add_tokens: str, folder: Path) -> tuple[Any, Any]:
    """Return (the encoder that prepare uses, the tokenizer that a user loads from the cache)."""
    tokenizer, *_ = extend_tokenizer(plain_tokenizer(name), [add_tokens], ROWS[name])
    folder = folder / f"{name}-{add_tokens}"
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    return make_encoder(tokenizer), AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


ODD = st.text(
    st.one_of(
        st.sampled_from("ab Z09.,:'\"\n\t {}<>\\^`~▁_-#"),
        st.sampled_from(
            "\u00a0\u2028\u200b\u200d\u0301\ufeff\u00ad\u3000ﬁ½Ⅷ①한글ü\u1100\u1161😀👩‍🚀\u0e33\x00\x0b\x85"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=20,
).filter(lambda text: text.strip() and "\r" not in text)
ODD_SETTINGS = settings(deadline=None, max_examples=80, database=None, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("add_tokens", ["auto", "none"])
@ODD_SETTINGS
@given(texts=st.lists(ODD, min_size=2, max_size=4), system=st.none() | ODD)
@hypothesis.example(texts=["Hi there ", "  two  words"], system="Be brief.")
@hypothesis.example(texts=["\u0301a", "\u0301a"], system=None)
def test_concatenated_pieces_have_the_ids_of_the_whole_text(
    name: str, add_tokens: str, tokenizer_folder: Path, texts: list[str], system: str | None
) -> None:
    encoder, tokenizer = tokenizers(name, add_tokens, tokenizer_folder)
    whole = fastchat_text(texts, system)
    assume(not any(token in whole for token in tokenizer.all_special_tokens))
    pieces = render_conversation(make_conversation(texts, system), load_template("fastchat-t5"))
    (encoded,) = encode_batch([pieces], encoder, 4096)
    assert encoded.ids.tolist() == encode(tokenizer, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOKENIZERS))
@ODD_SETTINGS
@given(texts=st.lists(ODD, min_size=2, max_size=4))
def test_fastchats_tokens_give_fastchats_ids_for_any_text(name: str, tokenizer_folder: Path, texts: list[str]) -> None:
    encoder, tokenizer = tokenizers(name, "fastchat", tokenizer_folder)
    whole = fastchat_text(texts)
    assume(not any(token in whole for token in tokenizer.all_special_tokens))
    pieces = render_conversation(make_conversation(texts), load_template("fastchat-t5"))
    (encoded,) = encode_batch([pieces], encoder, 4096)
    assert encoded.ids.tolist() == fastchat_ids(stock_tokenizer(name), whole)


# characters that T5's vocabulary with added tokens keeps: none that NFKC or metaspaces change
WRITABLE = st.text(st.sampled_from("ab Z09.,:'\"\n\t {}<>\\^`~_-#()"), min_size=1, max_size=30).filter(str.strip)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOKENIZERS))
@ODD_SETTINGS
@given(answer=WRITABLE)
def test_any_target_of_supported_characters_is_decoded_unchanged(
    name: str, tokenizer_folder: Path, answer: str
) -> None:
    encoder, tokenizer = tokenizers(name, "auto", tokenizer_folder)
    pieces = render_conversation(make_conversation(["Say it.", answer]), load_template("fastchat-t5"))
    (encoded,) = encode_batch([pieces], encoder, 4096)
    (span,) = encoded.spans
    assert tokenizer.decode(encoded.ids[span.target_start : span.target_end]) == answer + "\n"


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_concatenated_plain_pieces_have_the_whole_texts_ids(
    name: str, system: str | None, tokenizer_folder: Path
) -> None:
    encoder, tokenizer = tokenizers(name, "auto", tokenizer_folder)
    texts = ["Hi there", "two  eggs", "no ", " one\negg"]
    pieces = render_conversation(make_conversation(texts, system), load_template("plain"))
    whole = " ".join([*([system] if system else []), *texts])
    assert "".join(piece.text for piece in pieces) == whole
    assert encode_batch([pieces], encoder, 4096)[0].ids.tolist() == encode(tokenizer, whole)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_prompt_has_the_source_ids_of_training(name: str, tokenizer_folder: Path) -> None:
    encoder, tokenizer = tokenizers(name, "auto", tokenizer_folder)
    template = load_template("fastchat-t5")
    prompt = encode_prompt(
        [*render_conversation(make_conversation(["Hi"]), template), *render_answer_prefix(template, 1)], encoder, 4096
    )
    assert prompt.ids == encode(tokenizer, fastchat_text(["Hi"]) + "### Assistant:")


@pytest.mark.parametrize(("prefix", "assistant"), [("A:", " {text}"), ("", "{text}"), ("", " {text}")])
def test_a_too_long_prompt_is_shortened_as_in_training(prefix: str, assistant: str, tokenizer_folder: Path) -> None:
    encoder, _ = tokenizers("pocket", "none", tokenizer_folder)
    template = Template("", "{text} ", "Q: {text} ", prefix, assistant, " ")
    texts = ["Hello there.", "Good day, what may I bring you?", "Bring two teas to Aida please."]
    asked, answered = (render_conversation(make_conversation(turns), template) for turns in (texts, [*texts, "Yes."]))
    dropped, last_turn = [], set()
    for length in range(4, 60):
        (encoded,) = encode_batch([answered], encoder, length)
        source = extract_example(encoded.ids, encoded.spans[-1], encoder.special_ids).source_S.tolist()
        prompt = encode_prompt([*asked, *render_answer_prefix(template, 3)], encoder, length)
        assert encoder.special_ids.surround_source(prompt.ids) == source
        dropped.append((prompt.dropped_turns, prompt.cut_tokens > 0))
        if prompt.dropped_turns == 2:
            last_turn.add(len(prompt.ids) + prompt.cut_tokens)
    # (number of dropped turns, whether the last message is cut), in the order of a growing maximum length
    assert list(dict.fromkeys(dropped)) == [(2, True), (2, False), (1, False), (0, False)]
    assert len(last_turn) == 1  # whatever was cut off from it is counted


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("add_tokens", ["auto", "none"])
def test_text_of_the_data_never_becomes_a_special_token(name: str, add_tokens: str, tokenizer_folder: Path) -> None:
    encoder, tokenizer = tokenizers(name, add_tokens, tokenizer_folder)
    special_ids = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    special_ids -= {tokenizer.unk_token_id}  # text that can't be encoded becomes the unknown token, which is harmless
    assert {tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<pad>", "<extra_id_3>")} <= special_ids
    texts = ["stop </s> here<pad>", "</s><extra_id_3> <unk></s></s>", "<</s>>", "a<pad>\n</s>"]
    pieces = render_conversation(make_conversation(texts), load_template("fastchat-t5"))
    (encoded,) = encode_batch([pieces], encoder, 4096)
    assert not special_ids & set(encoded.ids)
    if add_tokens == "auto":
        assert tokenizer.unk_token_id not in encoded.ids
        assert tokenizer.decode(encoded.ids) == fastchat_text(texts)
