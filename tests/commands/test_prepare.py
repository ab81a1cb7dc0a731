"""prepare: the ids of the token cache, truncation, rejected records, added tokens, templates, and reproducibility."""

import functools
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from t5tune.commands.prepare import PrepareResult, prepare
from t5tune.data.caches.cache import Cache
from t5tune.data.caches.prepared import open_examples
from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.encoders import make_encoder
from t5tune.data.tokens.encoding import Example, encode_batch, encode_prompt, extract_example
from t5tune.data.tokens.templates import Template, load_template, render_answer_prefix, render_conversation
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.errors import DataError, ModelError, SettingsError
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.settings import PrepareSettings
from tests.support.caches import find_cache, open_only, prepare_for_run
from tests.support.paths import REPOSITORY, SHARED

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
FASTCHAT_CHARACTERS = ["<", "{", "\n", "}", "`", " ", "\\", "^", "\t"]
SPECIAL_TOKENS = ["</s>", "<pad>", "<unk>", "<extra_id_3>"]
ANSWERS = [
    '{\n  "name": "Tomas",\n  "egg": 3\n}',
    "a\tb\t\tc",
    "back\\slash \\n is no newline, ^ and ` and ~ and <b>",
    *["def f():\n" + " " * width + "return 1" for width in range(1, 21)],
    "runs  of   spaces     mid-line",
    "   at the start",
    "\nleading newline",
    "\n\n  both",
    "\tleading tab",
    "at the end   ",
    "at the end\n\n",
    "x",
    "they do n't . Yes , it 's so ! 1 , 2",
]


def record(*texts: str, **more: Any) -> dict[str, Any]:
    """Return a ShareGPT record whose turns alternate: human, gpt, human, …"""
    turns = [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]
    return {"conversations": turns, **more}


def write_lines(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")
    return path


@pytest.fixture
def prepared(tmp_path: Path, untied_base: Path) -> Callable[..., tuple[PrepareResult, Cache]]:
    """Return a function that prepares records or a data file and opens the cache."""

    def run(
        *records: Any, data: Path | None = None, base: Path = untied_base, **more: Any
    ) -> tuple[PrepareResult, Cache]:
        data = data or write_lines(tmp_path / "in" / "data.jsonl", *records)
        values = {"model_name_or_path": str(base), "data_path": str(data), "output_dir": tmp_path / "cache"}
        values |= {"max_rejected_fraction": None, **more}
        result = prepare(PrepareSettings(**values))
        return result, open_only(result.cache)

    return run


def load_tokenizer_of(cache: Cache) -> Any:
    """Load the cache's tokenizer with transformers, as a user would."""
    return AutoTokenizer.from_pretrained(str(cache.tokenizer_folder))


def decode(tokenizer: Any, ids: Any) -> str:
    """Decode ids without their EOS token, but with special tokens."""
    ids = [int(token) for token in ids]
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def fastchat_text(texts: list[str], system: str | None = None) -> str:
    """Render turns that alternate human, assistant, … as FastChat does, independently of the package."""
    names = ["### Human: ", "### Assistant: "]
    turns = "".join(names[index % 2] + text + "\n" for index, text in enumerate(texts))
    return (SYSTEM if system is None else system) + "\n\n" + turns


def fastchat_ids(plain: Any, text: str) -> list[int]:
    """Compute FastChat's ids: the text is split at each added token, and what is between is encoded separately."""
    first = len(plain) + 1  # [PAD] takes the first new id
    ids: list[int] = []
    for part in re.split("([" + re.escape("".join(FASTCHAT_CHARACTERS)) + "])", text):
        if part in FASTCHAT_CHARACTERS and part:
            ids.append(first + FASTCHAT_CHARACTERS.index(part))
        elif part:
            ids += encode(plain, part)
    return ids


# -- sources and targets


def test_each_assistant_turn_is_an_example_whose_source_is_all_the_text_before_it(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    texts = ["Hello.", "Hi,\nwho is it?", "Mira.", "{a: 1}"]
    result, cache = prepared(record(*texts))
    assert (result.conversations, result.examples, len(cache)) == (1, 2, 2)
    tokenizer = load_tokenizer_of(cache)
    for number, example in enumerate(cache):
        before = fastchat_text(texts[: 2 * number + 1]) + "### Assistant:"
        assert decode(tokenizer, example.source_S) == before
        assert decode(tokenizer, example.target_T) == texts[2 * number + 1] + "\n"
        assert example.source_S[-1] == example.target_T[-1] == tokenizer.eos_token_id
        assert example.source_S.dtype == example.target_T.dtype == np.int64
    assert result.source_tokens == sum(len(example.source_S) for example in cache)
    assert result.target_tokens == sum(len(example.target_T) for example in cache)


def test_a_records_system_message_replaces_that_of_the_template(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    said_as_turn = record("Hi", "Yes")
    said_as_turn["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    _, cache = prepared(record("Hi", "Yes", system="Be brief."), said_as_turn)
    for example in cache:
        assert decode(load_tokenizer_of(cache), example.source_S) == "Be brief.\n\n### Human: Hi\n### Assistant:"


def test_targets_decode_to_the_original_assistant_turns(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    result, cache = prepared(*[record("Say it.", answer) for answer in ANSWERS])
    tokenizer = load_tokenizer_of(cache)
    assert [decode(tokenizer, example.target_T) for example in cache] == [answer + "\n" for answer in ANSWERS]
    assert result.unknown_tokens == 0


def test_sources_decode_to_the_original_human_turns(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    _, cache = prepared(*[record(text, "Yes") for text in ANSWERS])
    tokenizer = load_tokenizer_of(cache)
    for example, text in zip(cache, ANSWERS, strict=True):
        assert decode(tokenizer, example.source_S) == fastchat_text([text]) + "### Assistant:"


def test_the_plain_template_has_the_human_turn_as_source_and_the_assistant_turn_as_target(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    _, cache = prepared(record("How many?", "Two  eggs"), conversation_template="plain")
    tokenizer = load_tokenizer_of(cache)
    assert decode(tokenizer, cache[0].source_S) == "How many?"
    assert decode(tokenizer, cache[0].target_T) == "Two  eggs"


def join_sides(example: Example, answer: str, cache: Cache, tokenizer: Any) -> list[int]:
    """Concatenate source and target, with the token of the space between them, which none has before an added token."""
    space = [tokenizer.convert_tokens_to_ids("▁")] if answer.startswith(tuple(cache.added_tokens)) else []
    return [*example.source_S[:-1], *space, *example.target_T[:-1]]


def test_concatenated_source_and_target_have_the_ids_of_the_whole_text(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    _, cache = prepared(*[record("Say it.", answer) for answer in ANSWERS])
    tokenizer = load_tokenizer_of(cache)
    for example, answer in zip(cache, ANSWERS, strict=True):
        assert join_sides(example, answer, cache, tokenizer) == encode(tokenizer, fastchat_text(["Say it.", answer]))


# -- concatenated ids of pieces, for unusual text, with the pocket tokenizer and the real one


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
def test_concatenated_pieces_of_the_plain_template_have_the_ids_of_the_whole_text(
    name: str, system: str | None, tokenizer_folder: Path
) -> None:
    encoder, tokenizer = tokenizers(name, "auto", tokenizer_folder)
    texts = ["Hi there", "two  eggs", "no ", " one\negg"]
    pieces = render_conversation(make_conversation(texts, system), load_template("plain"))
    whole = " ".join([*([system] if system else []), *texts])
    assert "".join(piece.text for piece in pieces) == whole
    assert encode_batch([pieces], encoder, 4096)[0].ids.tolist() == encode(tokenizer, whole)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_prompt_has_the_same_ids_as_the_source_in_training(name: str, tokenizer_folder: Path) -> None:
    encoder, tokenizer = tokenizers(name, "auto", tokenizer_folder)
    template = load_template("fastchat-t5")
    prompt = encode_prompt(
        [*render_conversation(make_conversation(["Hi"]), template), *render_answer_prefix(template, 1)], encoder, 4096
    )
    assert prompt.ids == encode(tokenizer, fastchat_text(["Hi"]) + "### Assistant:")


@pytest.mark.parametrize(("prefix", "assistant"), [("A:", " {text}"), ("", "{text}"), ("", " {text}")])
def test_a_prompt_that_is_too_long_is_shortened_as_the_source_in_training(
    prefix: str, assistant: str, tokenizer_folder: Path
) -> None:
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
    # in this order: the last message is cut, then it is left alone, and so on
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


@pytest.mark.parametrize("add_tokens", ["auto", "none"])
def test_text_of_the_data_never_becomes_a_special_token_in_the_cache(
    prepared: Callable[..., tuple[PrepareResult, Cache]], add_tokens: str
) -> None:
    records = [record(f"what is {token}", f"it is {token}") for token in SPECIAL_TOKENS]
    _, cache = prepared(*records, add_tokens=add_tokens)
    tokenizer = load_tokenizer_of(cache)
    special_ids = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} - {tokenizer.unk_token_id}
    for example in cache:
        assert not special_ids & set(example.source_S[:-1].tolist())
        assert not special_ids & set(example.target_T[:-1].tolist())


# -- length


def test_truncation_drops_the_oldest_turns_first_and_keeps_the_system_line(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    texts = [f"{'water ' * (number % 5 + 1)}{number}" for number in range(12)]
    limit = 150
    result, cache = prepared(record(*texts, system="Be brief."), model_max_length=limit)
    tokenizer = load_tokenizer_of(cache)
    system = encode(tokenizer, "Be brief.\n\n")
    cut = 0
    for number, example in enumerate(cache):
        answer = 2 * number + 1
        names = ["### Human: ", "### Assistant: "]
        turns = [names[index % 2] + text + "\n" for index, text in enumerate(texts[:answer])]
        # as few of the oldest turns as possible are dropped
        for dropped in range(answer):
            kept = "Be brief.\n\n" + "".join(turns[dropped:]) + "### Assistant:"
            if len(encode(tokenizer, kept)) + 1 <= limit:
                break
        assert decode(tokenizer, example.source_S) == kept
        assert example.source_S[: len(system)].tolist() == system
        assert decode(tokenizer, example.target_T) == texts[answer] + "\n"
        cut += dropped > 0
    assert 0 < cut < len(cache)
    assert result.truncated_sources == cut
    assert result.truncated_targets == 0


def test_a_single_human_turn_that_is_too_long_loses_its_start(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    question = " ".join(str(number) for number in range(200))
    result, cache = prepared(record("Hi", "Yes", question, "No", system="Be brief."), model_max_length=64)
    tokenizer = load_tokenizer_of(cache)
    system = encode(tokenizer, "Be brief.\n\n")
    whole = encode(tokenizer, fastchat_text(["Hi", "Yes", question], "Be brief.") + "### Assistant:")
    expected = [*system, *whole[-(63 - len(system)) :], tokenizer.eos_token_id]
    assert cache[1].source_S.tolist() == expected
    assert len(expected) == 64
    assert result.truncated_sources == 1


def test_a_system_line_that_is_too_long_leaves_room_for_the_human_turn(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    _, cache = prepared(record("Where is Mira?", "Here"), model_max_length=40)
    assert len(cache[0].source_S) == 40
    assert decode(load_tokenizer_of(cache), cache[0].source_S).endswith("Mira?\n### Assistant:")


def test_a_truncated_target_has_no_end_token(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    answer = " ".join(str(number) for number in range(200))
    result, cache = prepared(record("Count.", answer, "Thanks", "Yes"), model_max_length=64)
    tokenizer = load_tokenizer_of(cache)
    whole = encode(tokenizer, fastchat_text(["Count.", answer]))
    before = len(encode(tokenizer, fastchat_text(["Count."]) + "### Assistant:"))
    assert cache[0].target_T.tolist() == whole[before : before + 64]
    assert tokenizer.eos_token_id not in cache[0].target_T
    assert cache[1].target_T[-1] == tokenizer.eos_token_id
    assert result.truncated_targets == 1


def test_a_target_that_just_fits_keeps_its_end_token(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    # in pocket's vocabulary " 1", then each further digit, and the newline are a token each
    for digits, whole in ((8, True), (32, True), (33, True), (34, False), (40, False)):
        answer = "7" * digits
        result, cache = prepared(record("Count.", answer), model_max_length=36)
        length = len(encode(load_tokenizer_of(cache), answer + "\n"))
        assert (length + 1 <= 36) is whole, "check of this test's own arithmetic"
        assert len(cache[0].target_T) == (length + 1 if whole else 36)
        assert result.truncated_targets == (not whole)


def test_a_long_conversation_gives_every_target_with_its_own_source(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    texts = [f"{'question' if number % 2 == 0 else 'answer'} {number}\n  {{{number}}}" for number in range(400)]
    result, cache = prepared(record(*texts), model_max_length=256)
    assert result.examples == 200
    tokenizer = load_tokenizer_of(cache)
    for number, example in enumerate(cache):
        assert decode(tokenizer, example.target_T) == texts[2 * number + 1] + "\n"
        source = decode(tokenizer, example.source_S)
        assert source.startswith(SYSTEM[:20])
        assert source.endswith(f"### Human: {texts[2 * number]}\n### Assistant:")
        assert len(example.source_S) <= 256


# -- which records can be used


def test_all_role_names_are_known(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    humans, assistants = ["human", "user", "Human ", "tool"], ["gpt", "assistant", "GPT", "chatgpt"]
    records = [
        {"conversations": [{"from": human, "value": "Hi"}, {"from": assistant, "value": "Yes"}]}
        for human, assistant in zip(humans, assistants, strict=True)
    ]
    result, cache = prepared(*records)
    assert (result.conversations, result.rejected) == (4, 0)
    assert len({tuple(example.source_S) for example in cache}) == 1


def test_a_leading_assistant_turn_and_a_trailing_human_turn_are_left_out(
    prepared: Callable[..., tuple[PrepareResult, Cache]],
) -> None:
    leading = {"conversations": [{"from": "gpt", "value": "I begin"}, *record("Hi", "Yes")["conversations"]]}
    result, cache = prepared(leading, record("Hi", "Yes", "And?"))
    assert (result.conversations, result.examples, result.rejected) == (2, 2, 0)
    for example in cache:
        assert decode(load_tokenizer_of(cache), example.source_S) == fastchat_text(["Hi"]) + "### Assistant:"
    assert cache.manifest["repaired"] == {"leading_assistant_turns": 1, "trailing_human_turns": 1}


@pytest.mark.parametrize("suffix", ["\n", " <end>\n"])
def test_a_blank_assistant_turn_is_context_but_not_a_target(
    suffix: str, prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    template = yaml.safe_load((REPOSITORY / "templates" / "conversations" / "fastchat-t5.yaml").read_text())
    (tmp_path / "own.yaml").write_text(json.dumps(template | {"assistant": "{text}" + suffix}))
    result, cache = prepared(record("Hi", " \n", "Well?", "Yes"), conversation_template=str(tmp_path / "own.yaml"))
    assert result.examples == 1
    expected = fastchat_text(["Hi", " \n" + suffix.rstrip("\n"), "Well?"]) + "### Assistant:"
    assert decode(load_tokenizer_of(cache), cache[0].source_S) == expected


def test_carriage_returns_become_newlines(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    _, cache = prepared(record("Hi", "a\r\nb\rc"))
    assert decode(load_tokenizer_of(cache), cache[0].target_T) == "a\nb\nc\n"


def make_turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in pairs]}


UNUSABLE = [
    (["no", "object"], "not_an_object"),
    ("text", "not_an_object"),
    ({"text": "Hi"}, "unknown_format"),
    ({"conversations": "Hi"}, "unknown_format"),
    ({"conversations": ["Hi"]}, "bad_turn"),
    ({"conversations": [{"from": "human"}]}, "bad_turn"),
    (make_turns(("narrator", "Hi"), ("gpt", "Yes")), "unknown_role"),
    (make_turns((3, "Hi"), ("gpt", "Yes")), "unknown_role"),
    (make_turns(("human", 3), ("gpt", "Yes")), "not_text"),
    (make_turns(("human", "Hi"), ("gpt", None)), "not_text"),
    ({**record("Hi", "Yes"), "system": 3}, "not_text"),
    (make_turns(("human", "Hi"), ("human", "Hi"), ("gpt", "Yes")), "same_role_twice"),
    (make_turns(("human", "Hi"), ("gpt", "Yes"), ("gpt", "Yes")), "same_role_twice"),
    (make_turns(("human", "Hi"), ("system", "Be brief."), ("gpt", "Yes")), "misplaced_system"),
    (make_turns(("system", "Be brief."), ("system", "Be long."), ("human", "Hi"), ("gpt", "Yes")), "misplaced_system"),
    (make_turns(("human", "Hi")), "no_answer"),
    (make_turns(("human", "Hi"), ("gpt", "  \n")), "no_answer"),
    (make_turns(("gpt", "Yes")), "no_answer"),
    (make_turns(), "no_answer"),
    (make_turns(("human", "Hi \ud800"), ("gpt", "Yes")), "lone_surrogate"),
    ({**record("Hi", "Yes"), "system": "\udfff"}, "lone_surrogate"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "reason"), UNUSABLE)
def test_an_unusable_record_is_written_in_full_with_its_location_and_reason(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path, bad: Any, reason: str
) -> None:
    result, cache = prepared(record("Hi", "Yes"), bad, record("Hi", "No"))
    assert (result.conversations, result.rejected, result.examples) == (2, 1, 2)
    (line,) = (find_cache(result.cache) / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = json.loads(line)
    assert rejected["record"] == bad
    assert rejected["file"] == str(tmp_path / "in" / "data.jsonl")
    assert rejected["line"] == 2
    assert rejected["reason"] == reason
    assert rejected["message"]
    assert cache.manifest["rejected_by_reason"] == {reason: 1}


def test_a_line_that_is_not_json_is_rejected_and_the_others_are_used(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    good = json.dumps(record("Hi", "Yes"))
    data = tmp_path / "data.jsonl"
    data.write_text(f"{good}\n\n{good[:-5]}\n{good}\n", encoding="utf-8")
    result, _ = prepared(data=data)
    assert (result.conversations, result.rejected) == (2, 1)
    rejected = json.loads((find_cache(result.cache) / "rejected.jsonl").read_text())
    assert (rejected["line"], rejected["reason"], rejected["record"]) == (3, "not_json", good[:-5])


# -- files


def test_an_array_lines_and_a_single_object_give_the_same_examples(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    one = record("Hi", "Yes")
    forms = {
        "array.json": json.dumps([one], indent=1),
        "compact.json": json.dumps([one]),
        "lines.jsonl": json.dumps(one) + "\n",
        "object.json": json.dumps(one, indent=1),
        "one-line.json": json.dumps(one),
        "mark.json": "\ufeff" + json.dumps([one]),
        "windows.jsonl": "\r\n" + json.dumps(one) + "\r\n",
    }
    for name, text in forms.items():
        data = tmp_path / name
        data.write_bytes(text.encode())
        result, cache = prepared(data=data, output_dir=tmp_path / f"cache-{name}")
        assert (result.conversations, result.rejected) == (1, 0), name
        assert decode(load_tokenizer_of(cache), cache[0].target_T) == "Yes\n"


def test_a_folder_means_the_data_files_in_it(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    write_lines(tmp_path / "many" / "b.jsonl", record("Hi", "second"))
    write_lines(tmp_path / "many" / "a.jsonl", record("Hi", "first"))
    (tmp_path / "many" / "notes.txt").write_text("none of this")
    result, cache = prepared(data=tmp_path / "many")
    assert result.conversations == 2
    assert [decode(load_tokenizer_of(cache), example.target_T) for example in cache] == ["first\n", "second\n"]


@pytest.mark.parametrize("end", [-1, -2, -20, 12])
def test_an_incomplete_array_is_refused_with_its_name_and_line_and_no_cache_is_written(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path, end: int
) -> None:
    text = json.dumps([record("Hi", "Yes"), record("Hi", "No")], indent=1)[:end]
    data = tmp_path / "broken.json"
    data.write_text(text)
    with pytest.raises(DataError, match=rf"{re.escape(str(data))}:\d+: "):
        prepared(data=data)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


def test_a_broken_array_is_refused_with_the_line_of_the_broken_record(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    good = json.dumps(record("Hi", "Yes"))
    data = tmp_path / "broken.json"
    data.write_text(f"[\n{good},\n{good},\n{good[:30]}\n")
    with pytest.raises(DataError, match=rf"{re.escape(str(data))}:4: "):
        prepared(data=data)


@pytest.mark.parametrize("text", ["", "\n \n", "[]", "{}", '[{"conversations": []}]'])
def test_data_without_anything_to_learn_is_refused_with_its_name(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path, text: str
) -> None:
    data = tmp_path / "empty.json"
    data.write_text(text)
    with pytest.raises(DataError, match=re.escape(str(data))):
        prepared(data=data)
    assert not (tmp_path / "cache").exists()


def test_missing_files_and_files_without_data_are_refused_with_their_names(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.json").write_bytes("[ü]".encode("latin-1"))
    for name in ("nowhere.json", "table.csv", "empty", "latin.json"):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / name))):
            prepared(data=tmp_path / name)


def test_messages_name_the_setting_that_the_data_comes_from(tmp_path: Path, untied_base: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", record("Hi"), record("Hi"))
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "nowhere.json"): "no such file or folder",
        str(tmp_path / "empty"): "contains no .*file",
        str(bad): "(contains )?no conversation to evaluate on",
    }
    origin = {"setting": "eval_data_path", "is_evaluation": True}
    for path, message in cases.items():
        values = {"model_name_or_path": str(untied_base), "data_path": [path], "output_dir": tmp_path / "cache"}
        with pytest.raises(DataError, match=rf"^eval_data_path: .*{message}|^eval_data_path: {message}"):
            prepare_for_run(PrepareSettings(**values), **origin)
    write_lines(bad, record("Hi"), record("Hi", "Yes"))
    with pytest.raises(DataError, match=r"^eval_data_path: .*1 of 2 records rejected"):
        prepare_for_run(PrepareSettings(**values, max_rejected_fraction=0.4), **origin)


def test_a_failed_prepare_does_not_change_the_old_cache(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    result, _ = prepared(record("Hi", "Yes"))
    before = bytes_of(result.cache)
    with pytest.raises(DataError):
        prepared(record("Hi"))
    assert bytes_of(result.cache) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cache.rejected.jsonl", "in"]


# -- the cache


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_inputs_give_the_same_bytes(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path, conversations: Path
) -> None:
    first, _ = prepared(data=conversations, output_dir=tmp_path / "a")
    second, _ = prepared(data=conversations, output_dir=tmp_path / "b")
    assert not first.up_to_date
    assert not second.up_to_date
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert len(bytes_of(tmp_path / "a")) >= 6


def test_an_up_to_date_cache_is_not_rewritten(
    prepared: Callable[..., tuple[PrepareResult, Cache]], conversations: Path
) -> None:
    first, _ = prepared(data=conversations)
    times = {path: path.stat().st_mtime_ns for path in first.cache.rglob("*")}
    again, _ = prepared(data=conversations)
    assert again.up_to_date
    assert {path: path.stat().st_mtime_ns for path in first.cache.rglob("*")} == times
    assert vars(again) | {"up_to_date": False, "seconds": 0} == vars(first) | {"seconds": 0}


def test_a_flipped_byte_is_reported_with_the_file_name_and_repaired_by_prepare(
    prepared: Callable[..., tuple[PrepareResult, Cache]], conversations: Path
) -> None:
    result, _ = prepared(data=conversations)
    good = bytes_of(result.cache)
    tokens = find_cache(result.cache) / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    data[len(data) // 2] ^= 1
    tokens.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(str(tokens))) as caught:
        open_only(result.cache)
    assert "prepare" in str(caught.value.hint)
    again, _ = prepared(data=conversations)
    assert not again.up_to_date
    assert bytes_of(result.cache) == good


def test_a_missing_file_is_reported_with_its_name(
    prepared: Callable[..., tuple[PrepareResult, Cache]], conversations: Path
) -> None:
    result, _ = prepared(data=conversations)
    (find_cache(result.cache) / "examples.bin").unlink()
    with pytest.raises(DataError, match=r"examples\.bin: missing"):
        open_only(result.cache)


@pytest.mark.parametrize(
    "change",
    [
        {"model_max_length": 100},
        {"num_data": 3},
        {"add_tokens": "none"},
        {"conversation_template": "plain"},
    ],
    ids=str,
)
def test_other_settings_rebuild_the_cache(
    prepared: Callable[..., tuple[PrepareResult, Cache]], conversations: Path, change: dict[str, Any]
) -> None:
    first, _ = prepared(data=conversations)
    before = bytes_of(first.cache)
    again, _ = prepared(data=conversations, **change)
    assert not again.up_to_date
    assert bytes_of(again.cache) != before
    assert prepared(data=conversations, **change)[0].up_to_date


def test_other_data_rebuilds_the_cache(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    prepared(record("Hi", "Yes"))
    result, cache = prepared(record("Hi", "No"))
    assert not result.up_to_date
    assert decode(load_tokenizer_of(cache), cache[0].target_T) == "No\n"


def test_a_folder_with_other_content_is_refused_and_not_changed(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear Mira")
    (tmp_path / "file").write_text("Dear Mira")
    for name in ("mine", "file"):
        with pytest.raises(DataError, match=re.escape(str(tmp_path / name))):
            prepared(record("Hi", "Yes"), output_dir=tmp_path / name)
    assert bytes_of(tmp_path / "mine") == {"letter.txt": b"Dear Mira"}
    assert (tmp_path / "file").read_text() == "Dear Mira"
    (tmp_path / "void").mkdir()
    assert prepared(record("Hi", "Yes"), output_dir=tmp_path / "void")[0].examples == 1


def test_num_data_keeps_the_first_examples(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    result, cache = prepared(*[record("Hi", f"a {n}", "And?", f"b {n}") for n in range(4)], num_data=3)
    assert (result.examples, len(cache)) == (3, 3)
    assert [decode(load_tokenizer_of(cache), example.target_T) for example in cache] == ["a 0\n", "b 0\n", "a 1\n"]
    assert prepared(record("Hi", "Yes"), num_data=99)[0].examples == 1


def test_a_split_does_not_divide_conversations(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    _, cache = prepared(*[record("Hi", f"{n}", "And?", f"{n}", "And?", f"{n}") for n in range(20)])
    tokenizer = load_tokenizer_of(cache)
    examples = open_examples(tmp_path / "cache")
    training, held_out = examples.split(0.2, split_seed=7)
    names = [[decode(tokenizer, example.target_T) for example in part] for part in (training, held_out)]
    assert (len(names[0]), len(names[1])) == (48, 12)
    assert not set(names[0]) & set(names[1])
    assert set(names[0]) | set(names[1]) == {f"{n}\n" for n in range(20)}
    again = examples.split(0.2, split_seed=7)[1]
    assert [decode(tokenizer, example.target_T) for example in again] == names[1]
    others = {
        tuple(decode(tokenizer, e.target_T) for e in examples.split(0.2, split_seed=seed)[1]) for seed in range(5)
    }
    assert len(others) > 1


def test_a_split_of_too_few_conversations_is_refused(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    prepared(record("Hi", "Yes", "And?", "No"))
    with pytest.raises(DataError, match="eval_fraction"):
        open_examples(tmp_path / "cache").split(0.5, split_seed=7)


def test_lengths_equal_those_of_the_examples(
    prepared: Callable[..., tuple[PrepareResult, Cache]], conversations: Path
) -> None:
    _, cache = prepared(data=conversations, model_max_length=100)
    sources, targets = cache.read_lengths()
    assert sources.tolist() == [len(example.source_S) for example in cache]
    assert targets.tolist() == [len(example.target_T) for example in cache]
    assert len(cache.take(3)) == 3
    assert cache.take(3)[2].source_S.tolist() == cache[2].source_S.tolist()


# -- added tokens


def test_fastchats_tokens_give_fastchats_ids(
    prepared: Callable[..., tuple[PrepareResult, Cache]], untied_base: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(str(untied_base))
    result, cache = prepared(*[record("Say  it.", answer) for answer in ANSWERS], add_tokens="fastchat")
    assert result.added_tokens == 10
    assert cache.added_tokens == ["[PAD]", *FASTCHAT_CHARACTERS]
    for example, answer in zip(cache, ANSWERS, strict=True):
        joined = [*example.source_S[:-1], *example.target_T[:-1]]
        assert joined == fastchat_ids(plain, fastchat_text(["Say  it.", answer]))


def test_fastchats_tokens_decode_to_the_original_text(prepared: Callable[..., tuple[PrepareResult, Cache]]) -> None:
    answers = [answer for answer in ANSWERS if "~" not in answer]
    _, cache = prepared(*[record("Say it.", answer) for answer in answers], add_tokens="fastchat")
    tokenizer = load_tokenizer_of(cache)
    assert [decode(tokenizer, example.target_T) for example in cache] == [answer + "\n" for answer in answers]


def test_without_added_tokens_the_ids_are_those_of_the_base(
    prepared: Callable[..., tuple[PrepareResult, Cache]], untied_base: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(str(untied_base))
    result, cache = prepared(record("Hi there", "Yes, two eggs"), add_tokens="none")
    assert result.added_tokens == 0
    joined = [*cache[0].source_S[:-1], *cache[0].target_T[:-1]]
    assert joined == encode(plain, fastchat_text(["Hi there", "Yes, two eggs"]))


def test_the_users_own_tokens_take_the_first_unused_rows(
    prepared: Callable[..., tuple[PrepareResult, Cache]], untied_base: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(str(untied_base))
    _, cache = prepared(record("Hi", "a =>b => c\n"), add_tokens=["=>", "<think>"])
    tokenizer = load_tokenizer_of(cache)
    assert tokenizer.convert_tokens_to_ids(["=>", "<think>"]) == [len(plain), len(plain) + 1]
    assert cache[0].target_T.tolist().count(len(plain)) == 2
    assert cache.added_tokens == ["=>", "<think>"]
    assert decode(tokenizer, cache[0].target_T) == "a =>b => c "  # newline has no token
    _, cache = prepared(record("Hi", "a =>b => c\n"), add_tokens=["=>", "\n"])
    assert decode(load_tokenizer_of(cache), cache[0].target_T) == "a =>b => c\n\n"


def test_more_added_tokens_than_unused_rows_are_refused(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"add_tokens: .* 39 unused rows"):
        prepared(record("Hi", "Yes"), add_tokens=[f"@{number}@" for number in range(40)])
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byt5")
    ByT5Tokenizer().save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps(KNOWN_CONFIGS["google/byt5-small"]))
    return folder


def test_byt5_gets_no_added_tokens_and_decodes_to_the_original_text(
    prepared: Callable[..., tuple[PrepareResult, Cache]], byt5: Path
) -> None:
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


def test_byt5_with_the_plain_template_decodes_to_the_original_text(
    prepared: Callable[..., tuple[PrepareResult, Cache]], byt5: Path
) -> None:
    _, cache = prepared(*[record("How many?", answer) for answer in ANSWERS], base=byt5, conversation_template="plain")
    for example, answer in zip(cache, ANSWERS, strict=True):
        assert example.source_S.tolist() == [*(byte + 3 for byte in b"How many?"), 1]
        assert example.target_T.tolist() == [*(byte + 3 for byte in answer.encode()), 1]


# -- conversation templates

TEMPLATE = {
    "system_message": "Chat.",
    "system": "{text}\n\n",
    "human": "Q: {text}\n",
    "assistant_prefix": "A: ",
    "assistant": "{text}\n",
}


def test_a_users_own_template_is_used(prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path) -> None:
    template = tmp_path / "mine.yaml"
    template.write_text(yaml.safe_dump(TEMPLATE))
    _, cache = prepared(record("Hi", "Yes"), conversation_template=str(template))
    assert decode(load_tokenizer_of(cache), cache[0].source_S) == "Chat.\n\nQ: Hi\nA:"


@pytest.mark.parametrize(
    "change",
    [
        {"system": "{text}", "human": "{text}\n"},
        {"system": "{text}##"},
        {"human": "Q: {text}"},
        {"assistant_prefix": "A:"},
        {"assistant": "{text}"},
        {"assistant": "{text}##"},
    ],
    ids=str,
)
def test_a_template_without_white_space_between_two_pieces_is_refused(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path, change: dict[str, str]
) -> None:
    template = tmp_path / "mine.yaml"
    template.write_text(yaml.safe_dump(TEMPLATE | change))
    with pytest.raises(SettingsError, match=re.escape(f"conversation_template: {template}")):
        prepared(record("Hi", "Yes"), conversation_template=str(template))


@pytest.mark.parametrize(
    "change", [{"human": "Q\n"}, {"human": 3}, {"color": "red"}, {"assistant": "{text} {text}\n"}], ids=str
)
def test_a_template_with_a_wrong_field_is_refused_with_the_field_name(
    prepared: Callable[..., tuple[PrepareResult, Cache]], tmp_path: Path, change: dict[str, Any]
) -> None:
    template = tmp_path / "mine.yaml"
    template.write_text(yaml.safe_dump(TEMPLATE | change))
    with pytest.raises(SettingsError, match=next(iter(change))):
        prepared(record("Hi", "Yes"), conversation_template=str(template))


# -- the real tokenizer and data


@pytest.fixture
def flan(shared: Callable[[str], Path], tmp_path: Path) -> Path:
    """The real tokenizer with its config, as a base model folder."""
    folder = tmp_path / "flan"
    shutil.copytree(shared("tokenizer/flan-t5-base"), folder)
    return folder


def test_fastchats_example_data_gives_a_thousand_correct_examples(
    prepared: Callable[..., tuple[PrepareResult, Cache]], shared: Callable[[str], Path], flan: Path
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
def test_the_real_tokenizer_decodes_code_unchanged(
    prepared: Callable[..., tuple[PrepareResult, Cache]], flan: Path
) -> None:
    result, cache = prepared(*[record("Say it.", answer) for answer in ANSWERS], base=flan)
    tokenizer = load_tokenizer_of(cache)
    assert [decode(tokenizer, example.target_T) for example in cache] == [answer + "\n" for answer in ANSWERS]
    assert result.unknown_tokens == 0
    for example, answer in zip(cache, ANSWERS, strict=True):
        assert join_sides(example, answer, cache, tokenizer) == encode(tokenizer, fastchat_text(["Say it.", answer]))


def test_fastchats_tokens_on_the_real_tokenizer_give_fastchats_ids(
    prepared: Callable[..., tuple[PrepareResult, Cache]], shared: Callable[[str], Path], flan: Path
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
    prepared: Callable[..., tuple[PrepareResult, Cache]], shared: Callable[[str], Path], flan: Path
) -> None:
    result, cache = prepared(data=shared("data/conversations/hh_helpful.sharegpt.json"), base=flan)
    assert result.conversations + result.rejected == 2354
    rejected = (find_cache(result.cache) / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rejected) == result.rejected == sum(cache.manifest["rejected_by_reason"].values())
