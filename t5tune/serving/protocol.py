"""The bodies of OpenAI's API: https://platform.openai.com/docs/api-reference/chat and …/completions.

    request = parse_body(body, ChatRequest)
    request.messages, request.temperature, …

Unknown and unsupported fields, such as tools or penalties, are refused, not ignored. Clients often send fields that ask
for nothing: null, or a value without effect. These are accepted. `structured_outputs` is vLLM's extension.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from t5tune.constraints import Constraint
from t5tune.constraints.reading import make_choices
from t5tune.data.reading.formats import Turn
from t5tune.data.reading.record_turns import Role
from t5tune.errors import make_printable, suggest_name
from t5tune.formatting import shorten
from t5tune.settings.messages import MAX_SHOWN_VALUE, describe_value_error, format_place

MAX_STOPS = 16  # OpenAI allows 4, but some tools send more
MAX_CHOICES = 128
# accepted in any object: these fields don't affect a reply
IGNORED_FIELDS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "cache_control",
}  # fmt: skip
# unsupported fields -> their values that ask for nothing, as null always does
NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "stop": ("",),
    # extensions of vLLM and llama.cpp
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    **dict.fromkeys(("add_special_tokens", "use_activation"), (True,)),
    "priority": (0,),
}
# the same for the fields of a message; clients send our replies back with all their fields
NEUTRAL_IN_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "type": ("text", "message"),
    "tool_calls": ([],),
    "annotations": ([],),
    **dict.fromkeys(("name", "refusal", "audio", "function_call", "tool_call_id", "reasoning_content"), ()),
}
ADVICE = {"echo": "an encoder-decoder doesn't continue its prompt; POST /v1/score scores targets"}
"""Unsupported fields -> what to do instead."""
MAX_TARGETS = 256
ROLES: Mapping[str, Role] = {"user": "human", "assistant": "assistant"}
SYSTEM_ROLES = ("system", "developer")

Body = TypeVar("Body", bound="_Body")


class ApiError(Exception):
    """An error to be sent to the client.

    Args:
        status: the HTTP status.
        param: the field of the request that is wrong.
        code: identifies the error for programs.
        summary: the message for the log, if `message` quotes the client's text.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        summary: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, make_printable(message), param, code
        self.summary = self.message if summary is None else make_printable(summary)
        self.headers = dict(headers or {})

    def to_body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _wrap_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _read_content(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError("expected text, or a list of its parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _read_prompts(value: Any) -> Any:
    """Read any form of the field as a list whose items are texts or lists of ids."""
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("expected a text or a list of ids, or several of these")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and _are_ids(prompt)):
            raise ValueError(f"expected a text or a list of ids at index {number}")
    return prompts


def _read_inputs(value: Any) -> Any:
    """Read any form of the field as a list whose items are texts or lists of words."""
    inputs = [value] if isinstance(value, str) else value
    if not isinstance(inputs, list) or not inputs or not all(map(_is_input, inputs)):
        raise ValueError("expected a text, a list of texts, or a list of lists of words")
    return inputs


def _is_input(value: Any) -> bool:
    if isinstance(value, list) and value:
        return all(isinstance(word, str) for word in value)
    return isinstance(value, str)


def _are_ids(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: it pads the events against guesses at their contents


class NamedSchema(_Body):
    name: str = ""
    description: str | None = None
    strict: bool | None = None  # ignored: replies always follow the schema
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected a json_schema if the type is json_schema, and only then")
        return self


class StructuredOutputs(_Body):
    """One constraint, in vLLM's names."""

    schema_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    json_object: Literal[True] | None = None
    regex: Annotated[str | None, Field(min_length=1)] = None
    choice: Annotated[list[str] | None, Field(min_length=1)] = None
    grammar: Annotated[str | None, Field(min_length=1)] = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if sum(getattr(self, name) is not None for name in type(self).model_fields) != 1:
            raise ValueError("expected one of json, json_object, regex, choice and grammar")
        return self


class GenerationRequest(_Body):
    """Fields of chats and completions. None: the server's default."""

    model: Annotated[str, Field(min_length=1)]
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    max_tokens: Annotated[int | None, Field(gt=0)] = None
    temperature: Annotated[float | None, Field(ge=0)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    n: Annotated[int, Field(gt=0, le=MAX_CHOICES)] = 1
    stop: Annotated[list[str], BeforeValidator(_wrap_text)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def reply_limit(self) -> tuple[str, int | None]:
        """The name and value of the field that limits the tokens of a reply."""
        return "max_tokens", self.max_tokens

    @property
    def num_top(self) -> int | None:
        """How many of the likeliest tokens at each position are scored with the reply's token; None: no scores."""
        return None

    @property
    def constraint_field(self) -> str | None:
        """The field with the constraint; None: the request has no constraint."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        return None if self.response_format is None or self.wants_text else "response_format"

    @property
    def wants_text(self) -> bool:
        """Whether the request leaves out the server's constraint."""
        return self.response_format is not None and self.response_format.type == "text"

    def read_constraint(self) -> Constraint | None:
        """Read the constraint of the request. Raises SettingsError for a list of answers with an empty one."""
        if (given := self.response_format) is not None and not self.wants_text:
            schema = {"type": "object"} if given.json_schema is None else given.json_schema.schema_
            return Constraint("json_schema", json.dumps(schema, ensure_ascii=False), "response_format")
        if (outputs := self.structured_outputs) is None:
            return None
        place = "structured_outputs"
        if outputs.choice is not None:
            return make_choices(outputs.choice, f"{place}.choice")
        if outputs.regex is not None:
            return Constraint("regex", outputs.regex, f"{place}.regex")
        if outputs.grammar is not None:
            return Constraint("grammar", outputs.grammar, f"{place}.grammar")
        schema = {"type": "object"} if outputs.schema_ is None else outputs.schema_
        return Constraint("json_schema", json.dumps(schema, ensure_ascii=False), f"{place}.json")

    @model_validator(mode="after")
    def _check_constraints(self) -> Self:
        if self.response_format is not None and self.structured_outputs is not None and not self.wants_text:
            raise ValueError("response_format conflicts with structured_outputs; send only one of them")
        return self

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: list[str]) -> list[str]:
        if len(stop) > MAX_STOPS or not all(stop):
            raise ValueError(f"expected at most {MAX_STOPS} texts, none of them empty")
        return stop


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_read_content)]

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(gt=0)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs: {self.top_logprobs}: needs logprobs: true")
        return self

    @property
    def num_top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def reply_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().reply_limit

    def split_messages(self) -> tuple[str | None, list[Turn]]:
        """Return the system message and the turns. Raises ApiError unless user and assistant take turns."""
        has_system = self.messages[0].role in SYSTEM_ROLES
        system = self.messages[0].text if has_system else None
        messages = self.messages[has_system:]
        if not messages:
            raise ApiError(400, "messages: there is no user message", "messages")
        for number, message in enumerate(messages):
            expected = "assistant" if number % 2 else "user"
            if message.role != expected:
                place = f"messages[{number + has_system}].role"
                order = "a system message may come first; then user and assistant take turns, the user first and last"
                raise ApiError(400, f"{place}: {message.role}, but expected {expected}: {order}", place)
        if messages[-1].role != "user":
            raise ApiError(400, "messages: the last message isn't the user's; there is nothing to reply to", "messages")
        return system, [Turn(ROLES[message.role], message.text) for message in messages]


class CompletionRequest(GenerationRequest):
    prompt: Annotated[list[str | list[int]], BeforeValidator(_read_prompts)]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def num_top(self) -> int | None:
        return self.logprobs


class ScoreRequest(_Body):
    """Targets to be scored as replies to a prompt or to messages."""

    model: Annotated[str, Field(min_length=1)]
    prompt: Annotated[list[str | list[int]], BeforeValidator(_read_prompts)] = []
    messages: list[Message] = []
    targets: Annotated[list[str], BeforeValidator(_wrap_text), Field(min_length=1, max_length=MAX_TARGETS)]

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: list[str]) -> list[str]:
        if not all(map(str.strip, targets)):
            raise ValueError("a target is empty")
        return targets

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if bool(self.prompt) == bool(self.messages) or len(self.prompt) > 1:
            raise ValueError("expected one prompt, or messages")
        return self

    def make_generation_request(self) -> ChatRequest | CompletionRequest:
        """Make a request for a reply to the same prompt or messages."""
        if self.messages:
            return ChatRequest(model=self.model, messages=self.messages)
        return CompletionRequest(model=self.model, prompt=self.prompt)


class ClassifyRequest(_Body):
    """Texts to be labeled, or lists of words."""

    model: Annotated[str, Field(min_length=1)]
    input: Annotated[list[str | list[str]], BeforeValidator(_read_inputs)]


def parse_body(body: bytes, kind: type[Body]) -> Body:
    """Parse the body of a request. Raises ApiError with the first problem."""
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body isn't valid JSON: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body isn't a JSON object")
    values = _drop_neutral(values, kind, NEUTRAL_VALUES)
    if isinstance(values.get("stream_options"), dict):
        values["stream_options"] = _drop_neutral(values["stream_options"], StreamOptions, {}, "stream_options.")
    if isinstance(values.get("messages"), list):
        values["messages"] = [
            _read_message(message, f"messages[{number}]") if isinstance(message, dict) else message
            for number, message in enumerate(values["messages"])
        ]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], kind) from None


def _read_message(message: dict[str, Any], place: str) -> dict[str, Any]:
    message = _drop_neutral(message, Message, NEUTRAL_IN_MESSAGES, f"{place}.")
    if isinstance(message.get("content"), list):
        message["content"] = [
            _drop_neutral(part, TextPart, {}, f"{place}.content[{number}].") if isinstance(part, dict) else part
            for number, part in enumerate(message["content"])
        ]
    return message


def _drop_neutral(
    values: dict[str, Any], kind: type[BaseModel], neutral: Mapping[str, tuple[Any, ...]], place: str = ""
) -> dict[str, Any]:
    """Drop fields that ask for nothing, and refuse unsupported fields that ask for something."""
    kept = {name: value for name, value in values.items() if value is not None and name not in IGNORED_FIELDS}
    for name in kept.keys() & neutral.keys():
        value = kept[name]
        # in JSON, 0 is the same as 0.0 but not as false
        if any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in neutral[name]):
            del kept[name]
        elif name not in kind.model_fields:
            advice = ADVICE.get(name, "not supported; leave it out")
            problem = f"{place}{name}: {advice}"
            shown = f"{place}{name}: {_show(value)}: {advice}"
            raise ApiError(400, shown, place + name, "unsupported", summary=problem)
    return kept


def _explain(error: ErrorDetails, kind: type[BaseModel]) -> ApiError:
    place = format_place(error["loc"])
    if error["type"] == "extra_forbidden":
        known = kind.model_fields if len(error["loc"]) == 1 else ()
        advice = suggest_name(str(error["loc"][-1]), known)
        return ApiError(400, f"{place}: unknown field{advice}", place, "unknown_field")
    if error["type"] == "missing":
        return ApiError(400, f"{place}: missing", place)
    if not place:  # several fields conflict, and the reason names them
        reason = describe_value_error(error)
        return ApiError(400, reason, reason.partition(":")[0])
    reason = "expected an object" if error["type"] == "model_type" else describe_value_error(error)
    shown = "" if isinstance(error["input"], dict | list) else f"{_show(error['input'])}: "
    return ApiError(400, f"{place}: {shown}{reason}", place, summary=f"{place}: {reason}")


def _show(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False), MAX_SHOWN_VALUE)
