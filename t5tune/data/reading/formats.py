"""Parse records as conversations: ShareGPT, OpenAI messages, Alpaca, prompt/completion, source/target.

    parse_conversation({"source": "Hi", "target": "Hello."}, location, ReadingSettings())
    # Conversation(location, None, (Turn("human", "Hi"), Turn("assistant", "Hello.")))

A preference pair is a conversation with two last answers. `sft` reads only the chosen one.

A record's format is detected by its keys, unless `data_format` names it. A record that can't be used raises
RejectionError. Repairs and unused fields are counted.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from t5tune.data.labels import TextLabels
from t5tune.data.reading.cleaning import clean, normalize_text
from t5tune.data.reading.record_turns import (
    EMPTY_VALUES,
    LABEL_KEYS,
    ParsedTurns,
    RecordTurn,
    RecordTurns,
    Role,
    count_ignored,
    find_labels,
    has_turns,
    name_ignored,
    name_json_type,
    parse_text,
    parse_text_turn,
    parse_turns,
)
from t5tune.data.reading.rejections import LABELED_BAD, RecordLocation, RejectionError, suggest_unwrapping
from t5tune.errors import find_close_name
from t5tune.io.reasons import join_first
from t5tune.settings.groups.record_format import ReadingSettings

COMMON_KEYS = {"id", "system"}  # keys that are valid in every format


@dataclass(frozen=True)
class Turn:
    """One speaker's turn. An assistant turn that isn't `learned` (weight 0) is only context for later turns."""

    role: Role
    text: str
    learned: bool = True


@dataclass(frozen=True)
class Conversation:
    """A conversation that can be trained on.

    Args:
        repairs: counts of repairs and unused fields, by kind.
        has_prefix: whether source_prefix was prepended to the source.
        is_pair: whether the record is a pair of texts, a source and a target, not a list of turns.
        is_raw_text: whether spans of the only turn are masked.
        rejected: the worse answer of a preference pair, whose better answer is the last turn.
        labels: of the only turn, a source.
    """

    location: RecordLocation
    system: str | None
    turns: tuple[Turn, ...]
    repairs: Mapping[str, int] = field(default_factory=dict)
    has_prefix: bool = False
    is_pair: bool = False
    is_raw_text: bool = False
    rejected: str | None = None
    labels: TextLabels | None = None

    @property
    def texts(self) -> list[str]:
        """The texts of the system message and of the turns, and a rejected answer."""
        return [self.system or "", *(turn.text for turn in self.turns), *self._list_rejected()]

    @property
    def sources(self) -> list[str]:
        """The texts that aren't learned."""
        context = (turn.text for turn in self.turns if turn.role != "assistant" or not turn.learned)
        return [self.system or "", *context]

    @property
    def targets(self) -> list[str]:
        """The learned texts."""
        learned = (turn.text for turn in self.turns if turn.role == "assistant" and turn.learned)
        return [*learned, *self._list_rejected()]

    def _list_rejected(self) -> list[str]:
        return [] if self.rejected is None else [self.rejected]

    def swap_answers(self) -> "Conversation":
        """Return a preference pair's conversation with the rejected answer as its last turn."""
        assert self.rejected is not None
        *before, answer = self.turns
        return replace(self, turns=(*before, replace(answer, text=self.rejected)), rejected=None)


def parse_conversation(value: Any, location: RecordLocation, reading: ReadingSettings) -> Conversation:
    """Detect a record's format, check its turns, and make their roles alternate; RejectionError: it can't be used."""
    if not isinstance(value, dict):
        raise RejectionError("not_an_object", f"expected an object, found {name_json_type(value)}")
    if reading.kind == "raw text":
        return _parse_raw_text(value, location, reading)
    value = _rename_preferences(value)
    return (_parse_preference if reading.kind == "pairs" else _parse_answers)(value, location, reading)


def _parse_answers(value: dict[str, Any], location: RecordLocation, reading: ReadingSettings) -> Conversation:
    repairs: Counter[str] = Counter()
    name, parser = _detect_format(value, reading)
    labels = find_labels(value, location, reading)
    if bad := [key for key, is_good in labels.items() if not is_good]:
        raise RejectionError(LABELED_BAD, f"{bad[0]}: false: labeled bad, so the record is left out")
    used, entries = parser(value, reading, repairs)
    count_ignored("field", value, used | COMMON_KEYS | labels.keys(), repairs)
    if value.get("system") not in EMPTY_VALUES:
        entries.insert(0, RecordTurn("system", parse_text("system", value["system"]), "the key system"))
    system, turns = _merge_turns(entries, reading, repairs)
    merged_turns = tuple(Turn(role, "\n".join(texts), False not in learned) for role, texts, learned in turns)
    # a merged turn with a part of weight 0 must not be learned
    repairs["merged_turns_not_learned"] += sum(len(learned) > 1 for _, _, learned in turns)
    repairs["blank_turns"] += sum(not turn.text.strip() for turn in merged_turns)
    answers = [turn for turn in merged_turns if turn.role == "assistant" and turn.text.strip()]
    is_pair = _is_pair(name, value, reading) and len(merged_turns) == 2
    if not answers:
        problem = "the answer is empty" if is_pair else "no assistant turn with text to learn from"
        raise RejectionError("no_answer", f"{problem} ({name})")
    if not any(turn.learned for turn in answers):
        raise RejectionError("zero_weight", f"every assistant turn has weight 0, so there is nothing to learn ({name})")
    has_prefix = bool(reading.source_prefix) and name in ("columns", "source-target")
    counts = {kind: count for kind, count in sorted(repairs.items()) if count}
    if is_pair and not merged_turns[0].text.removeprefix(reading.source_prefix if has_prefix else "").strip():
        raise RejectionError("no_source", f"no text to answer ({name})")
    return Conversation(location, system or None, merged_turns, counts, has_prefix, is_pair)


def _rename_preferences(value: dict[str, Any]) -> dict[str, Any]:
    """Rename the keys of OpenAI's format for preferences."""
    question = value.get("input")
    if not (isinstance(question, dict) and "preferred_output" in value):
        return value
    renamed = {**question, **{key: item for key, item in value.items() if key != "input"}}
    names = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
    return {names.get(key, key): item for key, item in renamed.items()}


def _parse_preference(value: dict[str, Any], location: RecordLocation, reading: ReadingSettings) -> Conversation:
    """Parse a record twice, once with each answer: both must be the last turns of the same conversation."""
    chosen, rejected = names = reading.columns[1][0], reading.rejected_column or "rejected"
    for name in names:
        if value.get(name) in EMPTY_VALUES:
            columns = "name the keys with --source-column, --target-column (the better answer) and --rejected-column"
            advice = suggest_key(name, value.keys() - set(names)) or f"; {columns}"
            raise RejectionError("no_preference", f"no {name} answer; the record has {list_keys(value)}{advice}")
    # a record may have the chosen answer a second time, as a completion
    twice = {key for key in ("output", "completion") if chosen == "chosen" and value.get(key) not in EMPTY_VALUES}
    rest = {key: item for key, item in value.items() if key not in twice}
    pair = [_parse_answers(rest, location, reading)]
    try:
        pair.append(_parse_answers({**rest, chosen: value[rejected]}, location, reading))
    except RejectionError as error:
        reason, problem = error.rejection
        raise RejectionError(reason, f"{rejected}: {problem.removeprefix(f'{chosen}: ')}") from None
    _check_pair(pair, names)
    repairs = Counter(pair[0].repairs) | Counter(pair[1].repairs) | Counter(name_ignored("field", key) for key in twice)
    del repairs[name_ignored("field", rejected)]
    *context, answer = pair[0].turns
    turns = (*(replace(turn, learned=False) for turn in context), answer)
    return replace(pair[0], turns=turns, repairs=dict(sorted(repairs.items())), rejected=pair[1].turns[-1].text)


def _check_pair(pair: list[Conversation], names: tuple[str, str]) -> None:
    for name, answered in zip(names, pair, strict=True):
        last = answered.turns[-1]
        if not last.text.strip():
            raise RejectionError("no_preference", f"{name}: no text in its last turn")
        if not last.learned:
            raise RejectionError("zero_weight", f"{name}: its last turn has weight 0")
    chosen, rejected = names
    contexts = [(each.system, [(turn.role, turn.text) for turn in each.turns[:-1]]) for each in pair]
    if contexts[0] != contexts[1]:
        both = zip(*(each.turns for each in pair), strict=False)
        place = next((number for number, (one, other) in enumerate(both) if one.text != other.text), None)
        where = "" if place is None else f": they differ from turn {place} on"
        raise RejectionError("other_question", f"{chosen} and {rejected} answer different questions{where}")
    if pair[0].turns[-1].text == pair[1].turns[-1].text:
        raise RejectionError("no_preference", f"{chosen} and {rejected} are the same")


def _parse_raw_text(value: dict[str, Any], location: RecordLocation, reading: ReadingSettings) -> Conversation:
    repairs: Counter[str] = Counter()
    column = reading.columns[0][0] if reading.source_column else "text"
    if column not in value and ".txt" in map(str.lower, Path(location.file).suffixes):
        column = "text"  # of the whole file
    if column not in value:
        key = suggest_key(column, value.keys())
        problem = f"no key {column} for raw text; the record's keys are {list_keys(value)}"
        advice = key or "; name the text's key with --source-column"
        raise RejectionError("unknown_format", problem + advice, suggests_key=bool(key))
    text = normalize_text(parse_text(column, value[column]), repairs)
    text = clean(text, repairs) if reading.clean else text
    if not text.strip():
        raise RejectionError("no_answer", "no text to learn from")
    count_ignored("field", value, {column, "id"}, repairs)
    counts = {kind: count for kind, count in sorted(repairs.items()) if count}
    return Conversation(location, None, (Turn("assistant", text),), counts, is_raw_text=True)


def _is_pair(format_name: str, value: dict[str, Any], reading: ReadingSettings) -> bool:
    # as in TRL's standard format: texts, which get no chat template
    if format_name in ("columns", "source-target"):
        return not has_turns(value[reading.columns[0][0]])
    turns = (value.get(key) for key in ("conversations", "messages", "prompt", "completion", "chosen", "history"))
    return not any(isinstance(item, list | dict) and item for item in turns)


def _merge_turns(
    entries: RecordTurns, reading: ReadingSettings, repairs: Counter[str]
) -> tuple[str | None, list[tuple[Role, list[str], set[bool]]]]:
    """Clean the turns, and make human and assistant turns alternate; the first is human, the last an assistant's.

    Return the system message, and (role, texts, whether each text is learned) of each merged turn.
    """
    system: str | None = None
    system_place: str | None = None
    turns: list[tuple[Role, list[str], set[bool]]] = []
    for entry in entries:
        speaker, place = entry.speaker, entry.place
        text = _repair_text(entry, reading, repairs)
        if speaker == "system":
            if system_place is not None:
                problem = f"{place}: a second system message; the first is {system_place}"
                raise RejectionError("misplaced_system", problem)
            if turns:
                raise RejectionError("misplaced_system", f"{place}: a system turn that is not the first turn")
            system, system_place = text, place
        elif speaker == "assistant" and not turns:
            repairs["leading_assistant_turns"] += 1
        elif turns and turns[-1][0] == speaker:
            if not reading.merge_same_role:
                raise RejectionError("same_role_twice", f"{place}: two {speaker} turns in a row")
            turns[-1][1].append(text)
            turns[-1][2].add(entry.learned)
            repairs["merged_same_role_turns"] += 1
        else:
            turns.append((speaker, [text], {entry.learned}))
    if turns and turns[-1][0] == "human":
        repairs["trailing_human_turns"] += 1
        turns.pop()
    return system, turns


def _repair_text(turn: RecordTurn, reading: ReadingSettings, repairs: Counter[str]) -> str:
    # only the text itself is cleaned: HTML is recognized by its first tag
    prefix, said, calls = (normalize_text(text, repairs) for text in (turn.prefix, turn.text, turn.calls))
    if reading.clean:
        said = clean(said, repairs)
    return prefix + "\n".join(filter(None, (said, calls)))


def _detect_format(value: dict[str, Any], reading: ReadingSettings) -> tuple[str, "Parser"]:
    if reading.source_column or reading.target_column or reading.rejected_column:
        return "columns", partial(_parse_pair, *reading.columns)
    formats = _FORMATS if reading.data_format == "auto" else {reading.data_format: _FORMATS[reading.data_format]}
    # merged files of several formats have every format's keys in each record, null where the record has no value
    present = {key for key, item in value.items() if item is not None}
    for given in (present, value.keys()):
        for name, (alternatives, parser) in formats.items():
            if any(keys <= given for keys in alternatives):
                return name, parser
    found = list_keys(value)
    if unwrapping := suggest_unwrapping(value):
        raise RejectionError("unknown_format", f"its keys are {found}{unwrapping}")
    if set(value) - COMMON_KEYS == {"text"}:
        raise RejectionError("unknown_format", f"its keys are {found}; for raw text, use --objective span-corruption")
    texts = [shlex.quote(key) for key, item in value.items() if isinstance(item, str) and key not in COMMON_KEYS]
    wanted = [" + ".join(sorted(alternatives[0])) for alternatives, _ in formats.values()]
    advice = f"expected {', or '.join(wanted)}"
    if len(texts) == 2:
        advice = f"add --source-column {texts[0]} --target-column {texts[1]}, or swap the names"
    elif len(texts) > 2:
        advice += "; or name two columns with --source-column and --target-column"
    raise RejectionError("unknown_format", f"{f'its keys are {found}' if found else 'it has no keys'}; {advice}")


def list_keys(value: Iterable[str]) -> str:
    """List keys for a message."""
    # a key with a comma, or a space at an end, is quoted
    return join_first([repr(key) if "," in key or key != key.strip() else key for key in value])


def suggest_key(name: str, keys: Iterable[str]) -> str:
    """Suggest the key that is spelled like a missing one; empty if there isn't one."""
    # quoted as for a shell
    close = find_close_name(name, keys)
    return f"; did you mean {shlex.quote(close)}?" if close else ""


Parser = Callable[[dict[str, Any], ReadingSettings, Counter[str]], ParsedTurns]


def _parse_messages(key: str, value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]) -> ParsedTurns:
    """Parse ShareGPT's `conversations` (from, value), OpenAI's `messages` (role, content), or a mixture."""
    entries = parse_turns(key, value[key], repairs)
    if reading.kind == "pairs":  # a record may have the chosen answer in its turns, too
        while entries and entries[-1].speaker == "assistant":
            entries.pop()
            repairs["last_answers_replaced_by_chosen"] += 1
    if value.get("chosen") is None or (entries and entries[-1].speaker == "assistant"):
        return {key}, entries
    return _parse_chosen({key}, entries, value, repairs)


def _parse_chosen(
    prompt_keys: set[str], question: RecordTurns, value: dict[str, Any], repairs: Counter[str]
) -> ParsedTurns:
    """Parse the preferred answer of a preference pair; it may be a list of turns that includes the question."""
    chosen = value["chosen"]
    if isinstance(chosen, str):
        if not question:
            advice = "set source_column to the prompt's key, and target_column to chosen"
            raise RejectionError("no_answer", f"chosen: a string without a prompt; {advice}")
        return prompt_keys | {"chosen"}, [*question, RecordTurn("assistant", chosen, "chosen")]
    answer = parse_turns("chosen", chosen if isinstance(chosen, list) else [chosen], repairs)
    if not any(entry.speaker == "human" for entry in answer):
        return prompt_keys | {"chosen"}, question + answer
    # if the list contains the question, the record's question was used, too
    asked, answered = ({turn._replace(place="") for turn in turns} for turns in (question, answer))
    return {"chosen"} | (prompt_keys if asked <= answered else set()), answer


def _parse_alpaca(value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]) -> ParsedTurns:
    """Parse `instruction`, `input`, `output` (or `chosen`), and earlier pairs in `history`."""
    question = parse_text("instruction", value["instruction"])
    if value.get("input") not in EMPTY_VALUES:
        question += "\n" + parse_text("input", value["input"])
    history = value.get("history") or []
    if not isinstance(history, list):
        raise RejectionError("bad_turn", f"history: expected a list of pairs, found {name_json_type(history)}")
    entries: RecordTurns = []
    for index, pair in enumerate(history):
        place = f"history {index}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RejectionError("bad_turn", f"{place}: expected a pair [question, answer]")
        entries += (parse_text_turn("human", place, pair[0]), parse_text_turn("assistant", place, pair[1]))
    entries.append(RecordTurn("human", question, "instruction"))
    prompt_keys = {"instruction", "input", "history"}
    if value.get("output") is None and value.get("chosen") is not None:
        return _parse_chosen(prompt_keys, entries, value, repairs)
    return prompt_keys | {"output"}, [*entries, parse_text_turn("assistant", "output", value.get("output"))]


def _parse_prompt_completion(value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]) -> ParsedTurns:
    """Parse `prompt` and `completion` (or `chosen`), each a string or a list of messages.

    A `chosen` that is a whole conversation needs no prompt.
    """
    question = _parse_text_or_turns("prompt", value, "human", repairs) if value.get("prompt") is not None else []
    if value.get("completion") is not None or "chosen" not in value:
        return {"prompt", "completion"}, question + _parse_text_or_turns("completion", value, "assistant", repairs)
    return _parse_chosen({"prompt"}, question, value, repairs)


def _parse_text_or_turns(key: str, value: dict[str, Any], role: Role, repairs: Counter[str]) -> RecordTurns:
    given = value[key]
    return parse_turns(key, given, repairs) if isinstance(given, list) else [parse_text_turn(role, key, given)]


def _parse_pair(
    sources: list[str], targets: list[str], value: dict[str, Any], reading: ReadingSettings, repairs: Counter[str]
) -> ParsedTurns:
    """Parse the columns of the source and of the target. The source may be a list of turns."""
    used = {*sources, *targets}
    if missing := [name for name in (*sources, *targets) if name not in value]:
        key = suggest_key(missing[0], value.keys() - used)
        key = "; put its name in quotes" if " ".join(missing) in value else key
        if (parts := [part.strip() for part in missing[0].split(",")])[1:] and set(parts) <= value.keys():
            flag = "--source-column" if missing[0] in sources else "--target-column"
            key = f"; for several columns, use {flag} {shlex.join(parts)}"
        advice = suggest_unwrapping(value) or key
        if not advice and missing[0] in sources and reading.source_column is None:
            advice = "; name the source column with --source-column"
        problem = f"no column {', '.join(missing)}; the record has {list_keys(value)}{advice}"
        raise RejectionError("unknown_format", problem, suggests_key=bool(key))
    answer = _join_columns("assistant", targets, value)
    if len(sources) == 1 and has_turns(value[sources[0]]):
        if reading.source_prefix:
            raise RejectionError("not_text", f"{sources[0]}: a list of turns, but source_prefix needs a text")
        return used, [*parse_turns(sources[0], value[sources[0]], repairs), answer]
    question = _join_columns("human", sources, value)
    return used, [question._replace(prefix=reading.source_prefix), answer]


def _join_columns(role: Role, names: list[str], value: dict[str, Any]) -> RecordTurn:
    """Make a turn of a column, or of the lines of several, leaving out those without a text."""
    texts = [parse_text(name, value[name]) for name in names if len(names) == 1 or value[name] not in EMPTY_VALUES]
    return RecordTurn(role, "\n".join(text for text in texts if text.strip()), ", ".join(names))


def list_read_keys(reading: ReadingSettings) -> set[str]:
    """List the keys that are used if a record has them: the named columns, or else the keys of all formats."""
    sources, targets = reading.columns
    used = {*sources, *targets, reading.rejected_column or "rejected", "system", *LABEL_KEYS}
    if reading.source_column or reading.target_column or reading.rejected_column:
        return used
    return used.union({"input", "history", "text"}, *chain.from_iterable(keys for keys, _ in _FORMATS.values()))


# alternative sets of keys of a record, and its parser
_FORMATS: dict[str, tuple[list[set[str]], Parser]] = {
    "sharegpt": ([{"conversations"}], partial(_parse_messages, "conversations")),
    "openai": ([{"messages"}], partial(_parse_messages, "messages")),
    "alpaca": ([{"instruction", "output"}, {"instruction", "chosen"}], _parse_alpaca),
    "prompt-completion": (
        [{"prompt", "completion"}, {"prompt", "chosen"}, {"chosen", "rejected"}],
        _parse_prompt_completion,
    ),
    "source-target": ([{"source", "target"}], partial(_parse_pair, ["source"], ["target"])),
}
