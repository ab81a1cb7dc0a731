"""A record's value -> a conversation: ShareGPT, OpenAI messages, Alpaca, prompt/completion, source/target.

conversation_of({"source": "Hi", "target": "Hello."}, place, ReadingSettings())
# Conversation(place, None, (Turn("human", "Hi"), Turn("assistant", "Hello.")))

Which format a record has is seen by its keys, unless `data_format` names one. What can't be used is Refused; what is
left out or mended on the way is counted.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

from t5tune.data.cleaning import clean, plain
from t5tune.data.record_labels import labels_of, weight_of
from t5tune.data.records import LABELED_BAD, Place, Refused
from t5tune.data.tool_calls import PARTS, called, called_in_part, joined
from t5tune.settings.data import ReadingSettings

Role = Literal["human", "assistant"]
Speaker = Literal["system", "human", "assistant"]

ROLES: dict[str, Speaker] = {
    "system": "system",
    "developer": "system",
    "human": "human",
    "user": "human",
    "tool": "human",
    "function": "human",
    "observation": "human",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
}
TURN_KEYS = (("from", "value"), ("role", "content"))
ANY = {"id", "system"}  # keys that every format may bring
NOTHING: tuple[Any, ...] = (None, "", [], {})  # values that stand for no value
UNUSED_PARTS = ("reasoning", "tools")  # types of content parts that no example is made of
LONGEST_KEY = 40  # characters of a key's name that is counted


@dataclass(frozen=True)
class Turn:
    """What one side said. An assistant turn of weight 0 is context for later turns, and not learned itself."""

    role: Role
    text: str
    learned: bool = True

    @property
    def is_target(self) -> bool:
        """Whether the model learns to write this turn."""
        return self.role == "assistant" and self.learned


class Entry(NamedTuple):
    """A turn as a record has it."""

    speaker: Speaker
    text: str
    learned: bool = True


Entries = list[Entry]


@dataclass(frozen=True)
class Conversation:
    """A record that can be trained on.

    Args:
        repairs: what was repaired or left out on the way, counted by kind.
        has_prefix: source_prefix was put before its question.
    """

    place: Place
    system: str | None
    turns: tuple[Turn, ...]
    repairs: Mapping[str, int] = field(default_factory=dict)
    has_prefix: bool = False


def conversation_of(value: Any, place: Place, reading: ReadingSettings) -> Conversation:
    """Find the record's format, check its turns, and bring them to human and assistant in turn.

    Raises:
        Refused: it can't be used, for one of records.REASONS.
    """
    if not isinstance(value, dict):
        raise Refused("not_an_object", f"expected an object, found {_kind(value)}")
    repairs: Counter[str] = Counter()
    name, parser = _format_of(value, reading)
    labels = labels_of(value, place, reading)
    if bad := [key for key, is_good in labels.items() if not is_good]:
        raise Refused(LABELED_BAD, f"{bad[0]}: false: labeled bad, so it is left out")
    used, entries = parser(value, reading, repairs)
    _count_ignored("field", value, used | ANY | labels.keys(), repairs)
    if value.get("system") not in NOTHING:
        entries.insert(0, Entry("system", _text("system", value["system"])))
    system: str | None = None
    turns: list[tuple[Role, list[str], set[bool]]] = []
    for index, (speaker, said, learned) in enumerate(entries):
        text = plain(said, repairs)
        if reading.clean:
            text = clean(text, repairs)
        if speaker == "system":
            if turns or system is not None:
                raise Refused("misplaced_system", f"turn {index}: a system turn that isn't the first")
            system = text
        elif speaker == "assistant" and not turns:
            repairs["leading_assistant_turns"] += 1
        elif turns and turns[-1][0] == speaker:
            if not reading.merge_same_role:
                raise Refused("same_role_twice", f"turn {index}: two turns of {speaker} in a row")
            turns[-1][1].append(text)
            turns[-1][2].add(learned)
            repairs["merged_same_role_turns"] += 1
        else:
            turns.append((speaker, [text], {learned}))
    if turns and turns[-1][0] == "human":
        repairs["trailing_human_turns"] += 1
        turns.pop()
    said_by = tuple(Turn(role, "\n".join(texts), False not in learned) for role, texts, learned in turns)
    if mixed := sum(len(learned) > 1 for _, _, learned in turns):  # a part of weight 0 must not be learned
        repairs["merged_turns_not_learned"] += mixed
    if blank := sum(not turn.text.strip() for turn in said_by):
        repairs["blank_turns"] += blank
    answers = [turn for turn in said_by if turn.role == "assistant" and turn.text.strip()]
    if not answers:
        raise Refused("no_answer", f"no assistant turn with text to learn from ({name})")
    if not any(turn.learned for turn in answers):
        raise Refused("zero_weight", f"every assistant turn has weight 0, so there is none to learn ({name})")
    has_prefix = bool(reading.source_prefix) and name in ("columns", "source-target")
    return Conversation(place, system or None, said_by, dict(sorted(repairs.items())), has_prefix)


def _count_ignored(kind: str, value: dict[str, Any], used: set[str], repairs: Counter[str]) -> None:
    for key in value.keys() - used:
        if value[key] not in NOTHING:
            repairs[f"ignored_{kind}_{key if len(key) <= LONGEST_KEY else key[:LONGEST_KEY] + '…'}"] += 1


def _format_of(value: dict[str, Any], reading: ReadingSettings) -> tuple[str, "Parser"]:
    if reading.source_column or reading.target_column:
        return "columns", _columns
    formats = _KEYS if reading.data_format == "auto" else {reading.data_format: _KEYS[reading.data_format]}
    # files of several formats that were joined have all their keys in every record, null where it has no such value
    present = {key for key, item in value.items() if item is not None}
    for given in (present, value.keys()):
        if name := next((name for name, keys in formats.items() if any(k <= given for k in keys)), None):
            return name, _PARSERS[name]
    found = ", ".join(sorted(value)[:6])
    wanted = "; ".join(f"{name}: {' or '.join(' + '.join(sorted(k)) for k in keys)}" for name, keys in formats.items())
    has_columns = sum(isinstance(item, str) for item in value.values()) > 1
    columns = "; or name two by --source-column and --target-column" if has_columns else ""
    raise Refused("unknown_format", f"its keys are {found or 'none'}; expected {wanted}{columns}")


Parser = Callable[[dict[str, Any], ReadingSettings, Counter[str]], tuple[set[str], Entries]]


def _messages(
    key: str, value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]
) -> tuple[set[str], Entries]:
    """ShareGPT's `conversations` of from and value, OpenAI's `messages` of role and content, or a mixture."""
    entries = _turns(key, value[key], repairs)
    if value.get("chosen") is None or (entries and entries[-1][0] == "assistant"):
        return {key}, entries
    return _answered({key}, entries, value, repairs)


def _answered(
    asked: set[str], question: Entries, value: dict[str, Any], repairs: Counter[str]
) -> tuple[set[str], Entries]:
    """A question and, of a pair of answers, the preferred; that may be a list of turns which has the question too."""
    chosen = value["chosen"]
    if isinstance(chosen, str):
        if not question:
            raise Refused("no_answer", "chosen: a text, and no prompt before it; source_column may name another key")
        return asked | {"chosen"}, [*question, Entry("assistant", chosen)]
    answer = _turns("chosen", chosen if isinstance(chosen, list) else [chosen], repairs)
    if not any(entry.speaker == "human" for entry in answer):
        return asked | {"chosen"}, question + answer
    # a question that stands in the list is used, not ignored
    return {"chosen"} | (asked if set(question) <= set(answer) else set()), answer


def _turns(key: str, items: Any, repairs: Counter[str]) -> Entries:
    if not isinstance(items, list):
        raise Refused("unknown_format", f"{key}: expected a list of turns, found {_kind(items)}")
    return [_turn(index, item, repairs) for index, item in enumerate(items)]


def _turn(index: int, item: Any, repairs: Counter[str]) -> Entry:
    place = f"turn {index}"
    names = None
    if isinstance(item, dict):
        names = next((names for names in TURN_KEYS if item.get(names[0]) is not None), None)
    given = called(item, place) if names is not None else None
    if names is None or (names[1] not in item and given is None):
        raise Refused("bad_turn", f"{place}: expected an object with from and value, or role and content")
    speaker = item[names[0]]
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise Refused("unknown_role", f"{place}: role {speaker!r:.80}; known are {', '.join(ROLES)}")
    said, calls = _without_calls(place, item.get(names[1]), repairs)
    used, learned = set(names), True
    if given is not None:
        used.add(given[0])
        calls += given[1]
    if (weight := weight_of(item)) is not None:
        if role == "assistant":
            learned = _is_learned(place, *weight, repairs)
        if role == "assistant" or weight[1] == 0:  # no other turn is learned, and 0 is the usual way to say so
            used.add(weight[0])
    if len(item) > len(names):
        _count_ignored("turn_field", item, used, repairs)
    if not calls:
        return Entry(role, _text(place, said), learned)
    repairs["tool_calls_as_text"] += 1
    return Entry(role, joined(calls) if said in NOTHING else f"{_text(place, said)}\n{joined(calls)}", learned)


def _is_learned(place: str, key: str, weight: float, repairs: Counter[str]) -> bool:
    """Whether an assistant turn of this weight is learned."""
    if weight < 0:
        raise Refused("bad_turn", f"{place}: {key} {weight}: expected 0 (not learned) or 1")
    if weight not in (0, 1):
        repairs["weights_taken_as_1"] += 1
    return weight != 0


def _without_calls(place: str, content: Any, repairs: Counter[str]) -> tuple[Any, list[str]]:
    """LLaMA-Factory's content parts without those of tool calls, and the texts of these; unused parts are counted."""
    calls: list[str] = []
    if not _has_parts(content) or all(part.get("type") == "text" for part in content):
        return content, calls
    rest = []
    for part in content:
        kind = part.get("type")
        if kind in PARTS:
            calls += called_in_part(part, place)
        elif kind not in UNUSED_PARTS:
            rest.append(part)
        elif any(value not in NOTHING for key, value in part.items() if key != "type"):
            repairs[f"ignored_part_{kind}"] += 1
    return rest or "", calls


def _alpaca(value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]) -> tuple[set[str], Entries]:
    """`instruction`, `input`, `output` (or `chosen`), and earlier pairs in `history`."""
    question = _text("instruction", value["instruction"])
    if value.get("input") not in NOTHING:
        question += "\n" + _text("input", value["input"])
    history = value.get("history") or []
    if not isinstance(history, list):
        raise Refused("bad_turn", f"history: expected a list of pairs, found {_kind(history)}")
    entries: Entries = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused("bad_turn", f"history {index}: expected a pair of question and answer")
        entries.append(Entry("human", _text(f"history {index}", pair[0])))
        entries.append(Entry("assistant", _text(f"history {index}", pair[1])))
    entries.append(Entry("human", question))
    asked = {"instruction", "input", "history"}
    if value.get("output") is None and value.get("chosen") is not None:
        return _answered(asked, entries, value, repairs)
    return asked | {"output"}, [*entries, Entry("assistant", _text("output", value.get("output")))]


def _prompt_completion(
    value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]
) -> tuple[set[str], Entries]:
    """`prompt` and `completion` (or `chosen`), each a text or a list of messages; a whole `chosen` needs no prompt."""
    question = _text_or_turns("prompt", value, "human", repairs) if value.get("prompt") is not None else []
    if value.get("completion") is not None or "chosen" not in value:
        return {"prompt", "completion"}, question + _text_or_turns("completion", value, "assistant", repairs)
    return _answered({"prompt"}, question, value, repairs)


def _text_or_turns(key: str, value: dict[str, Any], role: Role, repairs: Counter[str]) -> Entries:
    return _turns(key, value[key], repairs) if isinstance(value[key], list) else [Entry(role, _text(key, value[key]))]


def _source_target(value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]) -> tuple[set[str], Entries]:
    return _pair(value, "source", "target", reading)


def _columns(value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]) -> tuple[set[str], Entries]:
    return _pair(value, reading.source_column or "source", reading.target_column or "target", reading)


def _pair(value: dict[str, Any], source: str, target: str, reading: ReadingSettings) -> tuple[set[str], Entries]:
    if missing := [name for name in (source, target) if name not in value]:
        found = ", ".join(sorted(map(str, value))[:6])
        raise Refused("unknown_format", f"no column {', '.join(missing)}; the record has {found}")
    question = reading.source_prefix + _text(source, value[source])
    return {source, target}, [Entry("human", question), Entry("assistant", _text(target, value[target]))]


_KEYS: dict[str, list[set[str]]] = {
    "sharegpt": [{"conversations"}],
    "openai": [{"messages"}],
    "alpaca": [{"instruction", "output"}, {"instruction", "chosen"}],
    "prompt-completion": [{"prompt", "completion"}, {"prompt", "chosen"}, {"chosen", "rejected"}],
    "source-target": [{"source", "target"}],
}
_PARSERS: dict[str, Parser] = {
    "sharegpt": partial(_messages, "conversations"),
    "openai": partial(_messages, "messages"),
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "source-target": _source_target,
}


def _has_parts(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(part, dict) for part in content)


def _text(place: str, content: Any) -> str:
    """A text, or a list of parts of type text, joined: OpenAI's with `text`, LLaMA-Factory's with `value`."""
    if _has_parts(content):
        other = next((part.get("type") for part in content if part.get("type") != "text"), None)
        if other is not None:
            raise Refused("not_text", f"{place}: a part of type {other!r}")
        texts = [part["text"] if part.get("text") is not None else part.get("value") for part in content]
        content = "\n".join(_text(place, text) for text in texts)
    if not isinstance(content, str):
        raise Refused("not_text", f"{place}: expected text, found {_kind(content)}")
    return content


def _kind(value: Any) -> str:
    """A JSON value's kind, as JSON calls it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    kinds = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)
