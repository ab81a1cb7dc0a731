"""OpenAI's tool calls as the text that ShareGPT's function_call turns hold.

called({"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}, "turn 1")
# ('tool_calls', ['{"name": "add", "arguments": {"a": 1}}'])
called_in_part({"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}, "turn 1")
# ['{"name": "add", "arguments": {"a": 1}}']
"""

import json
from typing import Any

from t5tune.data.records import Refused, parse

KEYS = ("tool_calls", "function_call")  # the second is the older one, of one call
PARTS = ("tool_call", "tool_calls")  # types of LLaMA-Factory's content parts; the second is the older one


def called(message: dict[str, Any], place: str) -> tuple[str, list[str]] | None:
    """The key and the texts of a message's calls; None: it makes none.

    Raises:
        Refused: a call without a function's name.
    """
    key = next((key for key in KEYS if key in message and not _is_nothing(message[key])), None)
    if key is None:
        return None
    given = message[key]
    return key, _texts(given, place)


def called_in_part(part: dict[str, Any], place: str) -> list[str]:
    """The texts of the calls that a content part holds as JSON.

    Raises:
        Refused: no JSON, or a call without a function's name.
    """
    given = part.get("value")
    if isinstance(given, str):
        try:
            given = parse(given.encode())
        except Refused:
            raise Refused("bad_turn", f"{place}: a part of type {part['type']!r} whose value is no JSON") from None
    return _texts(given, place)


def joined(calls: list[str]) -> str:
    """Several calls as one text: a JSON list."""
    return calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"


def _texts(given: Any, place: str) -> list[str]:
    return [_text(call, place) for call in (given if isinstance(given, list) else [given])]


def _is_nothing(given: Any) -> bool:
    """Tables may hold an object of nulls where there is none."""
    return not given or (isinstance(given, dict) and all(value is None for value in given.values()))


def _text(call: Any, place: str) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused("bad_turn", f"{place}: a tool call without a function's name")
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {_arguments(function.get("arguments"))}}}'


def _arguments(given: Any) -> str:
    """Arguments that stand in a text as JSON are taken as they stand."""
    if isinstance(given, str):
        try:
            parse(given.encode())
            return given
        except Refused:  # a text that is no JSON, which models write too
            pass
    return json.dumps(given, ensure_ascii=False, default=str)
