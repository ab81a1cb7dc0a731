r"""Conversation templates: render a conversation as pieces of text for the model to read and write.

With fastchat-t5, the human turn "Hi" and the assistant turn "Hello." become

    A chat between … questions.\n\n### Human: Hi\n### Assistant: |Hello.\n

where | separates the source from the target. The source of a later target contains all of this text.

A special token that a template spells out, such as `<end_of_turn>`, becomes that token. In the text of a record it
stays text, so each piece knows which of its characters are from the record.
"""

from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from t5tune.data.reading.formats import Conversation
from t5tune.errors import SettingsError, suggest_name
from t5tune.io.atomic import hash_json
from t5tune.io.yaml_file import read_yaml
from t5tune.settings.packaged_templates import find_template_file

DEFAULT_TEMPLATE = "fastchat-t5"
PAIR_TEMPLATE = "plain"  # the default for pairs of a source and a target


@dataclass(frozen=True)
class Template:
    """A conversation template. `{text}` in a pattern is replaced with the text of the turn.

    Args:
        system_message: used if a record has no system message; empty: no system line in that case.
        system, human, assistant: patterns of the system line and of the turns. A leading space in `assistant` separates
            source and target and belongs to neither.
        assistant_prefix: the end of the source; if it ends with a space, the target begins after that space.
        turn_separator: text before each human turn but the first.
    """

    system_message: str
    system: str
    human: str
    assistant_prefix: str
    assistant: str
    turn_separator: str = ""

    @property
    def hash(self) -> str:
        """SHA-256 of the template, which the cache's manifest contains."""
        return hash_json(asdict(self))

    @property
    def answer_suffix(self) -> str:
        """The text that the template appends to an assistant turn."""
        return self.assistant.partition("{text}")[2]


@dataclass(frozen=True)
class Piece:
    """A piece of a rendered conversation.

    Args:
        kind: system, human, prefix (the end of a source), gap (a space between source and target that belongs to
            neither), answer (a target), context (an assistant turn that isn't learned), or text (raw text).
        turn: index of the turn; -1 for the system line.
        message: the bounds of the record's text within `text`.
    """

    text: str
    kind: str
    turn: int
    message: tuple[int, int] = (0, 0)

    def prepend(self, text: str) -> "Piece":
        """Return the piece with the template's text before it."""
        start, end = self.message
        return replace(self, text=text + self.text, message=(start + len(text), end + len(text)))


def find_template(name_or_path: str | None, saved: list[Path], datasets: Iterable[str] = ()) -> Template | None:
    """Load the given conversation template, otherwise the first of the `saved` files that exists; None: none exists.

    Args:
        datasets: other valid names, for the error.
    """
    if name_or_path is not None:
        return load_template(name_or_path, datasets)
    return next((parse_template(read_yaml(file), file) for file in saved if file.is_file()), None)


def load_template(name_or_path: str, datasets: Iterable[str] = ()) -> Template:
    """Load a conversation template by name or from a YAML file; SettingsError: it doesn't exist or isn't valid."""
    path = find_template_file("conversation_template", name_or_path, datasets)
    return parse_template(read_yaml(path), path)


def parse_template(values: dict[str, Any], path: Path) -> Template:
    """Build a Template from the values of a YAML file, and validate it; `path` is for error messages."""
    known = {field.name: field.default is MISSING for field in fields(Template)}
    problems = [f"{name}: unknown field{suggest_name(name, known)}" for name in values if name not in known]
    problems += [f"{name}: missing" for name, is_needed in known.items() if is_needed and name not in values]
    problems += [
        f"{name}: expected text, found {value!r}"
        for name, value in values.items()
        if name in known and not isinstance(value, str)
    ]
    if problems := problems or _find_pattern_problems(Template(**values)):
        raise SettingsError(*(f"conversation_template: {path}: {problem}" for problem in problems))
    return Template(**values)


def _find_pattern_problems(template: Template) -> list[str]:
    """Require one {text} in each pattern, and whitespace between two pieces: a token must not span both."""
    patterns = {"system": template.system, "human": template.human, "assistant": template.assistant}
    problems = [
        f"{name}: expected exactly one {{text}}, found {pattern!r}"
        for name, pattern in patterns.items()
        if pattern.count("{text}") != 1
    ]
    boundaries = {
        "system, human": (template.system, template.human),
        "human, assistant_prefix": (template.human, template.assistant_prefix or template.assistant),
        "assistant_prefix, assistant": (template.assistant_prefix or template.human, template.assistant),
        "assistant, human": (template.assistant, template.turn_separator + template.human),
    }
    advice = "no whitespace between them; end the first or begin the second with a space or a newline"
    return problems + [
        f"{names}: {advice}"
        for names, (first, second) in boundaries.items()
        if not (first[-1:].isspace() or second[:1].isspace())
    ]


def render_conversation(conversation: Conversation, template: Template) -> list[Piece]:
    """Render a conversation as pieces, whose concatenated texts are the whole text. Raw text has no template."""
    if conversation.is_raw_text:
        (turn,) = conversation.turns
        return [Piece(turn.text, "text", 0, (0, len(turn.text)))]
    pieces = []
    if conversation.system is None and template.system_message:
        pieces.append(Piece(template.system.replace("{text}", template.system_message), "system", -1))
    elif conversation.system:
        pieces.append(_fill_in(template.system, conversation.system, "system", -1))
    for index, turn in enumerate(conversation.turns):
        if turn.role == "human":
            piece = _fill_in(template.human, turn.text, "human", index)
            pieces.append(piece.prepend(template.turn_separator) if index else piece)
        else:
            pieces += render_answer_prefix(template, index)
            kind = "answer" if turn.learned else "context"
            pieces.append(_fill_in(template.assistant.removeprefix(" "), turn.text, kind, index))
    return pieces


def _fill_in(pattern: str, text: str, kind: str, turn: int) -> Piece:
    start = pattern.index("{text}")
    return Piece(pattern.replace("{text}", text), kind, turn, (start, start + len(text)))


def render_answer_prefix(template: Template, turn: int) -> list[Piece]:
    """Render the text between a human turn and the assistant's text."""
    prefix = [Piece(template.assistant_prefix, "prefix", turn)] if template.assistant_prefix else []
    gap = [Piece(" ", "gap", turn)] if template.assistant.startswith(" ") else []
    return prefix + gap
