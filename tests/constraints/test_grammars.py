"""Replies that follow a schema, a regular expression or a grammar, and constraints that can't be enforced."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from t5tune.constraints import Constraint
from t5tune.constraints.grammars import GrammarCompiler
from t5tune.constraints.spelling import spell
from t5tune.data.tokens.encoders import make_encoder
from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.errors import SettingsError
from tests.constraints.test_spelling import load_kind

llguidance = pytest.importorskip("llguidance")
ORDER = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
KINDS = ["added", "fastchat", "gemma", "codet5", "byt5"]


def make_compiler(kind: str, folder: Path, suffix: str = "") -> tuple[GrammarCompiler, Tokenizer]:
    tokenizer, num_rows = load_kind(kind, folder)
    return GrammarCompiler(spell(tokenizer, num_rows), [tokenizer.eos_token_id], suffix), tokenizer


def follows(compiler: GrammarCompiler, tokenizer: Tokenizer, constraint: Constraint, text: str) -> bool:
    """Whether the ids of a text, encoded as in training, and its end are allowed; both ways to ask must agree."""
    matcher = compiler.compile(constraint).copy()
    for index in [*make_encoder(tokenizer).encode([text])[0].tolist(), tokenizer.eos_token_id]:
        is_allowed = bool(matcher.find_allowed()[index])
        assert matcher.accept(index) == is_allowed
        if not is_allowed:
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_allows_compact_and_indented_json(kind: str, tmp_path: Path) -> None:
    compiler, tokenizer = make_compiler(kind, tmp_path)
    schema = Constraint("json_schema", json.dumps(ORDER), "json_schema: order.json")
    order = {"name": "Aida", "count": 6}
    for text in (json.dumps(order), json.dumps(order, separators=(",", ":")), json.dumps(order, indent=2)):
        if tokenizer.decode(make_encoder(tokenizer).encode([text])[0]) == text:  # otherwise it's different JSON
            assert follows(compiler, tokenizer, schema, text), text
    for text in ('{"name": "Aida"}', '{"count": 6, "name": "Aida"}', "[]", "Aida"):
        assert not follows(compiler, tokenizer, schema, text), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pocket", "byt5"])
@pytest.mark.parametrize("pattern", ["(ab|ba)*", "a[ab]?/", "a{2,3}|b", "[^b]+a", ".a", "b | a", r"a\/a"])
@pytest.mark.variants(
    "(ab|ba)*-pocket",
    "a[ab]?/-pocket",
    "a{2,3}|b-pocket",
    "[^b]+a-pocket",
    ".a-pocket",
    "b | a-pocket",
    r"a\\/a-pocket",
    "(ab|ba)*-byt5",
    "a[ab]?/-byt5",
)
def test_a_pattern_allows_exactly_its_texts(kind: str, pattern: str, tmp_path: Path) -> None:
    compiler, tokenizer = make_compiler(kind, tmp_path)
    constraint = Constraint("regex", pattern, "regex")
    for size in range(1, 5):
        for text in map("".join, product("ab /", repeat=size)):
            if tokenizer.decode(make_encoder(tokenizer).encode([text])[0]) == text:  # otherwise it's a different text
                found = follows(compiler, tokenizer, constraint, text)
                assert found == (re.fullmatch(pattern, text) is not None), text


def test_a_grammar_and_a_suffix_are_followed(tmp_path: Path) -> None:
    compiler, tokenizer = make_compiler("added", tmp_path, suffix=" bye")
    grammar = 'start: greeting " " NAME\ngreeting: "hello" | "hi"\nNAME: /[A-Z][a-z]+/\n'
    constraint = Constraint("grammar", grammar, "grammar: names.lark")
    texts = ("hello Aida", "hi Aida bye", "hey Aida", "hello Aida by", "hello aida")
    assert [follows(compiler, tokenizer, constraint, text) for text in texts] == [True, True, False, False, False]


def test_a_grammar_may_contain_the_words_start_and_body(tmp_path: Path) -> None:
    compiler, tokenizer = make_compiler("added", tmp_path)
    grammar = 'start: body " " WORD // the "start\nbody: "start" | "restart"\nWORD: /start|stop/\n'
    constraint = Constraint("grammar", grammar, "grammar: words.lark")
    texts = ("start stop", "restart start", "body stop", "start body")
    assert [follows(compiler, tokenizer, constraint, text) for text in texts] == [True, True, False, False]


def test_a_refused_id_leaves_the_state_unchanged(tmp_path: Path) -> None:
    compiler, tokenizer = make_compiler("added", tmp_path)
    matcher = compiler.compile(Constraint("regex", "[a-z]+( [a-z]+)*", "regex")).copy()
    ids = make_encoder(tokenizer).encode(["six coffees"])[0].tolist()
    for index in ids:
        before = matcher.find_allowed()
        for refused in np.flatnonzero(~before)[::40].tolist():
            assert not matcher.accept(refused)
        assert (matcher.find_allowed() == before).all()
        assert matcher.accept(index)


def test_random_replies_that_follow_a_schema_are_valid(tmp_path: Path) -> None:
    compiler, tokenizer = make_compiler("added", tmp_path)
    matcher = compiler.compile(Constraint("json_schema", json.dumps(ORDER), "json_schema: order.json"))
    chooser, complete = np.random.default_rng(5), 0
    for _ in range(120):
        state, ids = matcher.copy(), []
        while len(ids) < 60:
            allowed = np.flatnonzero(state.find_allowed())
            index = int(chooser.choice(allowed))
            assert state.accept(index)
            if index == tokenizer.eos_token_id:
                reply = json.loads(tokenizer.decode(ids, skip_special_tokens=True))
                assert isinstance(reply["name"], str)
                assert reply["count"] % 1 == 0  # 6.0 and 1e+22 are integers in a JSON schema
                assert [*reply] == ["name", "count"]
                complete += 1
                break
            ids.append(index)
    assert complete > 5


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", '{"not": {}, "uniqueItems": true}', "json_schema: not, uniqueItems: can't be enforced"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "minimum (5) is greater than maximum (3)"),
        ("json_schema", '{"oneOf": [{}, {"type": "null"}]}', "oneOf: can't be enforced unless its schemas exclude"),
        ("json_schema", "[1]", "json_schema: [1] is not of type 'object', 'boolean'"),
        ("regex", "[a-", "unclosed character class"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", " a", "regex: no reply can follow it: this tokenizer removes a space at the beginning"),
        ("regex", r"[^\s\S]", "regex: no reply can follow it: nothing matches it, or it needs"),
        ("regex", "a\0", "regex: has a NUL character (U+0000), which this tokenizer can't write; remove the character"),
        ("regex", "猫+", "regex: no reply can follow it: nothing matches it, or it needs"),
        ("json_schema", '{"$ref": "#"}', "json_schema: no reply can end: '#' requires itself"),
        ("grammar", "start: unknown", 'unknown name: "unknown"'),
    ],
)
def test_a_constraint_that_cannot_be_enforced_is_refused(kind: str, text: str, message: str, tmp_path: Path) -> None:
    compiler, _ = make_compiler("added", tmp_path)
    with pytest.raises(SettingsError, match=re.escape(message)) as refused:
        compiler.compile(Constraint(kind, text, kind))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_a_tokenizer_without_braces_refuses_schemas(tmp_path: Path) -> None:
    compiler, _ = make_compiler("madlad", tmp_path)
    compiler.spellings.later[compiler.spellings.later.index(b"{")] = None
    with pytest.raises(SettingsError, match="json_schema: this tokenizer can't write '{'"):
        compiler.compile(Constraint("json_schema", "{}", "json_schema"))
