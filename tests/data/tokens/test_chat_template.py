"""transformers' apply_chat_template gives the source ids of training, for each template and tokenizer, for any text."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, ByT5Tokenizer

from t5tune.data.reading.formats import Conversation, parse_conversation
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.chat_template import build_chat_template, write_chat_template
from t5tune.data.tokens.encoders import make_encoder
from t5tune.data.tokens.encoding import encode_batch, extract_example
from t5tune.data.tokens.templates import Template, load_template, render_conversation
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.settings.groups.record_format import ReadingSettings
from t5tune.settings.packaged_templates import list_names
from tests.support.paths import REPOSITORY, SHARED

Messages = list[dict[str, str]]
ANSWER = {"role": "assistant", "content": "x"}
BASES = {"pocket": REPOSITORY / "t5tune" / "pocket", "flan-t5": SHARED / "tokenizer" / "flan-t5-base"}
NUM_ROWS = {"pocket": 1536, "flan-t5": 32128}
TOKENIZERS = [f"{base} {tokens}" for base in BASES for tokens in ("auto", "none", "fastchat")] + ["byt5 none"]
TEMPLATES = {name: load_template(name) for name in list_names("conversations")} | {
    # texts that Jinja, or Python's string notation, could misread
    "marks": Template(
        system_message="Be {{ kind }} {% if x %}",
        system='it\'s "{text}"\\n\n',
        human="{# {text} #} \n",
        assistant_prefix="é\U0001f600 \\:\t",
        assistant="{text}}}\n",
        turn_separator="'%}",
    ),
    "spaces": Template("", "{text}\n", "Q:  {text}", "  A:  ", " {text} ", "  "),
}
TEXT = st.text(
    st.one_of(
        st.sampled_from("ab Z09.,:'\"\n\t\r {}<>\\^`~▁_-#"),
        st.sampled_from("\u00a0\u2028\u200b\u200d\u2060\u0301\ufeff\u00ad\u3000ﬁ½①한ü\u1100\u1161😀\u0e33\x00\x0b\x85"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=12,
)
CONVERSATION = st.integers(0, 2).flatmap(lambda n: st.lists(TEXT, min_size=2 * n + 1, max_size=2 * n + 1))


@cache
def make_tokenizer(name: str, folder: Path) -> Tokenizer:
    """Make the tokenizer that prepare uses, with added tokens."""
    base, tokens = name.split()
    if base == "byt5":
        ByT5Tokenizer().save_pretrained(str(folder / "byt5"))
        return load_tokenizer(folder / "byt5")
    if not BASES[base].exists():
        pytest.skip(f"{BASES[base].name}: the real inputs are not next to this checkout")
    return extend_tokenizer(load_tokenizer(BASES[base]), [tokens], NUM_ROWS[base]).tokenizer


@cache
def load_stock(name: str, template: str, folder: Path, prefix: str = "") -> Any:
    """Load the tokenizer with transformers from the folder that prepare writes."""
    tokenizer = make_tokenizer(name, folder)
    saved = folder / f"{name} {template} {prefix}"
    save_tokenizer(tokenizer, saved)
    write_chat_template(saved, build_chat_template(TEMPLATES[template], tokenizer, prefix), tokenizer)
    return AutoTokenizer.from_pretrained(str(saved))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def make_messages(texts: list[str], system: str | None = None) -> Messages:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def parse(messages: Messages) -> Conversation:
    return parse_conversation({"messages": messages}, RecordLocation("a.jsonl", 1, 0, 0), ReadingSettings())


def encode_as_in_training(messages: Messages, tokenizer: Tokenizer, template: Template) -> list[int]:
    conversation = parse([*messages, ANSWER])
    (encoded,) = encode_batch([render_conversation(conversation, template)], make_encoder(tokenizer), 4096)
    return list(extract_example(encoded.ids, encoded.spans[-1], tokenizer.special_ids).source_S)


def has_divided_indentation(messages: Messages, template: Template) -> bool:
    """Whether a newline and two spaces, for which there is a token, are in different pieces of the conversation."""
    joined = "\ud800".join(piece.text for piece in render_conversation(parse([*messages, ANSWER]), template))
    return re.search("\n(?= *\ud800)(\ud800* ){2}", joined) is not None


def apply(stock: Any, messages: Messages) -> list[int]:
    return list(stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=8, database=None, derandomize=True)
@given(texts=CONVERSATION, system=st.none() | TEXT)
@example(texts=["Hi ", " Hello.  ", "  two\n  eggs   "], system=None)
@example(texts=["", " ", "\n"], system=" ")
@example(texts=["", "0", ""], system=None)
@example(texts=["a\r\nb\rc\u200bd\u2060e\ufefff"], system="\u200b")
def test_apply_chat_template_gives_training_ids_for_any_text(
    name: str, template: str, folder: Path, texts: list[str], system: str | None
) -> None:
    tokenizer = make_tokenizer(name, folder)
    assume(not any(token in text for token in tokenizer.special_tokens for text in [*texts, system or ""]))
    messages = make_messages(texts, system)
    assume(not name.endswith("auto") or not has_divided_indentation(messages, TEMPLATES[template]))
    expected = encode_as_in_training(messages, tokenizer, TEMPLATES[template])
    assert expected[-1] == tokenizer.eos_token_id
    assert apply(load_stock(name, template, folder), messages) == expected


@pytest.mark.parametrize("name", ["pocket auto", "byt5 none"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_without_a_generation_prompt_the_text_is_the_whole_conversation(name: str, template: str, folder: Path) -> None:
    messages = make_messages(["Hi ", " Hello. ", "two\neggs", "Yes\r\n"], "Be {{ brief }}.")
    text = load_stock(name, template, folder).apply_chat_template(messages, tokenize=False)
    assert text == "".join(piece.text for piece in render_conversation(parse(messages), TEMPLATES[template]))


@pytest.mark.parametrize("text", ["the red lamp", "Ein: the red lamp", "\u200bshorten"])
def test_the_source_prefix_is_added_as_chat_adds_it(text: str, folder: Path) -> None:
    stock = load_stock("pocket auto", "plain", folder, prefix="Ein: ")
    prefixed = text if text.startswith("Ein: ") else f"Ein: {text}"
    expected = encode_as_in_training(
        make_messages([prefixed, "a", prefixed]), make_tokenizer("pocket auto", folder), TEMPLATES["plain"]
    )
    assert apply(stock, make_messages([text, "a", text])) == expected


@pytest.mark.parametrize("role", ["human", "tool", "function"])
def test_roles_are_read_as_in_the_data(role: str, folder: Path) -> None:
    stock = load_stock("pocket auto", "turns", folder)
    messages = [{"role": role, "content": "Hi"}, {"role": "gpt", "content": "Yes."}, {"role": role, "content": "No."}]
    assert apply(stock, messages) == apply(stock, make_messages(["Hi", "Yes.", "No."]))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "assistant", "content": "a"}], "user and assistant messages in turn, found one of role assistant"),
        ([{"role": "user", "content": "a"}] * 2, "in turn, found one of role user"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "in turn, found one of role system"),
        ([{"role": "system", "content": "a"}] * 2, "in turn, found one of role system"),
        ([{"role": "critic", "content": "a"}], "in turn, found one of role critic"),
        ([{"role": "user", "content": "a"}, ANSWER], "the last message must be the user's"),
        ([{"role": "system", "content": "a"}], "the last message must be the user's"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "role user: expected text as content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}], "role assistant: expected text"),
        ([{"role": "user", "content": "a"}, {**ANSWER, "tool_calls": [{"id": "1"}]}], "and no tool_calls"),
    ],
)
def test_messages_beyond_the_template_are_refused(messages: Messages, problem: str, folder: Path) -> None:
    with pytest.raises(TemplateError, match=re.escape(problem)):
        apply(load_stock("pocket auto", "plain", folder), messages)


def test_tools_are_refused(folder: Path) -> None:
    stock = load_stock("pocket auto", "plain", folder)
    with pytest.raises(TemplateError, match="tools: this chat template can't describe tools"):
        stock.apply_chat_template(make_messages(["Hi"]), tools=[{"name": "add"}])


def test_only_transformers_reads_a_special_token_in_a_message(folder: Path) -> None:
    messages = make_messages(["stop </s> here"])
    tokenizer = make_tokenizer("pocket auto", folder)
    assert apply(load_stock("pocket auto", "plain", folder), messages).count(tokenizer.eos_token_id) == 2
    assert encode_as_in_training(messages, tokenizer, TEMPLATES["plain"]).count(tokenizer.eos_token_id) == 1
