r"""A conversation and a layout -> the pieces of text that the model reads and writes.

With fastchat-t5, a human "Hi" and an assistant "Hello." become

    A chat between … questions.\n\n### Human: Hi\n### Assistant: |Hello.\n

where | parts the source from the target of this answer. The source of a later answer holds all of it.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from t5tune.data.formats import Conversation
from t5tune.errors import SettingsError, suggestion
from t5tune.io.yaml_file import read_yaml
from t5tune.progress import Note, Report, silent
from t5tune.settings.packaged_templates import find_conversation_template

DEFAULT = "fastchat-t5"


@dataclass(frozen=True)
class Template:
    """A layout. `{text}` in a pattern is replaced by what was said.

    Args:
        system_message: stands where a record brings none; empty: no system line then.
        system, human, assistant: patterns of a system line and of the turns.
        assistant_prefix: what the source ends with; where it ends in a space, the target begins behind it.
        turn_separator: stands before each human turn but the first.
    """

    system_message: str
    system: str
    human: str
    assistant_prefix: str
    assistant: str
    turn_separator: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of the layout, which the cache's manifest keeps."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def prefix(self, system: str | None) -> str:
        """The system line, or nothing."""
        message = self.system_message if system is None else system
        return self.system.replace("{text}", message) if message else ""

    def question(self, text: str, first: bool) -> str:
        """A human turn."""
        return ("" if first else self.turn_separator) + self.human.replace("{text}", text)

    @property
    def answer_end(self) -> str:
        """What the layout puts behind an answer."""
        return self.assistant.partition("{text}")[2]

    def answer(self, text: str) -> str:
        """An assistant turn behind its prefix, as the model is to write it."""
        return self.assistant.removeprefix(" ").replace("{text}", text)


@dataclass(frozen=True)
class Piece:
    """A run of text of a turn, counted from 0 (-1: the system line).

    `kind` is system, human, prefix (what a source ends with), gap (a space between a source and its answer
    that belongs to neither), answer, or context (an answer that is only read, as a part of later sources).
    """

    text: str
    kind: str
    turn: int


def find_template(name_or_path: str | None, saved: list[Path], report: Report = silent) -> Template:
    """The layout that is asked for, else the first of the `saved` files that exists, else FastChat's for T5."""
    if name_or_path is not None:
        return load_template(name_or_path)
    for file in saved:
        if file.is_file():
            return template_from(read_yaml(file), file)
    report(Note(f"the model brings no conversation template; using {DEFAULT}"))
    return load_template(DEFAULT)


def load_template(name_or_path: str) -> Template:
    """Read a layout by name or from a YAML file.

    Raises:
        SettingsError: no such layout, a field missing or unknown, or a pattern without {text}.
    """
    path = find_conversation_template(name_or_path)
    return template_from(read_yaml(path), path)


def template_from(values: dict[str, Any], place: Path) -> Template:
    """The layout that the values describe; `place` is the file that an error names."""
    known = {field.name: field.default is MISSING for field in fields(Template)}
    problems = [f"{name}: unknown field{suggestion(name, known)}" for name in values if name not in known]
    problems += [f"{name}: missing" for name, is_needed in known.items() if is_needed and name not in values]
    if problems:
        raise SettingsError(*(f"conversation_template: {place}: {problem}" for problem in problems))
    template = Template(**values)
    for name, value in asdict(template).items():
        if not isinstance(value, str):
            raise SettingsError(f"conversation_template: {place}: {name}: expected text, found {value!r}")
        if name in {"system", "human", "assistant"} and value.count("{text}") != 1:
            raise SettingsError(f"conversation_template: {place}: {name}: expected one {{text}} in {value!r}")
    _check_joints(template, place)
    return template


def _check_joints(template: Template, place: Path) -> None:
    """Where two pieces meet there must be white space, or the tokenizer may join their words to one token."""
    prefix = template.assistant_prefix or template.assistant
    joints = {
        "system, human": (template.system, template.human),
        "human, assistant_prefix": (template.human, prefix),
        "assistant_prefix, assistant": (template.assistant_prefix or template.human, template.assistant),
        "assistant, human": (template.assistant, template.turn_separator + template.human),
    }
    for names, (first, second) in joints.items():
        if not (first[-1:].isspace() or second[:1].isspace()):
            raise SettingsError(
                f"conversation_template: {place}: {names}: no white space where they meet; end the first or "
                "begin the second with a space or a newline"
            )


def lay_out(conversation: Conversation, template: Template) -> list[Piece]:
    """The pieces of a conversation; joined, their texts are the whole of it."""
    pieces = []
    if prefix := template.prefix(conversation.system):
        pieces.append(Piece(prefix, "system", -1))
    for index, turn in enumerate(conversation.turns):
        if turn.role == "human":
            pieces.append(Piece(template.question(turn.text, first=index == 0), "human", index))
        else:
            pieces += question_end(template, index)
            pieces.append(Piece(template.answer(turn.text), "answer" if turn.learned else "context", index))
    return pieces


def question_end(template: Template, turn: int) -> list[Piece]:
    """What stands between a human turn and the answer."""
    prefix = [Piece(template.assistant_prefix, "prefix", turn)] if template.assistant_prefix else []
    gap = [Piece(" ", "gap", turn)] if template.assistant.startswith(" ") else []
    return prefix + gap
