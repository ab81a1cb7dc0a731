"""Parse the turns of a record: a list of messages, or a text of a known role.

parse_turns("messages", [{"role": "user", "content": "Hi"}], repairs)    # [RecordTurn("human", "Hi", "turn 0")]

Labels and weights decide whether an answer is learned. Unpaired preference data (KTO) labels each record as a whole:
`label` in TRL, `kto_tag` in LLaMA-Factory. A single turn may have a weight: `weight` in OpenAI's format, `loss_weight`
in LLaMA-Factory's.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from t5tune.data.reading.rejections import BadCell, RecordLocation, RejectionError
from t5tune.data.reading.tool_calls import CALL_PART_TYPES, find_tool_calls, join_tool_calls, read_tool_call_part
from t5tune.formatting import shorten
from t5tune.settings.groups.record_format import ReadingSettings

Role = Literal["human", "assistant"]
Speaker = Literal["system", "human", "assistant"]

CALLING_ROLE = "function_call"  # ShareGPT's role for a text that is a tool call
ROLES: dict[Speaker, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "human": ("human", "user", "tool", "function", "observation"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bing", "bard", CALLING_ROLE),
}
SPEAKERS = {role: speaker for speaker, roles in ROLES.items() for role in roles}
TURN_KEYS = (("from", "value"), ("role", "content"))
EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})  # values that mean "no value"
IGNORED_PART_TYPES = ("reasoning", "tools")  # types of content parts that are left out and counted
MAX_KEY_LENGTH = 40  # characters of a key's name in the counts; the rest is cut
LABEL_KEYS = ("label", "kto_tag")
WEIGHT_KEYS = ("loss_weight", "weight")
# all cells are text, also true and false
UNTYPED_FILE = re.compile(r"\.(?:[ct]sv(?:\.gz|\.zst)?|xlsx(?::[^:/]*)?)$", re.IGNORECASE)
BOOLEAN_CELLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class RecordTurn(NamedTuple):
    """A turn as it is in the record, before its text is repaired, and turns are merged and checked.

    Args:
        place: its name in messages: `turn 2`.
        prefix: prepended to the text, and not cleaned.
        calls: the tool calls that follow the text, as JSON; they aren't cleaned either.
    """

    speaker: Speaker
    text: str
    place: str
    learned: bool = True
    prefix: str = ""
    calls: str = ""


RecordTurns = list[RecordTurn]
ParsedTurns = tuple[set[str], RecordTurns]  # the used keys of the record, and its turns


def find_labels(record: Mapping[str, Any], location: RecordLocation, reading: ReadingSettings) -> dict[str, bool]:
    """Return the labels of a record by key: True is good, False is bad.

    Only true and false are labels. A number or a word is a class of a classification dataset, and a column that the
    user names as source or target is text.
    """
    labels: dict[str, bool] = {}
    sources, targets = reading.columns
    for key in LABEL_KEYS:
        value = record.get(key)
        if isinstance(value, str) and UNTYPED_FILE.search(location.file):
            value = BOOLEAN_CELLS.get(value)
        if isinstance(value, bool) and key not in (*sources, *targets):
            labels[key] = value
    return labels


def parse_turns(key: str, items: Any, repairs: Counter[str]) -> RecordTurns:
    """Parse a list of turns."""
    if not isinstance(items, list):
        raise RejectionError("unknown_format", f"{key}: expected a list of turns, found {name_json_type(items)}")
    # a record may have turns in both prompt and completion or chosen
    prefix = "" if key in ("conversations", "messages") else f"{key}: "
    return [_parse_turn(f"{prefix}turn {index}", item, repairs) for index, item in enumerate(items)]


def _parse_turn(where: str, item: Any, repairs: Counter[str]) -> RecordTurn:
    names = None
    if isinstance(item, dict):
        names = next((names for names in TURN_KEYS if item.get(names[0]) is not None), None)
    given = find_tool_calls(item, where) if names is not None else None
    if names is None or (names[1] not in item and given is None):
        raise RejectionError("bad_turn", f"{where}: expected an object with from and value, or role and content")
    speaker = item[names[0]]
    role = SPEAKERS.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        problem = f"{where}: unknown role {shorten(repr(speaker), 80)}; known roles: {', '.join(SPEAKERS)}"
        raise RejectionError("unknown_role", problem)
    said, calls = _separate_tool_calls(where, item.get(names[1]), repairs)
    used, learned = set(names), True
    if given is not None:
        used.add(given[0])
        calls += given[1]
    if key := next((key for key in WEIGHT_KEYS if isinstance(item.get(key), int | float)), None):
        if role == "assistant":
            if item[key] < 0:
                raise RejectionError("bad_turn", f"{where}: {key} {item[key]}: expected 0 (not learned) or 1")
            repairs["weights_taken_as_1"] += item[key] not in (0, 1)
            learned = item[key] != 0
        # other weights are ignored, and counted unless they are 0: such a turn is never learned anyway
        if role == "assistant" or item[key] == 0:
            used.add(key)
    if len(item) > len(names):
        count_ignored("turn_field", item, used, repairs)
    text = "" if calls and said in EMPTY_VALUES else parse_text(where, said)
    if calls:
        repairs["tool_calls_as_text"] += 1
    elif speaker.strip().lower() == CALLING_ROLE:  # its text is a call already
        text, calls = "", [text]
    return RecordTurn(role, text, where, learned, calls=join_tool_calls(calls) if calls else "")


def _separate_tool_calls(where: str, content: Any, repairs: Counter[str]) -> tuple[Any, list[str]]:
    # LLaMA-Factory's content parts -> parts without tool calls, tool calls
    calls: list[str] = []
    if not _has_parts(content) or all(part.get("type") == "text" for part in content):
        return content, calls
    rest = []
    for part in content:
        kind = part.get("type")
        if kind in CALL_PART_TYPES:
            calls += read_tool_call_part(part, where)
        elif kind not in IGNORED_PART_TYPES:
            rest.append(part)
        elif any(value not in EMPTY_VALUES for key, value in part.items() if key != "type"):
            repairs[f"ignored_part_{kind}"] += 1
    return rest or "", calls


def has_turns(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict) and any(role in turn for role, _ in TURN_KEYS) for turn in value
    )


def count_ignored(kind: str, value: dict[str, Any], used: set[str], repairs: Counter[str]) -> None:
    """Count the unused keys with values."""
    for key in value.keys() - used:
        if value[key] not in EMPTY_VALUES:
            repairs[name_ignored(kind, key)] += 1


def name_ignored(kind: str, key: str) -> str:
    return f"ignored_{kind}_{key if len(key) <= MAX_KEY_LENGTH else key[:MAX_KEY_LENGTH] + '…'}"


def _has_parts(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(part, dict) for part in content)


def parse_text_turn(role: Role, place: str, content: Any) -> RecordTurn:
    return RecordTurn(role, parse_text(place, content), place)


def parse_text(where: str, content: Any) -> str:
    """Return a text, or join a list of text parts: OpenAI's have `text`, LLaMA-Factory's have `value`."""
    if _has_parts(content):
        other = next((part.get("type") for part in content if part.get("type") != "text"), None)
        if other is not None:
            raise RejectionError("not_text", f"{where}: unsupported content part of type {other!r}")
        texts = [part["text"] if part.get("text") is not None else part.get("value") for part in content]
        content = "\n".join(parse_text(where, text) for text in texts)
    if isinstance(content, BadCell):
        raise RejectionError("bad_cell", f"{where}: {content}")
    if not isinstance(content, str):
        # 007 and 1.0 may be numbers by mistake, so which text is meant isn't guessed
        is_number = isinstance(content, int | float) and not isinstance(content, bool)
        advice = f"; write it as text: {str(content)!r}, or astype(str) in pandas" if is_number else ""
        raise RejectionError("not_text", f"{where}: expected text, found {name_json_type(content)}{advice}")
    return content


def name_json_type(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
