"""JSON and JSONL files in ShareGPT form -> conversations, one by one, and a reason for each record refused.

    for record in read_records(["chats.jsonl"]):
        match record:
            case Conversation(): ...
            case Rejected(): ...

The form: `{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}`, an
array of such objects or one a line. `{"source": "Hi", "target": "Hello."}` is a conversation of one turn.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from t5tune.errors import DataError

Role = Literal["human", "assistant"]
ROLES: dict[str, Literal["system", "human", "assistant"]] = {
    "system": "system",
    "human": "human",
    "user": "human",
    "tool": "human",
    "observation": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
}
SUFFIXES = {".json", ".jsonl", ".ndjson"}
USED_KEYS = {"conversations", "id", "system"}
PAIR_KEYS = {"source", "target"}


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """A record that can be trained on. `repairs` counts what was mended on the way, by kind."""

    file: str
    line: int
    system: str | None
    turns: tuple[Turn, ...]
    repairs: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A record that can't be used: the reason is one of a short list, the message says what was found."""

    file: str
    line: int
    reason: str
    message: str
    record: Any


class _Refused(Exception):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def find_files(data_path: list[str]) -> list[Path]:
    """The data files that the paths name; a folder stands for the JSON and JSONL files in it, sorted.

    Raises:
        DataError: a path doesn't exist, has another suffix, or is a folder without such files.
    """
    files: list[Path] = []
    for name in data_path:
        path = Path(name)
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix in SUFFIXES)
            if not inside:
                raise DataError(f"data_path: {path}: the folder holds no {', '.join(sorted(SUFFIXES))} file")
            files += inside
        elif path.is_file():
            if path.suffix not in SUFFIXES:
                raise DataError(
                    f"data_path: {path}: {path.suffix or 'no suffix'}: expected one of {', '.join(sorted(SUFFIXES))}"
                )
            files.append(path)
        else:
            raise DataError(f"data_path: {path}: no such file or folder", hint="check the path's spelling")
    return files


def read_records(files: list[Path]) -> Iterator[Conversation | Rejected]:
    """Every record of the files, in order, as a conversation or with the reason why it is none.

    Raises:
        DataError: a file isn't UTF-8, or is an array that breaks off or goes on after its end.
    """
    for path in files:
        for line, value in _values(path):
            if isinstance(value, Rejected):
                yield value
                continue
            try:
                yield _conversation(str(path), line, value)
            except _Refused as refused:
                yield Rejected(str(path), line, refused.reason, str(refused), value)


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, JSON value) of each record; a line that is no JSON comes as a Rejected."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}: not UTF-8", hint="save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    if text.lstrip()[:1] == "[":
        yield from _array(path, text)
    elif _is_one_value(text):
        yield 1 + text[: len(text) - len(text.lstrip())].count("\n"), json.loads(text)
    else:
        yield from _lines(path, text)


def _is_one_value(text: str) -> bool:
    """Whether a file holds one JSON object over several lines, rather than one a line."""
    if text.lstrip()[:1] != "{" or not text.rstrip().endswith("}"):
        return False
    first_line = text.lstrip().partition("\n")[0]
    try:
        json.loads(first_line)
    except ValueError:
        pass
    else:
        return text.strip() == first_line.strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        if position >= len(text):
            raise DataError(f"{path}:{line}: the array has no end", hint="the file was cut off; get it again")
        if text[position] == "]":
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not valid JSON here: {error}") from error
        yield line, value
    if text[position + 1 :].strip():
        raise DataError(f"{path}:{line}: text goes on after the array's end")


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, Rejected(str(path), number, "not_json", f"not valid JSON: {error}", line)


def _conversation(file: str, line: int, record: Any) -> Conversation:
    """Check one record and bring its roles to human and assistant in turn."""
    if not isinstance(record, dict):
        raise _Refused("not_an_object", f"expected an object, found {type(record).__name__}")
    used, entries = USED_KEYS, record.get("conversations")
    if "conversations" not in record and record.keys() >= PAIR_KEYS:
        used = USED_KEYS | PAIR_KEYS
        entries = [{"from": "human", "value": record["source"]}, {"from": "gpt", "value": record["target"]}]
    if not isinstance(entries, list):
        raise _Refused("no_conversations", "expected a list under `conversations`")
    repairs: Counter[str] = Counter()
    for key in record.keys() - used:
        repairs[f"ignored_field_{key}"] += 1
    system = None
    if record.get("system") is not None:
        system = _checked_text("system", record["system"], repairs) or None
    turns: list[Turn] = []
    for index, entry in enumerate(entries):
        role, text = _entry(index, entry, repairs)
        if role == "system":
            if turns or system is not None:
                raise _Refused("misplaced_system", f"turn {index}: a system turn that isn't the first")
            system = text
        elif role == "assistant" and not turns:
            repairs["leading_assistant_turns"] += 1
        elif turns and turns[-1].role == role:
            raise _Refused("same_role_twice", f"turn {index}: two turns of {role} in a row")
        else:
            turns.append(Turn(role, text))
    if turns and turns[-1].role == "human":
        repairs["trailing_human_turns"] += 1
        turns.pop()
    blank = sum(turn.role == "assistant" and not turn.text.strip() for turn in turns)
    if blank:
        repairs["blank_answers"] += blank
    if blank == sum(turn.role == "assistant" for turn in turns):
        raise _Refused("no_answer", "no assistant turn with text to learn from")
    return Conversation(file, line, system, tuple(turns), tuple(sorted(repairs.items())))


def _entry(index: int, entry: Any, repairs: Counter[str]) -> tuple[Literal["system", "human", "assistant"], str]:
    if not isinstance(entry, dict) or "from" not in entry or "value" not in entry:
        raise _Refused("bad_turn", f"turn {index}: expected an object with `from` and `value`")
    speaker, text = entry["from"], entry["value"]
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise _Refused("unknown_role", f"turn {index}: role {speaker!r}; known are {', '.join(ROLES)}")
    return role, _checked_text(f"turn {index}", text, repairs)


def _checked_text(place: str, text: object, repairs: Counter[str]) -> str:
    """The text with plain newlines."""
    if not isinstance(text, str):
        raise _Refused("not_text", f"{place}: expected text, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refused("lone_surrogate", f"{place}: half of a surrogate pair, which is no character") from None
    if "\r" in text:
        repairs["carriage_returns"] += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text
