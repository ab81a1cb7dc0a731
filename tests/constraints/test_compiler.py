"""Constraints compiled for a model: the texts that they demand must survive its tokenizer."""

import json
import random
import re

import pytest

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.constraints import Constraint, grammars
from t5tune.constraints.compiler import Compiler
from t5tune.data.tokens.encoders import Beginning, make_encoder
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.errors import SettingsError


def make_constraint(schema: object) -> Constraint:
    return Constraint("json_schema", json.dumps(schema), "json_schema: a.json")


def test_answers_end_with_the_templates_suffix() -> None:
    tokenizer = load_tokenizer(pocket_folder())
    matcher = Compiler(tokenizer, 1536, [1], " End").start(Constraint("choices", '["six coffees"]', "choices"))
    answer, suffix = make_encoder(tokenizer).encode([Beginning("six coffees"), " End"])
    assert all(matcher.accept(index) for index in [*answer.tolist(), *suffix.tolist(), 1])


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("choices", '["six", "a  {b}"]', "choices"), "choices: 'a  {b}': this tokenizer writes"),
        (make_constraint({"properties": {"naïve": {}}}), "json_schema: a.json: '\"naïve\"': this tokenizer writes"),
        (
            make_constraint({"items": [{"enum": [1, "x", "日本"]}]}),
            "json_schema: a.json: '\"日本\"': this tokenizer writes",
        ),
        (make_constraint({"anyOf": [{"const": "日本"}]}), "json_schema: a.json: '\"日本\"': this tokenizer writes"),
        (make_constraint({"const": {"日本": [1]}}), "json_schema: a.json: '\"日本\"': this tokenizer writes"),
        (make_constraint({"required": ["日本"]}), "json_schema: a.json: '\"日本\"': this tokenizer writes"),
    ],
)
def test_texts_that_the_tokenizer_changes_are_refused(constraint: Constraint, message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Compiler(load_tokenizer(pocket_folder()), 1536, [1]).start(constraint)
    assert str(refused.value).startswith(message)


def test_too_many_states_end_a_reply_but_not_later_replies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammars, "MIN_STATES", 0)
    tokenizer = load_tokenizer(pocket_folder())
    compiler, constraint = Compiler(tokenizer, 1536, [1]), Constraint("regex", "(a|b)*a(a|b){20}c", "regex")
    letters = tokenizer.convert_tokens_to_ids(["a", "b"])

    def reply() -> None:
        matcher, chooser = compiler.start(constraint), random.Random(3)
        for _ in range(300):
            assert matcher.find_allowed().any()
            assert matcher.accept(chooser.choice(letters))

    for _ in range(2):
        with pytest.raises(SettingsError, match="^regex: too complex to continue this reply: .*too many") as refused:
            reply()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pattern", ["ab中c", "ab(中|é)"])
def test_a_reply_that_no_token_can_continue_is_no_reply(pattern: str) -> None:
    tokenizer = load_tokenizer(pocket_folder())
    compiler, ids = Compiler(tokenizer, 1536, [1]), tokenizer.convert_tokens_to_ids(["a", "b"])
    matcher = compiler.start(Constraint("regex", pattern, "regex"))
    assert all(map(matcher.accept, ids))
    with pytest.raises(
        SettingsError, match="^regex: this tokenizer can't write a character that must come next in a reply"
    ):
        matcher.find_allowed()
    matcher = compiler.start(Constraint("regex", f"({pattern})?|abb?", "regex"))
    assert all(map(matcher.accept, ids))
    assert sorted(matcher.find_allowed().nonzero()[0]) == [1, ids[1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {f"p{number}": {} for number in range(6000)}}, "properties: 6,000; at most 5,000 can be"),
        ({"items": {"type": "integer", "multipleOf": 999_983}}, "multipleOf: 999,983; at most 10,000 can be enforced"),
        ({"enum": ["\ud800"]}, "'\\ud800' is half of a character"),
    ],
)
def test_schemas_that_would_stop_llguidance_are_refused(schema: object, message: str) -> None:
    constraint = Constraint("json_schema", json.dumps(schema, ensure_ascii=False), "json_schema")
    with pytest.raises(SettingsError, match=f"^json_schema: {re.escape(message)}"):
        Compiler(load_tokenizer(pocket_folder()), 1536, [1]).start(constraint)


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    text = '{"items": ' * 990 + "{}" + "}" * 990
    with pytest.raises(SettingsError, match="^json_schema: nested too deeply"):
        Compiler(load_tokenizer(pocket_folder()), 1536, [1]).start(Constraint("json_schema", text, "json_schema"))
