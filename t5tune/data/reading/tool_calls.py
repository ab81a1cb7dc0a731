"""Convert OpenAI's tool calls to text in the form of ShareGPT's function_call turns.

find_tool_calls({"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}, "turn 1")
# ('tool_calls', ['{"name": "add", "arguments": {"a": 1}}'])
read_tool_call_part({"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}, "turn 1")
# ['{"name": "add", "arguments": {"a": 1}}']
"""

import json
from collections import Counter
from typing import Any

from t5tune.data.reading.rejections import RejectionError, parse_json

CALL_KEYS = ("tool_calls", "function_call")  # the second is the older form, with a single call
CALL_PART_TYPES = ("tool_call", "tool_calls")  # types of LLaMA-Factory's content parts; the second is the older form


def find_tool_calls(message: dict[str, Any], where: str) -> tuple[str, list[str]] | None:
    """Return the key and the texts of a message's tool calls; None: no tool calls."""
    key = next((key for key in CALL_KEYS if not _is_empty(message.get(key))), None)
    return (key, _format_calls(message[key], where)) if key is not None else None


def read_tool_call_part(part: dict[str, Any], where: str) -> list[str]:
    """Return the texts of the tool calls that a content part contains as JSON."""
    given = part.get("value")
    if isinstance(given, str):
        try:
            given = parse_json(given.encode())
        except RejectionError:
            problem = f"{where}: a content part of type {part['type']!r} whose value is not JSON"
            raise RejectionError("bad_turn", problem) from None
    return _format_calls(given, where)


def drop_null_arguments(value: Any, repairs: Counter[str]) -> Any:
    """Return a record of a table without the null arguments of its tool calls, and count these.

    The table gives a call the arguments of all other calls, so the call's real nulls can't be told from them.
    """
    if isinstance(value, list):
        return [drop_null_arguments(item, repairs) for item in value]
    if not isinstance(value, dict):
        return value
    is_call = "name" in value and isinstance(value.get("arguments"), dict)
    drop = {"arguments": _drop_nulls} if is_call else {}
    return {key: drop.get(key, drop_null_arguments)(item, repairs) for key, item in value.items()}


def _drop_nulls(value: Any, repairs: Counter[str]) -> Any:
    if isinstance(value, list):
        return [_drop_nulls(item, repairs) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _drop_nulls(item, repairs) for key, item in value.items() if item is not None}
    if num_nulls := len(value) - len(kept):
        repairs["null_arguments_left_out"] += num_nulls
    return kept


def join_tool_calls(calls: list[str]) -> str:
    """Join calls to one text: a single call as it is, several as a JSON list."""
    return calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"


def _format_calls(given: Any, where: str) -> list[str]:
    return [_format_call(call, where) for call in (given if isinstance(given, list) else [given])]


def _is_empty(given: Any) -> bool:
    # Parquet stores a missing object as an object of nulls
    return not given or (isinstance(given, dict) and all(value is None for value in given.values()))


def _format_call(call: Any, where: str) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RejectionError("bad_turn", f"{where}: a tool call without a function's name")
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'{{"name": {name}, "arguments": {_format_arguments(function.get("arguments"))}}}'


def _format_arguments(given: Any) -> str:
    # a text that is JSON already stays unchanged
    if isinstance(given, str):
        try:
            parse_json(given.encode())
            return given
        except RejectionError:  # models sometimes write arguments that are not JSON; keep them as a string
            pass
    return json.dumps(given, ensure_ascii=False, default=str)
