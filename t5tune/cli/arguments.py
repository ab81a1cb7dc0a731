"""Parse the arguments of a command into values and problems.

    parse_arguments(["--lora_r=8", "--bf16", "--lora-target-modules", "q", "v"], TrainSettings).values
    -> {"lora_r": "8", "bf16": "true", "lora_target_modules": ["q", "v"]}

Values stay text. Only pydantic reads them, whether they come from a flag, a file or the environment, so that all
problems are reported at once.
"""

import types
import typing
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from t5tune.errors import suggest_name
from t5tune.settings import Settings
from t5tune.settings.legacy_names import LEGACY_NAMES

SWITCHES = ("json", "quiet", "debug")
BOOLEAN_WORDS = {"true", "1", "yes", "on", "false", "0", "no", "off"}


@dataclass(frozen=True)
class ParsedArguments:
    """The arguments of a command. `values`: the name of a setting, or a legacy name -> its text, or list of texts."""

    values: dict[str, Any]
    problems: list[str]
    config: str | None
    json: bool
    quiet: bool
    debug: bool


def parse_arguments(arguments: list[str], model: type[Settings]) -> ParsedArguments:
    """Parse the arguments that follow the name of a command.

    Unknown flags, missing values and unexpected arguments become problems.
    """
    parser = _Parser(model, arguments)
    while parser.words:
        word = parser.words.popleft()
        if word == "--":
            while parser.words:
                parser.add_argument(parser.words.popleft())
        elif _is_flag(word):
            parser.add_flag(word)
        else:
            parser.add_argument(word)
    config = parser.values.pop("config", None)
    return ParsedArguments(parser.values, parser.problems, config, **{s: s in parser.switches for s in SWITCHES})


class _Parser:
    """The words that are still to be parsed, and what the others have given."""

    def __init__(self, model: type[Settings], arguments: list[str]) -> None:
        self.words = deque(arguments)
        self.values: dict[str, Any] = {}
        self.switches: set[str] = set()
        self.problems: list[str] = []
        fields = select_flag_fields(model)
        positional = [name for name, field in fields.items() if has_extra(field, "positional")]
        self._has_positional = bool(positional)
        self._unfilled = deque(positional)
        kinds = {name: classify_field(field) for name, field in fields.items() if name not in positional}
        legacy = dict.fromkeys(LEGACY_NAMES.get(model.command, {}), "legacy")
        self._suggestions = [f"--{name.replace('_', '-')}" for name in {**kinds, **legacy}]
        self._kinds = {**legacy, **kinds, "config": "one", **dict.fromkeys(SWITCHES, "switch")}

    def add_argument(self, word: str) -> None:
        if self._unfilled:
            self.values[self._unfilled.popleft()] = word
        else:
            self.problems.append(f"{word or repr(word)}: unexpected argument")

    def add_flag(self, word: str) -> None:
        flag, equals, attached = word.partition("=")
        given = [attached] if equals else []
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        match self._kinds.get(name):
            case "switch":
                self.switches.add(name)
                if equals:
                    self.problems.append(f"{word}: {flag} takes no value")
            case "bool":
                # where there are positional arguments, a word after a BOOL flag may be one of them
                is_value = not self._has_positional or (self.words and self.words[0].lower() in BOOLEAN_WORDS)
                self.values[name] = (given or self._take_values(1 if is_value else 0) or ["true"])[0]
            case "legacy":
                self.values[name] = " ".join(given or self._take_values()) or "true"
            case "one" | "many" as kind:
                values = given or self._take_values(1 if kind == "one" else None)
                if not values:
                    self.problems.append(f"{flag}: expected a value after it")
                elif kind == "one":
                    self.values[name] = values[0]
                else:
                    self.values.setdefault(name, []).extend(values)
            case _ if not equals and self._kinds.get(name.removeprefix("no_")) == "bool":
                self.values[name.removeprefix("no_")] = "false"
            case _:
                self.problems.append(f"{flag}: unknown flag{suggest_name(flag.replace('_', '-'), self._suggestions)}")
                if not equals and not self._has_positional:
                    self._take_values(1)  # its value, which would otherwise be reported as a second problem

    def _take_values(self, limit: int | None = None) -> list[str]:
        """Take the words before the next flag, at most `limit` of them."""
        values: list[str] = []
        while self.words and len(values) != limit and not _is_flag(self.words[0]):
            values.append(self.words.popleft())
        return values


def _is_flag(word: str) -> bool:
    if not word.startswith("-") or word == "-":  # - is standard input
        return False
    try:
        float(word)  # a negative number
    except ValueError:
        return True
    return False


def select_flag_fields(model: type[Settings]) -> dict[str, FieldInfo]:
    """Select the fields that can be given on the command line, in the order of the help: base model first."""
    return {name: field for name, field in model.model_fields.items() if not has_extra(field, "yaml_only")}


def has_extra(field: FieldInfo, key: str) -> bool:
    """Whether the field is declared with this metadata, such as `positional`."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(key))


def unwrap_type(field: FieldInfo) -> Any:
    """Return the type of a field without Annotated and None: `int`, `list[str]`, `Literal[...]`, …"""
    annotation: Any = field.annotation
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        elif typing.get_origin(annotation) in {typing.Union, types.UnionType}:
            annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
        else:
            return annotation


def classify_field(field: FieldInfo) -> Literal["bool", "many", "one"]:
    """Return whether a flag takes an optional true or false, many values, or one."""
    plain = unwrap_type(field)
    if plain is bool:
        return "bool"
    return "many" if typing.get_origin(plain) is list else "one"
