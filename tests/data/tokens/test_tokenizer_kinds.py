"""Tokenizers of other kinds than T5's: their special tokens, round trips, and the tokens that they need."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.chat_template import build_chat_template, write_chat_template
from t5tune.data.tokens.encoders import Beginning, Encoder, Markers, make_encoder
from t5tune.data.tokens.encoding import Example, encode_batch, encode_prompt, extract_example
from t5tune.data.tokens.span_corruption import find_sentinels
from t5tune.data.tokens.templates import Piece, load_template, render_answer_prefix, render_conversation
from t5tune.data.tokens.tokenizer import SpecialIds, decode_prediction, load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.errors import ModelError
from t5tune.inference.prompts import Prompts, ReplyText
from tests.support.models.tokenizer_kinds import (
    make_codet5_tokenizer,
    make_gemma_tokenizer,
    make_madlad_tokenizer,
    read_corpus,
    train_sentencepiece,
    write_config,
)

MAKERS: list[Callable[[Path], int]] = [make_gemma_tokenizer, make_codet5_tokenizer, make_madlad_tokenizer]
KINDS = dict(zip(("gemma", "codet5", "madlad"), MAKERS, strict=True))
TEXTS = [
    "Two  red\n\n  hats\t<2de> {naïve} 😀 ",
    " <start_of_turn>model\n<end_of_turn><bos></s><s><pad><mask>",
    "<0x41><extra_id_0> ~`^\\",
]
START, END = "<start_of_turn>", "<end_of_turn>"


load_cached = cache(load_tokenizer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, make in KINDS.items():
        made[kind] = tmp_path_factory.mktemp("tokenizers") / kind
        made[kind].mkdir()
        make(made[kind])
    return made


def make_conversation(*texts: str, system: str | None = None) -> Conversation:
    turns = tuple(Turn("assistant" if number % 2 else "human", text) for number, text in enumerate(texts))
    return Conversation(RecordLocation("a.jsonl", 1, 0, 0), system, turns)


def encode(conversation: Conversation, template: str, encoder: Encoder) -> list[Example]:
    (encoded,) = encode_batch([render_conversation(conversation, load_template(template))], encoder, 4096)
    return [extract_example(encoded.ids, span, encoder.special_ids) for span in encoded.spans]


@pytest.mark.parametrize(
    ("kind", "special"),
    [("gemma", SpecialIds((2,), (), 1)), ("codet5", SpecialIds((1,), (2,), 2)), ("madlad", SpecialIds((), (2,), 2))],
)
def test_special_tokens_around_texts_come_from_the_post_processor(
    kind: str, special: SpecialIds, folders: dict[str, Path]
) -> None:
    tokenizer = extend_tokenizer(load_tokenizer(folders[kind]), ["auto"], 1000).tokenizer
    assert tokenizer.special_ids == special
    (example,) = encode(make_conversation("Say it.", "two teas"), "plain", make_encoder(tokenizer))
    source, target = example.source_S.tolist(), example.target_T.tolist()
    assert source == [*special.source_start, *tokenizer.encode("Say it."), *special.source_end]
    assert target == [*tokenizer.encode("two teas"), special.target_end]


@pytest.mark.parametrize("kind", KINDS)
def test_stock_transformers_gives_the_same_ids(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders[kind])
    save_tokenizer(tokenizer, tmp_path)
    for folder in (folders[kind], tmp_path):
        stock = AutoTokenizer.from_pretrained(folder)
        # from a SentencePiece model, transformers 5 builds a tokenizer without byte fallback, and with T5's unk id
        knows_bytes = kind != "madlad" or folder == tmp_path
        for text in ("<2de> Two red hats.", "naïve café, two" if knows_bytes else "two", "end"):
            assert tokenizer.special_ids.surround_source(tokenizer.encode(text)) == stock(text).input_ids


@pytest.mark.parametrize(("kind", "name", "token"), [("gemma", "bos_token", "<bos>"), ("codet5", "cls_token", "<s>")])
def test_named_special_tokens_keep_their_names(
    kind: str, name: str, token: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    save_tokenizer(load_tokenizer(folders[kind]), tmp_path)
    assert getattr(AutoTokenizer.from_pretrained(tmp_path), name) == token


def test_a_sentencepiece_model_that_is_not_unigram_is_refused(tmp_path: Path) -> None:
    """Gemma's tokenizer.model is BPE, which can't be read as T5's."""
    train_sentencepiece(tmp_path, read_corpus(), 300, model_type="bpe")
    with pytest.raises(ModelError, match="not a Unigram model like T5's; save the tokenizer as tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_texts_decode_to_themselves_and_never_become_special_tokens(
    kind: str, text: str, folders: dict[str, Path]
) -> None:
    tokenizer = extend_tokenizer(load_tokenizer(folders[kind]), ["auto"], 1000).tokenizer
    (example,) = encode(make_conversation(text, text), "plain", make_encoder(tokenizer))
    assert decode_prediction(tokenizer, example.target_T, "") == text
    around = tokenizer.special_ids
    special = set(tokenizer.convert_tokens_to_ids([*tokenizer.special_tokens]))
    assert special.isdisjoint(around.strip_source(example.source_S.tolist()))
    assert special.isdisjoint(example.target_T.tolist()[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_gets_only_the_special_tokens_that_it_lacks(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders[kind])
    prompts = Prompts(tokenizer, load_template("plain"), 1000)
    around = tokenizer.special_ids
    bare = tokenizer.encode("Two red hats")
    whole = around.surround_source(bare)
    for ids in (bare, whole, [*around.source_start, *bare], [*bare, *around.source_end]):
        prompt = prompts.make_prompt(ids)
        assert (prompt.ids, prompt.num_tokens) == (whole, len(bare))
    assert prompts.make_prompt(around.surround_source(whole)).ids == around.surround_source(whole)
    assert prompts.make_prompt(around.surround_source([])).num_tokens == 0


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0")))
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["gemma", "codet5"])
def test_any_text_decodes_to_itself(kind: str, folders: dict[str, Path], text: str) -> None:
    tokenizer = load_cached(folders[kind])
    (ids,) = make_encoder(tokenizer).encode([Beginning(text)])
    assert decode_prediction(tokenizer, ids, "") == text


def test_only_a_template_s_markers_become_special_tokens(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    texts = [f"Hi {END}\n{START}", f"No{END}", "Again", "Yes"]
    examples = encode(make_conversation(*texts, system=f"Be kind.{END}"), "gemma", make_encoder(tokenizer))
    source, target = examples[0].source_S.tolist(), examples[0].target_T.tolist()
    assert source[:2] == [tokenizer.special_ids.source_start[0], start]
    assert [source.count(token) for token in (start, end)] == [3, 2]
    assert target == [*make_encoder(tokenizer).encode([Beginning(texts[1])])[0].tolist(), end, tokenizer.eos_token_id]
    assert decode_prediction(tokenizer, target, load_template("gemma").answer_suffix) == texts[1]
    whole = f"{START}user\nBe kind.{END}{END}\n{START}user\n{texts[0]}{END}\n{START}model\n"
    assert tokenizer.decode(source[1:]) == whole
    later = f"{whole}{texts[1]}{END}\n{START}user\nAgain{END}\n{START}model\n"
    assert tokenizer.decode(examples[1].source_S[1:]) == later


@pytest.mark.parametrize("kind", ["gemma", "codet5", "madlad"])
def test_apply_chat_template_gives_the_ids_of_training(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = extend_tokenizer(load_tokenizer(folders[kind]), ["auto"], 1000).tokenizer
    save_tokenizer(tokenizer, tmp_path)
    template = load_template("gemma" if kind == "gemma" else "plain")
    write_chat_template(tmp_path, build_chat_template(template, tokenizer), tokenizer)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    for texts in (["Two red hats."], ["Hi {you}", "Two red hats.", "And\nthen?"]):
        conversation = make_conversation(*texts)
        pieces = render_conversation(conversation, template) + render_answer_prefix(template, len(texts))
        prompt = encode_prompt(pieces, make_encoder(tokenizer), 4096).ids
        messages = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]
        found = stock.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if len(texts) == 1 or kind != "codet5":  # byte-level BPE joins the space before an answer with its first word
            assert found == tokenizer.special_ids.surround_source(prompt)
        conversation = make_conversation(*texts, "Yes.")
        examples = encode(conversation, "gemma" if kind == "gemma" else "plain", make_encoder(tokenizer))
        assert examples[-1].source_S.tolist() == tokenizer.special_ids.surround_source(prompt)


@pytest.mark.slow
@hypothesis.given(st.data())
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@pytest.mark.parametrize("kind", [*KINDS, "byt5"])
def test_a_reply_with_invalid_bytes_is_shown_whole(
    kind: str, folders: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    if kind == "byt5":
        write_config(tmp_path, tokenizer_class="ByT5Tokenizer")
    prompts = Prompts(load_cached(folders.get(kind, tmp_path)), load_template("plain"), 2048)
    parts = [prompts.encoder.encode([part])[0].tolist() for part in ("😀", "é", "two", " red", "\n")]
    sentinels = [[index] for index in find_sentinels(prompts.tokenizer)[:2]]
    pieces = [parts[0][:-1], parts[0][-1:], parts[1][-1:], [prompts.tokenizer.eos_token_id]]
    ids = sum(data.draw(st.lists(st.sampled_from([*parts, *pieces, *sentinels]), max_size=8)), [])
    step = data.draw(st.integers(1, 3))
    fills_gaps = data.draw(st.booleans())
    decode = partial(prompts.decode, fills_gaps=fills_gaps)
    assert ("<extra_id_0>" in decode(ids)) == (fills_gaps and sentinels[:1] != [] and sentinels[0][0] in ids)
    for stops in ([], ["two\n"], ["😀"], ["<extra_id_0>"]):
        shown: list[str] = []
        text = ReplyText(prompts, shown.append, stops, fills_gaps)
        counts = (text.update(ids[:end]) for end in [*range(step, len(ids), step), len(ids)])
        count = next((count for count in counts if count is not None), None)
        if count is None:
            assert text.finish(ids) == "".join(shown) == decode(ids)
        else:
            assert "".join(shown) + stops[0] == decode(ids[:count])
        assert not any(stop in decode(ids[:number]) for stop in stops for number in range(count or len(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_is_shown_as_soon_as_it_is_certain(kind: str, folders: dict[str, Path]) -> None:
    """With byte fallback that is with the next token, since an invalid byte would make U+FFFD of all its bytes."""
    prompts = Prompts(load_cached(folders[kind]), load_template("plain"), 2048)
    emoji, word = (ids.tolist() for ids in prompts.encoder.encode(["😀", "two"]))
    shown: list[str] = []
    text = ReplyText(prompts, shown.append)
    text.update([*emoji, *word])
    assert "".join(shown) == prompts.decode([*emoji, *word])


@pytest.mark.parametrize("kind", ["gemma", "codet5"])
@pytest.mark.parametrize("stop", ["red", "\nred", "two"])
def test_a_reply_omits_the_template_s_suffix_before_a_stop(kind: str, stop: str, folders: dict[str, Path]) -> None:
    prompts = Prompts(load_cached(folders[kind]), load_template("fastchat-t5"), 2048)
    ids = prompts.encoder.encode([Beginning("hats\n\nred two")])[0].tolist()
    for step in range(1, len(ids) + 1):
        shown: list[str] = []
        text = ReplyText(prompts, shown.append, [stop])
        assert any(text.update(ids[:end]) for end in [*range(step, len(ids), step), len(ids)])
        assert "".join(shown) == {"red": "hats\n", "\nred": "hats", "two": "hats\n\nred "}[stop]


def test_a_prefixed_piece_knows_its_message() -> None:
    piece = Piece(f"{START}{END}.", "human", 0, (len(START), len(START + END))).prepend(END)
    assert piece.text[slice(*piece.message)] == END


def test_a_marker_s_flags_include_the_whitespace_around_it(folders: dict[str, Path]) -> None:
    """As with RoBERTa's `<mask>`, which includes the space before it."""
    tokenizer = load_tokenizer(folders["codet5"])
    tokenizer.backend.add_special_tokens([AddedToken("<m>", lstrip=True), AddedToken("<n>", rstrip=True)])
    markers = Markers(replace(tokenizer, special_tokens=(*tokenizer.special_tokens, "<m>", "<n>")))
    m, n = tokenizer.convert_tokens_to_ids(["<m>", "<n>"])
    assert markers.split("a <m> b <n> c") == ("a", m, " b ", n, "c")
    tokens = tokenizer.backend.encode("a <m> b <n> c", add_special_tokens=False).tokens
    assert [token.strip() for token in tokens] == ["a", "<m>", "Ġb", "Ġ", "<n>", "c"]


def test_codet5_s_sentinels_from_added_tokens_json_are_special(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["codet5"])
    assert {"<extra_id_0>", "<extra_id_99>", "<mask>", "<s>"} <= set(tokenizer.special_tokens)
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>"]) == [len(tokenizer) - 1]


@pytest.mark.parametrize("kind", ["gemma", "codet5"])
def test_a_vocabulary_that_writes_everything_gets_no_tokens(kind: str, folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders[kind])
    assert extend_tokenizer(tokenizer, ["auto"], 1000) == (tokenizer, [], [])
    known = tokenizer.special_tokens[0]
    assert extend_tokenizer(tokenizer, [known], 1000).added == []


@pytest.mark.parametrize("kind", ["gemma", "codet5"])
@pytest.mark.parametrize(("tokens", "named"), [(["<a>", "<b>"], "'<a>', '<b>'"), (["fastchat"], r"'\[PAD\]'")])
def test_tokens_that_a_tokenizer_cannot_take_are_refused_by_name(
    kind: str, tokens: list[str], named: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ModelError, match=f"add_tokens: {named}.*t5tune can't add tokens to this base's") as refused:
        extend_tokenizer(load_tokenizer(folders[kind]), tokens, 1000)
    assert "leave out --add-tokens" in str(refused.value.hint)


def test_a_vocabulary_with_bytes_gets_no_token_and_keeps_whitespace(folders: dict[str, Path]) -> None:
    """MADLAD-400's embedding has no unused row, and its vocabulary has a newline."""
    tokenizer = load_tokenizer(folders["madlad"])
    extended = extend_tokenizer(tokenizer, ["auto"], len(tokenizer))
    assert extended.added == extended.left_out == []
    newline, german = tokenizer.convert_tokens_to_ids(["\n", "<2de>"])
    ids = extended.tokenizer.encode("<2de> two\n  red\thats")
    assert ids[0] == german
    assert newline in ids
    assert extended.tokenizer.decode(ids) == "<2de> two\n  red\thats"
