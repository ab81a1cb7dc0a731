"""Constrained replies of transformers, compared with a loop that masks each step of the stock model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.constraints import Constraint, Matcher
from t5tune.constraints.grammars import GrammarCompiler
from t5tune.constraints.spelling import spell
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.inference.generation import Decoding, Sampling, generate, make_random_generator
from t5tune.model.load import load_base
from tests.support.models.bases import make_base
from tests.support.models.model_types import load_stock

pytest.importorskip("llguidance")
SOURCES = [[40, 50, 60, 1], [70, 1], [80, 90, 33, 21, 1], [5, 6, 1]]
PATTERN = "(six|ten) [a-z]{2,9}( and tea)?!"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yes"]}, "b": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


def follow_by_hand(stock: Any, source: list[int], matcher: Matcher, limit: int) -> list[int]:
    """Choose the likeliest allowed token, one step after the other, without a cache."""
    state, ids = matcher.copy(), [0]
    while len(ids) <= limit:
        with torch.no_grad():
            logits_V = stock(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids])).logits[0, -1]
        logits_V[~torch.from_numpy(state.find_allowed())] = -torch.inf
        index = int(logits_V.argmax())
        assert state.accept(index)
        if index == 1:
            break
        ids.append(index)
    return ids[1:]


@pytest.fixture
def compiler_and_models(tmp_path: Path) -> tuple[GrammarCompiler, Any, Any, Any]:
    folder = make_base(tmp_path, tied=False)
    tokenizer = extend_tokenizer(load_tokenizer(folder), ["auto"], 1536).tokenizer
    model = load_base(folder, torch.float32, torch.device("cpu"))
    return GrammarCompiler(spell(tokenizer, model.config.vocab_size), [1]), tokenizer, model, load_stock(folder)


@pytest.mark.slow
def test_greedy_replies_are_the_likeliest_allowed_tokens_in_any_batch(
    compiler_and_models: tuple[GrammarCompiler, Any, Any, Any],
) -> None:
    compiler, tokenizer, model, stock = compiler_and_models
    pattern = compiler.compile(Constraint("regex", PATTERN, "regex"))
    limited = compiler.compile(Constraint("regex", "[a-z]+", "regex"))
    constraints = [pattern, None, limited, pattern]
    decoding = Decoding(1, 0, 24)
    replies = generate(model, SOURCES, decoding, constraints=constraints)
    for source, constraint, reply in zip(SOURCES, constraints, replies, strict=True):
        free = generate(model, [source], decoding)[0]
        expected = free if constraint is None else follow_by_hand(stock, source, constraint, 24)
        assert reply == expected
    assert re.fullmatch(PATTERN, tokenizer.decode(replies[0]))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_replies_with_beams_or_sampling_follow_the_constraint(
    num_beams: int, compiler_and_models: tuple[GrammarCompiler, Any, Any, Any]
) -> None:
    compiler, tokenizer, model, _ = compiler_and_models
    pattern = compiler.compile(Constraint("regex", PATTERN, "regex"))
    draw = Sampling(1.0, 0.9, make_random_generator(3, torch.device("cpu")))
    samplings = [draw] * len(SOURCES) if num_beams == 1 else []
    decoding = Decoding(1, 0, 30, num_beams)
    replies = generate(model, SOURCES, decoding, samplings=samplings, constraints=[pattern] * len(SOURCES))
    for reply in replies:
        assert re.fullmatch(PATTERN, tokenizer.decode(reply)), tokenizer.decode(reply)
    assert len({tuple(reply) for reply in replies}) > 1


def test_a_free_reply_that_follows_the_constraint_stays_the_same(
    compiler_and_models: tuple[GrammarCompiler, Any, Any, Any],
) -> None:
    compiler, tokenizer, model, _ = compiler_and_models
    everything = compiler.compile(Constraint("regex", r"(?s:.*)", "regex"))
    for num_beams in (1, 3):
        decoding = Decoding(1, 0, 12, num_beams)
        free = generate(model, SOURCES, decoding)
        assert generate(model, SOURCES, decoding, constraints=[everything] * len(SOURCES)) == free


def test_a_schema_s_replies_are_valid_json(compiler_and_models: tuple[GrammarCompiler, Any, Any, Any]) -> None:
    compiler, tokenizer, model, _ = compiler_and_models
    schema = compiler.compile(Constraint("json_schema", json.dumps(SCHEMA), "json_schema: a.json"))
    replies = generate(model, SOURCES, Decoding(1, 0, 60), constraints=[schema] * len(SOURCES))
    values = [json.loads(tokenizer.decode(reply)) for reply in replies]
    assert all(value["a"] in ("x", "yes") for value in values), values
