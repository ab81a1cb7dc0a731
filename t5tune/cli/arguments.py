"""Parse the arguments of a command into values and problems.

    parse_arguments(["--lora_r=8", "--bf16", "--lora-target-modules", "q", "v", "seed=1"], TrainSettings).values
    -> {"lora_r": "8", "bf16": "true", "lora_target_modules": ["q", "v"], "seed": "1"}

Values stay text. Only pydantic reads them, whether they come from a flag, a file or the environment, so that all
problems are reported at once.
"""

import re
import shlex
import types
import typing
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from t5tune.errors import find_close_name
from t5tune.file_names import CONFIG_FILE, JSON_SUFFIXES, TABLE_SUFFIXES
from t5tune.settings import Settings, packaged_templates
from t5tune.settings.dataset_list import PATHS_OF_DATASETS
from t5tune.settings.fastchat_names import LEGACY_NAMES
from t5tune.settings.other_names import find_meant_setting, suggest_setting

SWITCHES = ("json", "quiet", "debug")
BOOLEAN_WORDS = {"true", "t", "1", "yes", "y", "on", "false", "f", "0", "no", "n", "off"}
PAIR_PATTERN = re.compile(r"([A-Za-z][\w.-]*)=(.*)", re.DOTALL)  # lora_r=16, as torchtune and Hydra write it


@dataclass(frozen=True)
class ParsedArguments:
    """The arguments of a command.

    Attributes:
        values: the name of a setting, or a legacy name -> its text, or list of texts.
        meant: settings that aren't in `values`, but that a problem suggests, so that they aren't missing too.
    """

    values: dict[str, Any]
    problems: list[str]
    meant: set[str]
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
            parser.forget_flag()
            while parser.words:
                parser.add_argument(parser.words.popleft())
        elif _is_flag(word):
            parser.add_flag(word)
        elif pair := PAIR_PATTERN.fullmatch(word):
            parser.forget_flag()
            parser.add_pair(*pair.groups())
        else:
            parser.add_argument(word)
    parser.apply_arguments()
    config = parser.values.pop("config", None)
    switches = {name: name in parser.switches for name in SWITCHES}
    return ParsedArguments(parser.values, parser.problems, parser.meant, config, **switches)


class _Parser:
    """The words that are still to be parsed, and what the others have given."""

    def __init__(self, model: type[Settings], arguments: list[str]) -> None:
        self.words = deque(arguments)
        self.values: dict[str, Any] = {}
        self.switches: set[str] = set()
        self.problems: list[str] = []
        self.meant: set[str] = set()
        self._arguments: dict[str, str | list[str]] = {}  # setting -> the words without a flag that fill it
        self._flag_before: tuple[str, str] | None = None  # the flag right before the next word, and its only value
        self._fields = model.model_fields
        fields = select_flag_fields(model)
        positional = [name for name, field in fields.items() if has_extra(field, "positional")]
        self._lists = {name for name in positional if classify_field(fields[name]) == "many"}
        self._has_positional = bool(positional)
        self._unfilled = deque(positional or filter(None, [model.also_positional]))
        kinds = {name: classify_field(field) for name, field in fields.items() if name not in positional}
        # a config may serve several commands; command lines with these names are those of training
        legacy = dict.fromkeys(LEGACY_NAMES, "legacy") if model.command == "train" else {}
        self._suggestions = [name for name in model.list_suggestions() if name in kinds] + ["config", *SWITCHES]
        self._kinds = {**legacy, **kinds, "config": "one", **dict.fromkeys(SWITCHES, "switch")}

    def add_argument(self, word: str) -> None:
        takes_config = bool(self._unfilled) and self._unfilled[0] == "config"
        if "data_path" in self._kinds and self._is_data(word):
            self.problems.append(f"{word}: unexpected argument; did you mean --data-path {word}?")
            self.meant.add("data_path")
        elif takes_config and _is_model(word):
            self.problems.append(f"{word}: unexpected argument; did you mean --model-name-or-path {word}?")
            self.meant.add("model_name_or_path")
        elif self._flag_before is not None and not (_is_config(word) if takes_config else self._unfilled):
            flag, value = self._flag_before
            whole = " ".join([value, word, *self._take_values()])
            in_quotes = f"put a value with spaces in quotes: {flag} {shlex.quote(whole)}"
            self.problems.append(f"{word}: unexpected argument after {flag} {value}; {in_quotes}")
        elif self._unfilled and self._unfilled[0] in self._lists:
            self._arguments.setdefault(self._unfilled[0], []).append(word)  # type: ignore[union-attr]
        elif self._unfilled:
            self._arguments[self._unfilled.popleft()] = word
        elif self._arguments:
            *_, (name, taken) = self._arguments.items()
            advice = "; a message follows --prompt, in quotes" if "prompt" in self._kinds else ""
            self.problems.append(f"{word or repr(word)}: unexpected argument; {taken} is the {name} already{advice}")
        else:
            self.problems.append(f"{word or repr(word)}: unexpected argument, with no flag before it")

    def add_pair(self, name: str, value: str) -> None:
        setting = name.replace("-", "_")
        if setting in self._kinds:
            self.add_flag(f"--{setting}={value}")
        elif self._lists:  # base=google/flan-t5-base, a model with a name
            self.add_argument(f"{name}={value}")
        elif setting in self._unfilled:
            self._unfilled.remove(setting)
            self._arguments[setting] = value
        else:
            known = [*self._suggestions, *self._unfilled]
            advice = self._advise_on_yaml(setting, str) or suggest_setting(name, known)
            self.problems.append(f"{name}: unknown setting{advice}")
            self._add_meant(name, known)

    def forget_flag(self) -> None:
        """Forget which flag was before: the next word isn't part of its value."""
        self._flag_before = None

    def _advise_on_yaml(self, name: str, write: Callable[[str], str]) -> str:
        """Say what to do instead of a flag for a setting that has none; an empty text if it isn't such a setting."""
        if name not in self._fields or not has_extra(self._fields[name], "yaml_only"):
            return ""
        if (paths := PATHS_OF_DATASETS.get(name)) is None:
            return "; set it in a --config file"
        self.meant.add(paths)
        return f"; did you mean {write(paths)}?"

    def _add_meant(self, name: str, known: list[str]) -> str | None:
        if (meant := find_meant_setting(name, known)) is not None:
            self.meant.add(meant)
        return meant

    def _is_data(self, word: str) -> bool:
        """Whether a word without a flag is a file with data, which isn't what such a word fills."""
        if (self._unfilled and self._unfilled[0] == "config" and word.endswith(".json")) or Path(word).is_dir():
            return False  # a .json file may be a config
        return any(word.lower().endswith((end, f"{end}.gz", f"{end}.zst")) for end in JSON_SUFFIXES | TABLE_SUFFIXES)

    def apply_arguments(self) -> None:
        """Fill the settings of the words without a flag. One that a flag has filled too becomes a problem."""
        for name, word in self._arguments.items():
            if name in self.values:
                given = self.values[name]
                by_flag = f"{_format_flag(name)} {' '.join(given) if isinstance(given, list) else given}"
                self.problems.append(f"{name}: given twice, as {word} and as {by_flag}; remove one of them")
            else:
                self.values[name] = word

    def add_flag(self, word: str) -> None:
        flag, equals, attached = word.partition("=")
        given = [attached] if equals else []
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        self.forget_flag()
        match self._kinds.get(name):
            case "switch":
                self.switches.add(name)
                if equals:
                    self.problems.append(f"{word}: {flag} takes no value")
            case "bool":
                self.values[name] = (given or self._take_values(1 if self._is_bool_next() else 0) or ["true"])[0]
            case "legacy":
                self.values[name] = " ".join(given or self._take_values()) or "true"
            case "one" | "many" as kind:
                values = given or self._take_values(1 if kind == "one" else None)
                if not values:
                    self.problems.append(f"{flag}: expected a value after it")
                elif kind == "one":
                    if name == "config" and self.values.get(name, values[0]) != values[0]:
                        twice = f"given twice, as {self.values[name]} and as {values[0]}"  # only one would be read
                        self.problems.append(f"config: {twice}; put the settings of both into one file")
                    self.values[name] = values[0]
                    self._flag_before = None if equals else (flag, values[0])
                else:
                    self.values.setdefault(name, []).extend(values)
            case _ if not equals and self._kinds.get(name.removeprefix("no_")) == "bool":
                self.values[name.removeprefix("no_")] = "false"
            case _:
                advice = self._advise_on_yaml(name, _format_flag)
                advice = advice or suggest_setting(flag.lstrip("-"), self._suggestions, write=_format_flag)
                self.problems.append(f"{flag}: unknown flag{advice}")
                meant = self._add_meant(flag.lstrip("-"), self._suggestions)
                if not equals and (not self._has_positional or self._kinds.get(meant or "") in ("one", "many")):
                    self._take_values(1)  # its value, which would otherwise be reported as a second problem

    def _take_values(self, limit: int | None = None) -> list[str]:
        """Take the words before the next flag or, after the first, the next `lora_r=16`; at most `limit` of them."""
        values: list[str] = []
        while self.words and len(values) != limit and not _is_flag(self.words[0]):
            if values and self._is_pair(self.words[0]):
                break
            values.append(self.words.popleft())
        return values

    def _is_bool_next(self) -> bool:
        """Whether the next word is the value of a BOOL flag, perhaps mistyped, not a word of its own."""
        word = self.words[0] if self.words else ""
        is_mistyped = find_close_name(word.lower(), ("true", "false")) is not None or _is_number(word)
        return word.lower() in BOOLEAN_WORDS or (is_mistyped and not Path(word).exists())

    def _is_pair(self, word: str) -> bool:
        """Whether the word is a known setting with its value, not a path or a token that contains `=`."""
        pair = PAIR_PATTERN.fullmatch(word)
        return pair is not None and pair[1].replace("-", "_") in self._kinds


def _format_flag(name: str, value: str | None = None) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value in (None, "true") else f"{flag} {value}"


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _is_number(word)  # - is standard input


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_config(word: str) -> bool:
    """Whether a word may be meant as a run config: a file, or a template, perhaps mistyped."""
    known = packaged_templates.list_names("runs")
    is_file = word.endswith((".yaml", ".yml", ".json")) or Path(word).exists()
    return is_file or word in known or find_close_name(word, known) is not None


def _is_model(word: str) -> bool:
    """Whether a word that may be a run config is meant as a model: `owner/name`, or a folder."""
    if Path(word).exists():
        return Path(word, CONFIG_FILE).is_file()
    return "/" in word and not _is_config(word)


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
