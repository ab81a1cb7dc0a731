"""A Typer command whose options are settings, in any spelling that users type.

    t5tune train run.yaml --lora_r 8 --bf16 --lora-target-modules q v seed=1
    -> --config=run.yaml --lora-r=8 --bf16=true --lora-target-modules=q --lora-target-modules=v --seed=1

Problems are collected rather than raised, so that they are reported together with wrong values.
"""

import re
import shlex
from collections import deque
from copy import copy
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from t5tune.cli.options import SWITCHES, format_flag, list_arguments, list_rows
from t5tune.cli.summaries import fit_help, format_epilog
from t5tune.errors import find_close_name
from t5tune.file_names import CONFIG_FILE, JSON_SUFFIXES, TABLE_SUFFIXES
from t5tune.settings import Settings
from t5tune.settings.other_names import find_meant_setting, mention_help, suggest_setting
from t5tune.settings.packaged_templates import is_run_config, list_names

BOOLEAN_WORDS = {"true", "t", "1", "yes", "y", "on", "false", "f", "0", "no", "n", "off"}
PAIR_PATTERN = re.compile(r"([A-Za-z][\w.-]*)=(.*)", re.DOTALL)  # lora_r=16, as torchtune and Hydra write it


@dataclass(frozen=True)
class CommandLine:
    values: dict[str, Any]  # the name of a setting, or a legacy name -> its text, or list of texts
    problems: list[str]
    meant: set[str]  # settings that aren't in `values`, but that a problem suggests, so that they aren't missing too
    config: str | None
    json: bool
    quiet: bool
    debug: bool


class SettingsCommand(TyperCommand):
    """A command whose options are the settings of `model`."""

    model: type[Settings]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite the words for Typer's parser, and let it parse them."""
        rewriter = _Rewriter(self.model, self.params, args)
        words, without_place = rewriter.rewrite()
        rest = super().parse_args(ctx, words)
        # the value of a list that isn't given is an empty tuple
        values = {name: value for name, value in ctx.params.items() if value not in (None, ())} | without_place
        switches = {name: bool(values.pop(name, False)) for name in SWITCHES}
        config = values.pop("config", None)
        ctx.obj = CommandLine(values, rewriter.problems, rewriter.meant, config, **switches)
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Put words without a flag first: after a list such as `--data-path a b`, they would be part of it."""
        return [*list_arguments(self.model), "[OPTIONS]"]

    def show_help(self, ctx: Any, everything: bool) -> None:
        """Print the options that most people use, or all of them."""
        page, params = copy(self), list[Any](self.params)
        width = fit_help(padding=0)  # the labels are one column; padding would give eight characters to empty ones
        page.params = list_rows(params, self.model, everything, width)
        num_more = sum(not param.hidden for param in params) - len(page.params)
        page.epilog = format_epilog(self.model.command, everything, num_more, width)
        typer.echo(page.get_help(ctx), nl=False)  # "" if Rich has printed it


class _Rewriter:
    """The words that are still to be rewritten, and the values of the rewritten words."""

    def __init__(self, model: type[Settings], params: list[Any], words: list[str]) -> None:
        self.problems: list[str] = []
        self.meant: set[str] = set()
        self._command = model.command
        self._words = deque(words)
        self._fields = model.model_fields
        self._options = {param.name: param for param in params if isinstance(param, TyperOption)}
        self._arguments = {param.name: param for param in params if isinstance(param, TyperArgument)}
        self._takes_many = any(argument.nargs == -1 for argument in self._arguments.values())
        self._suggestions = [name for name, option in self._options.items() if not option.hidden and "help" not in name]
        self._unfilled = deque(self._arguments or filter(None, [model.also_positional]))
        self._by_flag: dict[str, list[str]] = {}  # option -> its values; none for a switch
        self._by_place: dict[str, list[str]] = {}  # setting -> the words without a flag that fill it
        self._flag_before: tuple[str, str] | None = None  # the flag right before the next word, and its only value

    def rewrite(self) -> tuple[list[str], dict[str, str]]:
        """Return the words as Typer's parser reads them: `--name=value` for each value, then words without a flag.

        Also return the values of arguments that have no place, as in `templates name=pocket`, which has no action.
        """
        while self._words:
            word = self._words.popleft()
            if word == "--":
                self._flag_before = None
                while self._words:
                    self._add_word(self._words.popleft())
            elif _is_flag(word):
                self._add_flag(word)
            elif pair := PAIR_PATTERN.fullmatch(word):
                self._flag_before = None
                self._add_pair(*pair.groups())
            else:
                self._add_word(word)
        places = {name: self._by_place[name] for name in self._arguments if name in self._by_place}
        in_place = list(takewhile(places.__contains__, self._arguments))
        for name, (word, *_) in self._by_place.items():
            if name in self._by_flag:
                by_flag = f"{format_flag(name)} {' '.join(self._by_flag[name])}"
                self.problems.append(f"{name}: given twice, as {word} and as {by_flag}; remove one of them")
            elif name in self._options:
                self._by_flag[name] = [word]
        flags = {format_flag(name): values for name, values in self._by_flag.items()}
        words = [word for flag, values in flags.items() for word in [f"{flag}={value}" for value in values] or [flag]]
        words += ["--", *chain.from_iterable(map(places.__getitem__, in_place))]
        return words, {name: word for name, (word, *_) in places.items() if name not in in_place}

    def _add_word(self, word: str) -> None:
        fills = self._unfilled[0] if self._unfilled else None
        if "data_path" in self._options and _is_data(word, fills):
            self.problems.append(f"{word}: unexpected argument; did you mean --data-path {word}?")
            self.meant.add("data_path")
        elif "config" in {fills, *self._by_place} and _is_model(word) and "model_name_or_path" not in self._by_place:
            self._by_place["model_name_or_path"] = [word]
        elif fills == "config" and (published := _find_published_model(word)) is not None:
            self.problems.append(f"{word}: no file or template of that name; did you mean {published}?")
            self.meant.add("model_name_or_path")
            self._unfilled.popleft()
        elif self._flag_before is not None and not (is_run_config(word) if fills == "config" else fills):
            flag, value = self._flag_before
            whole = " ".join([value, word, *self._take_values()])
            in_quotes = f"put a value with spaces in quotes: {flag} {shlex.quote(whole)}"
            self.problems.append(f"{word}: unexpected argument after {flag} {value}; {in_quotes}")
        elif fills is not None:
            self._by_place.setdefault(fills, []).append(word)
            if not self._takes_many:
                self._unfilled.popleft()
        elif self._by_place:
            *_, (name, (taken, *_)) = self._by_place.items()
            advice = "; pass a message with --prompt, in quotes" if "prompt" in self._options else ""
            self.problems.append(f"{word or repr(word)}: unexpected argument; {taken} is already the {name}{advice}")
        else:
            self.problems.append(f"{word or repr(word)}: unexpected argument, with no flag before it")

    def _add_pair(self, name: str, value: str) -> None:
        setting = name.replace("-", "_")
        if setting in self._options:
            self._add_flag(f"--{setting}={value}")
        elif self._takes_many:  # base=google/flan-t5-base, a model with a name
            self._add_word(f"{name}={value}")
        elif setting in self._unfilled:
            self._unfilled.remove(setting)
            self._by_place[setting] = [value]
        else:
            known = [*self._suggestions, *self._unfilled]
            advice = suggest_setting(name, known) or mention_help(self._command)
            self.problems.append(f"{name}: unknown setting{advice}")
            self.meant.update(filter(None, [find_meant_setting(name, known)]))

    def _add_flag(self, word: str) -> None:
        flag, equals, attached = word.partition("=")
        given = [attached] if equals else []
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        option, positive = self._options.get(name), self._options.get(name.removeprefix("no_"))
        self._flag_before = None
        if option is None and positive is not None and positive.secondary_opts and not equals:
            self._add_values(positive.name, ["false"])
        elif option is None:
            self._refuse_flag(flag, bool(equals))
        elif option.is_flag:
            self._by_flag[name] = []
            if equals:
                self.problems.append(f"{word}: {flag} takes no value")
        elif option.secondary_opts:
            self._add_values(name, given or self._take_values(1 if self._is_bool_next() else 0) or ["true"])
        elif option.hidden and name not in self._fields:  # a flag of FastChat or an older transformers
            self._add_values(name, [" ".join(given or self._take_values()) or "true"])
        elif not (values := given or self._take_values(None if option.multiple else 1)):
            self.problems.append(f"{flag}: expected a value after it")
        else:
            if name == "config" and (before := self._by_flag.get(name, values)[-1]) != values[0]:
                twice = f"given twice, as {before} and as {values[0]}"  # only one would be read
                self.problems.append(f"config: {twice}; put the settings of both into one file")
            self._add_values(name, values)
            self._flag_before = None if equals or option.multiple else (flag, values[0])

    def _add_values(self, name: str, values: list[str]) -> None:
        before = self._by_flag.get(name, []) if self._options[name].multiple else []
        self._by_flag[name] = before + values

    def _refuse_flag(self, flag: str, has_value: bool) -> None:
        word = flag.lstrip("-")
        advice = suggest_setting(word, self._suggestions, write=format_flag) or mention_help(self._command)
        self.problems.append(f"{flag}: unknown flag{advice}")
        meant = self._options.get(find_meant_setting(word, self._suggestions) or "")
        self.meant |= set() if meant is None else {meant.name}
        takes_value = meant is not None and not meant.is_flag and not meant.secondary_opts
        if not has_value and (takes_value or not self._arguments):
            self._take_values(1)  # its value, which would otherwise be reported as a second problem

    def _take_values(self, limit: int | None = None) -> list[str]:
        """Take the words before the next flag or, after the first, the next `lora_r=16`; at most `limit` of them."""
        values: list[str] = []
        while self._words and len(values) != limit and not _is_flag(self._words[0]):
            if values and self._is_pair(self._words[0]):
                break
            values.append(self._words.popleft())
        return values

    def _is_bool_next(self) -> bool:
        """Whether the next word is the value of a flag such as `--bf16`, perhaps mistyped."""
        word = self._words[0] if self._words else ""
        is_mistyped = find_close_name(word.lower(), ("true", "false")) is not None or _is_number(word)
        return word.lower() in BOOLEAN_WORDS or (is_mistyped and not Path(word).exists())

    def _is_pair(self, word: str) -> bool:
        """Whether the word is a setting with its value, not a path or a token that contains `=`."""
        pair = PAIR_PATTERN.fullmatch(word)
        return pair is not None and pair[1].replace("-", "_") in self._options


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _is_number(word)  # - is standard input


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_data(word: str, fills: str | None) -> bool:
    """Whether a word without a flag is a data file, although no setting for data takes such a word."""
    if (fills == "config" and word.endswith(".json")) or Path(word).is_dir():
        return False  # a .json file may be a config
    return any(word.lower().endswith((end, f"{end}.gz", f"{end}.zst")) for end in JSON_SUFFIXES | TABLE_SUFFIXES)


def _is_model(word: str) -> bool:
    """Whether a word that may be a run config is meant as a model: `owner/name`, or a folder."""
    if Path(word).exists():
        return Path(word, CONFIG_FILE).is_file()
    return "/" in word and not is_run_config(word)


def _find_published_model(word: str) -> str | None:
    """Find the model on the Hub, such as google/flan-t5-xl, that is given without its owner."""
    if Path(word).exists() or word in list_names("runs"):
        return None
    from t5tune.planning.known_configs import KNOWN_CONFIGS

    return next((name for name in KNOWN_CONFIGS if name.endswith(f"/{word}")), None)
