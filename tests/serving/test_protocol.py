"""What is read from the bodies of requests, and what is said about those that can't be used."""

import json
from typing import Any

import pytest

from t5tune.data.reading.formats import Turn
from t5tune.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse_body

HI = [{"role": "user", "content": "Hi"}]


def parse_chat(**values: Any) -> ChatRequest:
    return parse_body(json.dumps({"model": "m", "messages": HI} | values).encode(), ChatRequest)


def parse_completion(**values: Any) -> CompletionRequest:
    return parse_body(json.dumps({"model": "m", "prompt": "Hi"} | values).encode(), CompletionRequest)


@pytest.mark.parametrize(
    ("values", "message", "param"),
    [
        ({"model": None}, "model: missing", "model"),
        ({"model": ""}, 'model: "": must not be empty', "model"),
        ({"messages": []}, "messages: must not be empty", "messages"),
        ({"messages": "Hi"}, 'messages: "Hi": expected a list', "messages"),
        ({"messages": ["Hi"]}, 'messages[0]: "Hi": expected an object', "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: missing", "messages[0].content"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role: \"tool\": expected 'system', 'developer', 'user' or 'assistant'",
            "messages[0].role",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content: 3: expected text, or a list of its parts",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type: \"image_url\": expected 'text'",
            "messages[0].content[0].type",
        ),
        ({"messages": [{**HI[0], "mood": "good"}]}, "messages[0].mood: unknown field", "messages[0].mood"),
        (
            {"messages": [{**HI[0], "name": "Bo"}]},
            'messages[0].name: "Bo": not supported; leave it out',
            "messages[0].name",
        ),
        ({"temperatur": 1}, "temperatur: unknown field; did you mean temperature?", "temperatur"),
        ({"temperature": "1"}, 'temperature: "1": expected a number', "temperature"),
        ({"temperature": True}, "temperature: true: expected a number", "temperature"),
        ({"temperature": -1}, "temperature: -1: must be at least 0", "temperature"),
        ({"top_p": 0}, "top_p: 0: must be greater than 0", "top_p"),
        ({"max_tokens": 1.5}, "max_tokens: 1.5: expected a whole number", "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens: 0: must be greater than 0", "max_completion_tokens"),
        ({"n": 1000}, "n: 1000: must be at most 128", "n"),
        ({"stop": ["a"] * 17}, "stop: expected at most 16 texts, none of them empty", "stop"),
        ({"stop": [""]}, "stop: expected at most 16 texts, none of them empty", "stop"),
        ({"stream": "yes"}, 'stream: "yes": expected true or false', "stream"),
        ({"stream_options": {"x": 1}}, "stream_options.x: unknown field", "stream_options.x"),
        ({"logprobs": True}, "logprobs: true: not supported; leave it out", "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: 0.5: not supported; leave it out", "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, 'tools: [{"type": "function"}]: not supported; leave it out', "tools"),
        (
            {"response_format": {"type": "json_object"}},
            'response_format: {"type": "json_object"}: not supported; leave it out',
            "response_format",
        ),
    ],
)
def test_a_chat_that_can_not_be_honored_is_refused_by_the_field(
    values: dict[str, Any], message: str, param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(**values)
    assert (caught.value.status, caught.value.message, caught.value.param) == (400, message, param)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: expected a text or a list of ids, or several of these"),
        (3, "prompt: 3: expected a text or a list of ids, or several of these"),
        ([[1.5]], "prompt: expected a text or a list of ids at index 0"),
        (["a", []], "prompt: expected a text or a list of ids at index 1"),
        ([True], "prompt: expected a text or a list of ids at index 0"),
    ],
)
def test_a_prompt_that_is_neither_text_nor_ids_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(prompt=prompt)
    assert (caught.value.message, caught.value.param) == (message, "prompt")


@pytest.mark.parametrize(("field", "value"), [("logprobs", 0), ("logprobs", 5), ("best_of", True), ("echo", 1)])
def test_a_completion_that_asks_for_more_than_nothing_is_refused_though_0_is_false(field: str, value: Any) -> None:
    """`logprobs: 0` asks for the log-probabilities of the chosen tokens."""
    assert parse_completion(logprobs=False, best_of=1, echo=False) == parse_completion()
    with pytest.raises(ApiError) as caught:
        parse_completion(**{field: value})
    shown = json.dumps(value)
    assert (caught.value.message, caught.value.param) == (f"{field}: {shown}: not supported; leave it out", field)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model":', b"\xff\xfe", b'{"model": "\\ud800"}', b'{"model": NaN}', b"[" * 100_000, b"null", b"[1]"],
)
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(body, ChatRequest)
    assert caught.value.status == 400
    assert caught.value.message.startswith(("the body isn't valid JSON: ", "the body isn't a JSON object"))
    assert "\n" not in caught.value.message


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    plain = parse_chat()
    same = parse_chat(
        tools=None, logprobs=False, frequency_penalty=0, presence_penalty=0.0, n=1, user="me", metadata={"a": "b"},
        response_format={"type": "text"}, parallel_tool_calls=True, logit_bias={}, unheard_of=None, stop="", top_k=-1,
        repetition_penalty=1.0, min_p=0, best_of=1, stream_options={"include_usage": None},
        messages=[{**HI[0], "name": None, "tool_calls": None, "refusal": None, "type": "text"}],
    )  # fmt: skip
    assert plain == same


def test_the_text_of_requests_is_in_no_summary_for_the_log() -> None:
    for values in (
        {"tools": [{"secret": "words"}]},
        {"max_tokens": "secret words"},
        {"messages": [{"role": "user", "content": {"secret": "words"}}]},
        {"messages": [{"role": "secret words", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "name": "secret words"}]},
    ):
        with pytest.raises(ApiError) as caught:
            parse_chat(**values)
        assert "secret" not in caught.value.summary
        assert caught.value.summary.startswith(str(caught.value.param))


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
    for messages, place in (
        ([("assistant", "a"), ("user", "b")], "messages[0].role: assistant, but expected user"),
        ([("user", "a"), ("user", "b")], "messages[1].role: user, but expected assistant"),
        ([("system", "s"), ("user", "a"), ("system", "t")], "messages[2].role: system, but expected assistant"),
        ([("system", "s")], "messages: there is no user message"),
        ([("user", "a"), ("assistant", "b")], "messages: the last message isn't the user's; there is nothing"),
    ):
        with pytest.raises(ApiError) as caught:
            split(*messages)
        assert caught.value.message.startswith(place)
