"""Random schemas with each kind of tokenizer: no right answer is refused, and each complete reply is valid JSON of it.

LONG_TESTS=1 python -m pytest -n 0 -s tests/constraints/test_random_schemas.py > schemas.log

takes 10,000 schemas with each kind. The log has a line for each chunk of schemas that is done.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jsonschema
import numpy as np
import pytest

from t5tune.constraints import Constraint, Matcher
from t5tune.constraints.compiler import Compiler
from t5tune.data.reading.formats import Conversation, Turn
from t5tune.data.reading.rejections import RecordLocation
from t5tune.data.tokens.encoders import Beginning, Encoder, make_encoder
from t5tune.data.tokens.encoding import encode_batch, extract_example
from t5tune.data.tokens.templates import Template, load_template, render_conversation
from t5tune.data.tokens.tokenizer import Tokenizer, decode_prediction, decode_reference
from t5tune.errors import SettingsError
from tests.constraints.test_spelling import join, load_kind
from tests.support.paths import SHARED
from tests.support.random_schemas import list_fixed_texts, make_schema, write_json

pytest.importorskip("llguidance")
KINDS = ["added", "fastchat", "mt5", "mt5-added", "madlad", "madlad-added", "gemma", "codet5", "byt5"]
REAL_KINDS = ["flan-t5", "flan-t5-fastchat"]
CHUNK = 200
MAX_REPLY = 1500


class Sides(NamedTuple):
    """A model's tokenizer with each of two conversation templates."""

    tokenizer: Tokenizer
    encoder: Encoder
    templates: list[Template]
    compilers: list[Compiler]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@cache
def load_sides(kind: str, folder: Path) -> Sides:
    (folder / kind).mkdir()
    tokenizer, num_rows = load_kind(kind, folder / kind)
    templates = [load_template("plain"), load_template("fastchat-t5")]
    stop_ids = [tokenizer.eos_token_id]
    compilers = [Compiler(tokenizer, num_rows, stop_ids, template.answer_suffix) for template in templates]
    return Sides(tokenizer, make_encoder(tokenizer), templates, compilers)


def encode_target(sides: Sides, template: Template, text: str) -> list[int]:
    """Encode a reply as training does, with the token that ends it."""
    turns = (Turn("human", "What is it?"), Turn("assistant", text))
    pieces = render_conversation(Conversation(RecordLocation("x", 1, 0, 0), None, turns), template)
    (encoded,) = encode_batch([pieces], sides.encoder, 100_000)
    target = extract_example(encoded.ids, encoded.spans[0], sides.encoder.special_ids).target_T
    return [int(index) for index in target]


def can_write(sides: Sides, text: str) -> bool:
    (ids,) = sides.encoder.encode([Beginning(text)])
    return sides.tokenizer.decode(ids) == text


def find_refused(matcher: Matcher, ids: list[int]) -> int | None:
    """Return the place of the first id that isn't allowed."""
    for place, index in enumerate(ids):
        is_allowed = bool(matcher.find_allowed()[index])
        assert matcher.accept(index) == is_allowed, (ids, place)
        if not is_allowed:
            return place
    return None


def walk(chooser: random.Random, matcher: Matcher, stop_ids: list[int], closing: list[int]) -> list[int] | None:
    """Draw allowed ids, and soon more of those that close what is open. Return a complete reply, or None: too long."""
    ids: list[int] = []
    free = chooser.choice([0, 3, 10, 40])
    while len(ids) < MAX_REPLY:
        allowed = matcher.find_allowed()
        assert allowed.any(), ("nothing is allowed after", ids)
        choices = np.flatnonzero(allowed)
        if len(ids) >= free and chooser.random() < 0.8:
            found = [index for index in closing if allowed[index]]
            choices = found[:1] if found and closing.index(found[0]) < len(stop_ids) + 1 else found or choices
        index = int(choices[chooser.randrange(len(choices))])
        assert matcher.accept(index), ("allowed, then refused", ids, index)
        if index in stop_ids:
            return ids
        ids.append(index)
    return None


def check_schema(sides: Sides, seed: int) -> Iterator[str]:
    """Check a schema's right answers and random replies; count what was done. Raises AssertionError."""
    chooser = random.Random(seed)
    schema, make_value = make_schema(chooser)
    template, compiler = sides.templates[seed % 2], sides.compilers[seed % 2]
    constraint = Constraint("json_schema", json.dumps(schema, ensure_ascii=False), "json_schema")
    fixed = [json.dumps(text, ensure_ascii=False) for text in list_fixed_texts(schema)]
    if not all(can_write(sides, text) for text in fixed):
        with pytest.raises(SettingsError, match="this tokenizer writes"):
            compiler.start(constraint)
        yield "schema with a text that the tokenizer changes"
        return
    yield "schema"
    kind = jsonschema.Draft202012Validator
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    start = compiler.start(constraint)
    for style in range(3):
        value = make_value()
        text = write_json(value, style, chooser, schema)
        validator.validate(value)
        ids = encode_target(sides, template, text)
        if decode_reference(sides.tokenizer, ids, template.answer_suffix) != text:
            yield "answer that the tokenizer changes"
            continue
        refused = find_refused(start.copy(), ids)
        assert refused is None, (schema, text, ids[refused], sides.tokenizer.decode(ids[:refused]))
        yield "right answer"
    spellings, stop_ids = compiler.spellings, [sides.tokenizer.eos_token_id]
    closing = [*stop_ids, *find_closing_ids(compiler)]
    for _ in range(2):
        ids = walk(chooser, start.copy(), stop_ids, closing)
        if ids is None:
            yield "reply without end"
            continue
        assert sides.tokenizer.decode(ids, skip_special_tokens=True) == join(spellings, ids).decode(), ids
        text = decode_prediction(sides.tokenizer, ids, template.answer_suffix)
        validator.validate(json.loads(text))
        yield "valid reply"


@cache
def find_closing_ids(compiler: Compiler) -> list[int]:
    """Find the ids of characters that bring a reply to its end; the first ends texts."""
    return [
        compiler.spellings.later.index(each.encode())
        for each in '"}],:01-/ aeluA'
        if each.encode() in compiler.spellings.later
    ]


def check_schemas(kind: str, folder: Path, seeds: range) -> Counter[str]:
    """Check schemas with a kind of tokenizer. Raises AssertionError after the last schema; failures are printed."""
    sides, counts = load_sides(kind, folder), Counter[str]()
    for seed in seeds:
        try:
            counts.update(check_schema(sides, seed))
        except Exception as error:
            counts["failure"] += 1
            print(f"{kind}, schema {seed}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    print(kind, seeds, dict(counts), flush=True)
    assert not counts["failure"]
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.variants("added", "mt5", "gemma", "codet5", "byt5")
def test_right_answers_are_allowed_and_replies_are_valid(kind: str, folder: Path) -> None:
    counts = check_schemas(kind, folder, range(30))
    assert min(counts["right answer"], counts["valid reply"]) >= 30
    assert counts["reply without end"] <= 2


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 10_000, CHUNK))
def test_right_answers_of_ten_thousand_schemas_are_allowed(first: int, folder: Path) -> None:
    for kind in [*KINDS, *(REAL_KINDS if (SHARED / "tokenizer").exists() else [])]:
        check_schemas(kind, folder, range(first, first + CHUNK))
