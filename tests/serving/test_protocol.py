"""How the bodies of requests are read or refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from t5tune.data.reading.formats import Turn
from t5tune.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse_body

HI = [{"role": "user", "content": "Hi"}]


def parse_chat(**values: Any) -> ChatRequest:
    return parse_body(json.dumps({"model": "m", "messages": HI} | values).encode(), ChatRequest)


def parse_completion(**values: Any) -> CompletionRequest:
    return parse_body(json.dumps({"model": "m", "prompt": "Hi"} | values).encode(), CompletionRequest)


def refuse(parse: Callable[..., Any], **values: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(**values)
    return caught.value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": None}, "model: missing"),
        ({"model": ""}, 'model: "": must not be empty'),
        ({"messages": []}, "messages: must not be empty"),
        ({"messages": "Hi"}, 'messages: "Hi": expected a list'),
        ({"messages": ["Hi"]}, 'messages[0]: "Hi": expected an object'),
        ({"messages": [{"role": "user"}]}, "messages[0].content: missing"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role: \"tool\": expected 'system', 'developer', 'user' or 'assistant'",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content: 3: expected text, or a list of its parts",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type: \"image_url\": expected 'text'",
        ),
        ({"messages": [{**HI[0], "mood": "good"}]}, "messages[0].mood: unknown field"),
        ({"messages": [{**HI[0], "name": "Bo"}]}, 'messages[0].name: "Bo": not supported; leave it out'),
        ({"temperatur": 1}, "temperatur: unknown field; did you mean temperature?"),
        ({"temperature": "1"}, 'temperature: "1": expected a number'),
        ({"temperature": True}, "temperature: true: expected a number"),
        ({"temperature": -1}, "temperature: -1: must be at least 0"),
        ({"top_p": 0}, "top_p: 0: must be greater than 0"),
        ({"max_tokens": 1.5}, "max_tokens: 1.5: expected a whole number"),
        ({"max_completion_tokens": 0}, "max_completion_tokens: 0: must be greater than 0"),
        ({"n": 1000}, "n: 1000: must be at most 128"),
        ({"stop": ["a"] * 17}, "stop: expected at most 16 texts, none of them empty"),
        ({"stop": [""]}, "stop: expected at most 16 texts, none of them empty"),
        ({"stream": "yes"}, 'stream: "yes": expected true or false'),
        ({"stream_options": {"x": 1}}, "stream_options.x: unknown field"),
        ({"top_logprobs": 3}, "top_logprobs: 3: needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: 21: must be at most 20"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: 0.5: not supported; leave it out"),
        ({"tools": [{"type": "function"}]}, 'tools: [{"type": "function"}]: not supported; leave it out'),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format: expected a json_schema if the type is json_schema, and only then",
        ),
        ({"prompt": []}, "prompt: expected a text or a list of ids, or several of these"),
        ({"prompt": 3}, "prompt: 3: expected a text or a list of ids, or several of these"),
        ({"prompt": [[1.5]]}, "prompt: expected a text or a list of ids at index 0"),
        ({"prompt": ["a", []]}, "prompt: expected a text or a list of ids at index 1"),
        ({"prompt": [True]}, "prompt: expected a text or a list of ids at index 0"),
        ({"prompt": "Hi", "logprobs": 21}, "logprobs: 21: must be at most 20"),
        ({"prompt": "Hi", "best_of": True}, "best_of: true: not supported; leave it out"),
        (
            {"prompt": "Hi", "echo": 1},
            "echo: 1: an encoder-decoder doesn't continue its prompt; POST /v1/score scores targets",
        ),
    ],
)
def test_an_unsupported_request_is_refused_by_its_field(values: dict[str, Any], message: str) -> None:
    error = refuse(parse_completion if "prompt" in values else parse_chat, **values)
    assert (error.status, error.message, error.param) == (400, message, message.partition(":")[0])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model":', b"\xff\xfe", b'{"model": "\\ud800"}', b'{"model": NaN}', b"[" * 100_000, b"null", b"[1]"],
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    error = refuse(parse_body, body=body, kind=ChatRequest)
    assert error.status == 400
    assert error.message.startswith(("the body isn't valid JSON: ", "the body isn't a JSON object"))
    assert "\n" not in error.message


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    plain = parse_chat()
    same = parse_chat(
        tools=None, logprobs=False, frequency_penalty=0, presence_penalty=0.0, n=1, user="me", metadata={"a": "b"},
        parallel_tool_calls=True, logit_bias={}, unheard_of=None, stop="", top_k=-1,
        repetition_penalty=1.0, min_p=0, best_of=1, stream_options={"include_usage": None},
        messages=[{**HI[0], "name": None, "tool_calls": None, "refusal": None, "type": "text"}],
    )  # fmt: skip
    assert plain == same
    assert parse_completion(logprobs=False, best_of=1, echo=False) == parse_completion()


def test_summaries_for_the_log_contain_no_text_of_requests() -> None:
    for values in (
        {"tools": [{"secret": "words"}]},
        {"max_tokens": "secret words"},
        {"messages": [{"role": "user", "content": {"secret": "words"}}]},
        {"messages": [{"role": "secret words", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "name": "secret words"}]},
    ):
        error = refuse(parse_chat, **values)
        assert "secret" not in error.summary
        assert error.summary.startswith(str(error.param))


def test_prompts_are_texts_or_lists_of_ids() -> None:
    prompts: list[Any] = ["a", ["a", "b"], [1, 2], [[1, 2], [3]]]
    found = [parse_completion(prompt=prompt).prompt for prompt in prompts]
    assert found == [["a"], ["a", "b"], [[1, 2]], [[1, 2], [3]]]


def test_the_messages_become_a_system_message_and_turns() -> None:
    def split(*messages: tuple[str, Any]) -> Any:
        return parse_chat(messages=[{"role": role, "content": text} for role, text in messages]).split_messages()

    assert split(("user", "a")) == (None, [Turn("human", "a")])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [Turn("human", "a\nb"), Turn("assistant", "c"), Turn("human", "d")]
    for role in ("system", "developer"):
        assert split((role, "s"), ("user", parts), ("assistant", "c"), ("user", "d")) == ("s", turns)
    for messages, problem in (
        ([("assistant", "a"), ("user", "b")], "messages[0].role: assistant, but expected user"),
        ([("user", "a"), ("user", "b")], "messages[1].role: user, but expected assistant"),
        ([("system", "s"), ("user", "a"), ("system", "t")], "messages[2].role: system, but expected assistant"),
        ([("system", "s")], "messages: there is no user message"),
        ([("user", "a"), ("assistant", "b")], "messages: the last message isn't the user's; there is nothing"),
    ):
        with pytest.raises(ApiError) as caught:
            split(*messages)
        assert caught.value.message.startswith(problem)
