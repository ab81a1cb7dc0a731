"""POST /v1/score gives each target's log-probability under the model, as plain transformers computes it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from t5tune.commands.serve import Server
from t5tune.data.tokens.encoders import Beginning, make_encoder
from tests.serving.conftest import StartServer
from tests.serving.test_constraints import Stock
from tests.serving.test_replies import ENGINES, MESSAGES, connect, reply

pytestmark = pytest.mark.slow
TARGETS = ["six coffees", "one tea", "no", "bread\nand {butter}", "one tea and a bread"]


@pytest.fixture(scope="module", params=ENGINES)
def server(request: pytest.FixtureRequest, chats: dict[str, Path], start: StartServer) -> Server:
    if request.param == "ctranslate2":
        pytest.importorskip("ctranslate2")
    return start({"run": str(chats["run"]), "pocket": "pocket"}, engine=request.param, max_new_tokens=200)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with connect(server) as found:
        yield found


@pytest.fixture(scope="module")
def stock(chats: dict[str, Path]) -> Stock:
    return Stock(chats)


def score(client: openai.OpenAI, targets: Any, **source: Any) -> Any:
    return client.post("/score", body={"model": "run", "targets": targets, **source}, cast_to=object)


def compute_logprobs(stock: Stock, source: list[int], target: str) -> list[float]:
    parts = [Beginning(target), stock.chatter.prompts.template.answer_suffix]
    answer, suffix = make_encoder(stock.tokenizer).encode(parts)
    ids = [*answer.tolist(), *suffix.tolist(), stock.tokenizer.eos_token_id]
    logprobs_TV = stock.compute_logits(source, ids[:-1]).log_softmax(-1)
    return [float(logprobs_V[index]) for logprobs_V, index in zip(logprobs_TV, ids, strict=True)]


def test_scores_are_those_of_plain_transformers(client: openai.OpenAI, stock: Stock) -> None:
    targets = TARGETS * 5  # several parts
    for message in MESSAGES[:2]:
        found = score(client, targets, messages=[{"role": "user", "content": message}])
        assert [each["index"] for each in found["scores"]] == [*range(len(targets))]
        for target, each in zip(targets, found["scores"], strict=True):
            expected = compute_logprobs(stock, stock.encode(message), target)
            assert each["token_logprobs"] == pytest.approx(expected, abs=1e-4)
            assert each["logprob"] == pytest.approx(sum(expected), abs=1e-4)
            assert not each["is_greedy"]
        assert found["usage"]["prompt_tokens"] > 0
    (ids,) = make_encoder(stock.tokenizer).encode([Beginning("six coffees")])
    (each,) = score(client, "no", prompt="six coffees")["scores"]  # without template
    expected = compute_logprobs(stock, [*ids.tolist(), stock.tokenizer.eos_token_id], "no")
    assert each["token_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_the_greedy_reply_is_greedy_and_its_beginning_is_not(client: openai.OpenAI) -> None:
    message = MESSAGES[1]
    greedy = reply(client, "pocket", message)
    assert len(greedy.split()) > 1
    targets = [greedy, greedy.split()[0], "no"]
    found = score(client, targets, model="pocket", messages=[{"role": "user", "content": message}])
    assert [each["is_greedy"] for each in found["scores"]] == [True, False, False]


def test_scores_and_replies_at_the_same_time_are_the_same(client: openai.OpenAI) -> None:
    messages = [[{"role": "user", "content": message}] for message in MESSAGES]
    alone = [score(client, TARGETS * 8, messages=each)["scores"] for each in messages[:4]]
    replies = [reply(client, "run", message, max_tokens=60) for message in MESSAGES[:4]]
    with ThreadPoolExecutor(8) as pool:
        scores = [pool.submit(score, client, TARGETS * 8, messages=each) for each in messages[:4]]
        texts = [pool.submit(reply, client, "run", message, max_tokens=60) for message in MESSAGES[:4]]
    assert [future.result() for future in texts] == replies
    for one, future in zip(alone, scores, strict=True):
        together = future.result()["scores"]
        assert [each["logprob"] for each in together] == pytest.approx([each["logprob"] for each in one], abs=1e-4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"targets": [], "prompt": "Hi"}, "targets: must not be empty"),
        ({"targets": ["a", " "], "prompt": "Hi"}, "targets: a target is empty"),
        ({"targets": ["a"]}, "expected one prompt, or messages"),
        ({"targets": ["a"], "prompt": ["a", "b"]}, "expected one prompt, or messages"),
        ({"targets": ["a"], "prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "expected one prompt"),
        ({"targets": ["a " * 40_000], "prompt": "a"}, "targets: too long: 80,000 bytes"),
        ({"targets": ["a b c d e f g " * 300] * 12, "prompt": "a"}, "targets: "),
        ({"targets": ["a"], "prompt": "a", "n": 2}, "n: unknown field"),
    ],
)
def test_a_wrong_request_is_refused(body: dict[str, Any], message: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/score", body={"model": "run", **body}, cast_to=object)
    assert refused.value.message.removeprefix("Error code: 400 - ").startswith(message), refused.value.message


def test_the_responses_api_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="use /v1/chat/completions"):
        client.responses.create(model="run", input="Hi")
