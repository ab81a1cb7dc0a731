"""Constraints compiled for a model: the texts that they demand must survive its tokenizer."""

import json

import pytest

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.constraints import Constraint
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
    ],
)
def test_texts_that_the_tokenizer_changes_are_refused(constraint: Constraint, message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Compiler(load_tokenizer(pocket_folder()), 1536, [1]).start(constraint)
    assert str(refused.value).startswith(message)
