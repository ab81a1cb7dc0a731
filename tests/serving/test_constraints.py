"""Constrained replies and log-probabilities over HTTP, compared with plain transformers."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel
from transformers import T5ForConditionalGeneration

from t5tune.commands.serve import Server
from t5tune.constraints import Constraint, grammars
from t5tune.constraints.compiler import Compiler
from t5tune.constraints.json_grammar import write_json_rules
from t5tune.data.reading.formats import Turn
from t5tune.data.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.serving.conftest import StartServer
from tests.serving.raw_http import read_metrics
from tests.serving.test_replies import ENGINES, LENGTH, MESSAGES, ask, ask_in_pieces, connect, load_chatter, reply
from tests.support.processes.trials import ENDLESS, list_trials

pytest.importorskip("llguidance")
pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["a", "of"]}, "is": {"type": "boolean"}},
    "required": ["size"],
    "additionalProperties": False,
}
PATTERN = "[a-z]{2,5}( (and|or) [a-z]{1,4})?"
ANSWERS = ["six coffees", "one tea", "one tea and a bread", "no"]
FORMAT = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
CONSTRAINTS: list[tuple[dict[str, Any], Constraint]] = [
    ({"response_format": FORMAT}, Constraint("json_schema", json.dumps(SCHEMA), "json_schema")),
    ({"extra_body": {"structured_outputs": {"regex": PATTERN}}}, Constraint("regex", PATTERN, "regex")),
    (
        {"extra_body": {"structured_outputs": {"choice": ANSWERS}}},
        Constraint("choices", json.dumps(ANSWERS), "choices"),
    ),
]


class Order(BaseModel):
    size: Literal["a", "of"]
    number: int


@pytest.fixture(scope="module", params=ENGINES)
def server(request: pytest.FixtureRequest, chats: dict[str, Path], start: StartServer) -> Server:
    if request.param == "ctranslate2":
        pytest.importorskip("ctranslate2")
    return start({"run": str(chats["run"])}, engine=request.param, max_batch_delay=50)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connect(server) as found:
        yield found


class Stock:
    """The merged model in plain transformers, in fp64."""

    def __init__(self, chats: dict[str, Path]) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(chats["merged"])
        self.model: Any = T5ForConditionalGeneration.from_pretrained(chats["merged"], dtype=torch.float64)
        self.chatter = load_chatter(chats["run"])
        self.compiler = Compiler(self.tokenizer, self.model.config.vocab_size, [self.tokenizer.eos_token_id])

    def encode(self, message: str) -> list[int]:
        return self.chatter.prompts.encode([Turn("human", message)]).ids

    def compute_logits(self, source: list[int], ids: list[int]) -> torch.Tensor:
        """Compute the logits of each token of a reply, and of the token that follows."""
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[0, *ids]])}
            return self.model(**inputs).logits[0]

    def follow(self, message: str, constraint: Constraint) -> str:
        """Choose the likeliest allowed token, step by step."""
        source, state, ids = self.encode(message), self.compiler.start(constraint), list[int]()
        while len(ids) < LENGTH:
            logits_V = self.compute_logits(source, ids)[-1]
            logits_V[~torch.from_numpy(state.find_allowed())] = -torch.inf
            token = int(logits_V.argmax())
            assert state.accept(token)
            if token == self.tokenizer.eos_token_id:
                break
            ids.append(token)
        return self.chatter.prompts.decode(ids)


@pytest.fixture(scope="module")
def stock(chats: dict[str, Path]) -> Stock:
    return Stock(chats)


@pytest.mark.parametrize(("options", "constraint"), CONSTRAINTS, ids=["schema", "regex", "choices"])
@pytest.mark.variants("transformers-regex", "transformers-choices", "ctranslate2-schema", "ctranslate2-choices")
def test_constrained_replies_are_the_likeliest_allowed_tokens(
    options: dict[str, Any], constraint: Constraint, client: openai.OpenAI, stock: Stock
) -> None:
    free = [reply(client, "run", message) for message in MESSAGES[:4]]
    with ThreadPoolExecutor(12) as pool:  # constrained and free requests together
        constrained = [pool.submit(reply, client, "run", message, **options) for message in MESSAGES[:6]]
        streamed = [pool.submit(ask_in_pieces, client, "run", message, **options) for message in MESSAGES[:2]]
        again = [pool.submit(reply, client, "run", message) for message in MESSAGES[:4]]
    expected = [stock.follow(message, constraint) for message in MESSAGES[:6]]
    assert [future.result() for future in constrained] == expected
    assert ["".join(future.result()[0]) for future in streamed] == expected[:2]
    assert [future.result() for future in again] == free
    assert not set(expected) & set(free)


def test_sampled_replies_follow_the_constraint(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"regex": PATTERN}}
    found = ask(client, "run", MESSAGES[0], n=12, temperature=1.5, extra_body=extra)
    texts = [choice.message.content for choice in found.choices if choice.finish_reason == "stop"]
    assert all(re.fullmatch(PATTERN, text) for text in texts), texts
    assert len(set(texts)) > 3


def test_the_openai_client_parses_a_reply(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": MESSAGES[0]}]
    found = client.chat.completions.parse(model="run", messages=messages, response_format=Order, max_tokens=60)
    assert isinstance(found.choices[0].message.parsed, Order)
    assert str(found.system_fingerprint).startswith("fp_")


def test_a_reply_that_is_cut_off_says_so(client: openai.OpenAI) -> None:
    (choice,) = ask(client, "run", MESSAGES[0], max_tokens=3, response_format=FORMAT).choices
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("{")
    assert not choice.message.content.endswith("}")


@pytest.mark.parametrize("options", [{}, CONSTRAINTS[0][0]], ids=["free", "constrained"])
def test_log_probabilities_are_those_of_the_unconstrained_model(
    options: dict[str, Any], client: openai.OpenAI, stock: Stock
) -> None:
    for message in MESSAGES[:3]:
        whole = ask(client, "run", message, logprobs=True, top_logprobs=3, **options).choices[0]
        few = ask(client, "run", message, logprobs=True, **options).choices[0]
        parts = list(ask(client, "run", message, logprobs=True, top_logprobs=3, stream=True, **options))
        tokens = whole.logprobs.content
        assert b"".join(bytes(each.bytes) for each in tokens).decode() == whole.message.content
        streamed = [each for part in parts if part.choices[0].logprobs for each in part.choices[0].logprobs.content]
        assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in tokens], abs=1e-4)
        assert [each.logprob for each in few.logprobs.content] == pytest.approx(
            [each.logprob for each in tokens], abs=1e-4
        )
        ids = find_ids(stock, message, [bytes(each.bytes) for each in tokens])
        logprobs = stock.compute_logits(stock.encode(message), ids)[:-1].log_softmax(-1)
        for each, logprobs_V, index in zip(tokens, logprobs, ids, strict=True):
            assert each.logprob == pytest.approx(float(logprobs_V[index]), abs=1e-4)
            assert [top.logprob for top in each.top_logprobs] == pytest.approx(
                logprobs_V.topk(3).values.tolist(), abs=1e-4
            )
        assert len(tokens) > 2


def find_ids(stock: Stock, message: str, spelled_tokens: list[bytes]) -> list[int]:
    """Find the ids of a reply's tokens by their bytes, of several the likeliest; special tokens have no bytes."""
    ids: list[int] = []
    for place, wanted in enumerate(spelled_tokens):
        spellings = stock.compiler.spellings.first if place == 0 else stock.compiler.spellings.later
        candidates = [index for index, spelled in enumerate(spellings) if (spelled or b"") == wanted]
        logits_V = stock.compute_logits(stock.encode(message), ids)[-1]
        ids.append(max(candidates, key=lambda index: float(logits_V[index])))
    return ids


def test_completions_have_log_probabilities_of_their_own_shape(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(model="run", prompt="six coffees", logprobs=2, max_tokens=5).choices
    found = choice.logprobs
    assert found is not None
    assert "".join(found.tokens or []) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:number])) for number in range(len(found.tokens))]
    assert all(token in top for token, top in zip(found.tokens, found.top_logprobs, strict=True))
    assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json: not: can't be enforced; remove it"),
        ({"structured_outputs": {"regex": " a"}}, "structured_outputs.regex: no reply can follow it"),
        ({"structured_outputs": {"choice": ["a", " "]}}, "structured_outputs.choice: an answer is empty"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: must not be empty"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs: expected one of json,"),
        ({"structured_outputs": {"grammar": "start: x"}}, 'structured_outputs.grammar: line 1: unknown name: "x"'),
        (
            {"structured_outputs": {"regex": "[a-z]中"}},
            "structured_outputs.regex: this tokenizer can't write a character that must",
        ),
        (
            {"structured_outputs": {"regex": "a" * 70_000}},
            "structured_outputs.regex: 70,000 characters; at most 65,536",
        ),
        ({"response_format": {"type": "xml"}}, 'response_format.type: "xml"'),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "response_format conflicts with"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json_schema."),
    ],
)
def test_a_constraint_that_cannot_be_enforced_is_refused(
    body: dict[str, Any], message: str, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        reply(client, "run", MESSAGES[0], extra_body=body)
    assert refused.value.message.removeprefix("Error code: 400 - ").startswith(message), refused.value.message


def test_a_request_for_text_leaves_out_the_servers_constraint(
    chats: dict[str, Path], start: StartServer, server: Server, client: openai.OpenAI
) -> None:
    constrained = connect(start({"run": str(chats["run"])}, engine=server.address.models["run"], regex="[0-9]{3}"))
    text: dict[str, Any] = {"response_format": {"type": "text"}}
    assert re.fullmatch("[0-9]{3}", reply(constrained, "run", MESSAGES[0]))
    assert reply(constrained, "run", MESSAGES[0], **text) == reply(client, "run", MESSAGES[0])
    text["extra_body"] = {"structured_outputs": {"regex": "[a-z]{4}"}}
    assert re.fullmatch("[a-z]{4}", reply(constrained, "run", MESSAGES[0], **text))


def test_a_constraint_that_never_compiles_is_refused_alone(server: Server, client: openai.OpenAI) -> None:
    endless = {"structured_outputs": {"json": ENDLESS}}
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(reply, client, "run", MESSAGES[0], extra_body=endless)
        while len(list_trials()) < 2:
            assert not refused.done()
        assert reply(client, "run", MESSAGES[0])
        texts = [
            reply(client, "run", MESSAGES[0], extra_body={"structured_outputs": {"regex": f"[a-z]{{{size}}}"}})
            for size in range(3, 6)
        ]
        assert [len(text) for text in texts] == [3, 4, 5]
        assert not refused.done()
        message = "structured_outputs.json: too complex to compile within 5 seconds and 512 MiB of memory; simplify it"
        with pytest.raises(openai.BadRequestError, match=message):
            refused.result()
    server.reload()
    assert reply(client, "run", MESSAGES[0], extra_body={"structured_outputs": {"regex": "[a-z]{6}"}}).isalpha()


def test_an_invalid_reply_is_an_error_of_its_request_alone(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_too_much(schema: Any, name: str, place: str) -> str:
        return write_json_rules(schema if schema != wrong else {"enum": ["no"]}, name, place)

    wrong = {"enum": ["yes"]}
    monkeypatch.setattr(grammars, "write_json_rules", write_too_much)
    bodies = [{"structured_outputs": {"json": schema}} for schema in (wrong, {"enum": ["tea"]}, {"enum": ["no"]})]
    with ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(reply, client, "run", MESSAGES[0], extra_body=body) for body in bodies]
    with pytest.raises(openai.InternalServerError) as refused:
        replies[0].result()
    problem = "structured_outputs.json: the reply doesn't satisfy the schema: $: 'no' is not one of ['yes']"
    assert problem in refused.value.message
    assert [each.result() for each in replies[1:]] == ['"tea"', '"no"']
    assert "t5tune_invalid_replies_total{" in (text := read_metrics(server.url))
    counted = [float(count) for count in re.findall("^t5tune_invalid_replies_total{.*} (.*)$", text, re.MULTILINE)]
    assert sum(counted) >= 1


def test_ctranslate2_refuses_to_constrain_top_p(server: Server, client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1, "top_p": 0.5, **CONSTRAINTS[1][0]}
    if server.address.models["run"] == "transformers":
        assert re.fullmatch(PATTERN, reply(client, "run", MESSAGES[0], **options))
        return
    with pytest.raises(openai.BadRequestError, match="top_p: 0.5: CTranslate2 can't constrain replies with it"):
        reply(client, "run", MESSAGES[0], **options)
