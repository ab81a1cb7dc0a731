"""`t5tune migrate`: translate a run config of LLaMA-Factory, axolotl or transformers' seq2seq scripts.

result = migrate(MigrateSettings(run_config="llama3_lora_sft.yaml", output_file="run.yaml"))
result.not_supported    # {"neftune_noise_alpha: 5": "NEFTune isn't supported", …}
"""

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from t5tune.errors import SettingsError, make_printable
from t5tune.formatting import shorten
from t5tune.io.atomic import write_file
from t5tune.io.reasons import describe_error
from t5tune.io.yaml_file import MAX_YAML_BYTES, read_yaml, to_yaml
from t5tune.progress import Note, Report, silent
from t5tune.settings import MigrateSettings
from t5tune.settings.other_tools import Translation, detect_tool, find_missing, translate

SECRET = re.compile("token$|api_key|secret|password")


@dataclass(frozen=True)
class MigrateResult:
    """A translated run config as YAML, with the file that has it.

    Args:
        not_needed: keys with their values -> the reason why they need no setting.
        not_supported: keys with their values -> the loss, or what to do instead.
    """

    text: str
    output_file: Path | None
    not_needed: dict[str, str]
    not_supported: dict[str, str]


def migrate(settings: MigrateSettings, report: Report = silent) -> MigrateResult:
    """Translate the keys of a run config.

    Raises:
        SettingsError: the file can't be read or isn't a run config, or the output file exists.
    """
    path, target = settings.run_config, settings.output_file
    if target is not None and target.exists():
        raise SettingsError(f"output_file: {target}: already exists", hint="choose a different file")
    config = read_yaml(path) if path.suffix.lower() in (".yaml", ".yml", ".json") else _read_command_line(path)
    tool = detect_tool(config)
    if tool is None:
        problem = "has no key of LLaMA-Factory, axolotl, run_summarization or run_translation"
        raise SettingsError(f"{path}: {problem}", hint="give the YAML, the JSON or the command line of a training run")
    found = translate(config, tool)
    if not any(found[key].settings for key in config):
        raise SettingsError(f"{path}: no key can be translated", hint="t5tune train --help-all lists the settings")
    keys = {_write_key(key, value): found[key] for key, value in config.items()}
    lost = {key: each.comment for key, each in keys.items() if each.is_lost}
    unneeded = {key: each.comment for key, each in keys.items() if not each.settings and not each.is_lost}
    lists = {"Not supported, or less than asked for": lost, "Not needed": unneeded}
    text = _write_yaml(f"the {tool} config {path.name}", found, lists)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, text.encode())
    for key, why in lost.items():
        report(Note(f"{key}: {why}", warning=True))
    return MigrateResult(text, target, unneeded, lost)


def _read_command_line(path: Path) -> dict[str, Any]:
    """Read the flags of the command in a shell script, with the values of its variables; a lone flag is true."""
    try:
        if (size := path.stat().st_size) > MAX_YAML_BYTES:
            raise ValueError(f"it has {size} bytes; the limit is {MAX_YAML_BYTES} bytes")
        words = shlex.split(re.sub(r"\\\r?\n", " ", path.read_text(encoding="utf-8-sig")), comments=True)
    except (OSError, ValueError) as error:  # such as a quote without an end
        raise SettingsError(f"{path}: can't be read: {describe_error(error)}") from error
    if sum(word.endswith(".py") for word in words) > 1:
        raise SettingsError(f"{path}: has several commands", hint="keep only the training command")
    flags: dict[str, list[Any]] = {}
    variables: dict[str, str] = {}
    for word in words:
        name, equals, value = Template(word).safe_substitute(variables).partition("=")
        if name.startswith("--"):
            flags[name[2:].replace("-", "_")] = values = [_read_value(value)] if equals else []
        elif flags and re.match(r"\d?[|;&>]", word):
            break
        elif flags and not word.endswith(".py"):
            values.append(_read_value(name + equals + value))
        elif equals:
            variables[name] = value
    return {name: values[0] if len(values) == 1 else values or True for name, values in flags.items()}


def _read_value(word: str) -> Any:
    """Read a number, true or false; any other word stays text."""
    with suppress(ValueError):
        return json.loads(word.lower())
    return word


def _write_key(name: str, value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"{name}: {'…' if SECRET.search(name) else shorten(shown, 60)}"


def _write_yaml(source: str, found: Mapping[str, Translation], lists: Mapping[str, Mapping[str, str]]) -> str:
    """Write the settings, each with the keys that it is from, and the lists of other keys as comments."""
    values: dict[str, Any] = {}
    comments: dict[str, list[str]] = {}
    for key, each in found.items():
        for name, value in each.settings.items():
            values[name] = value
            notes = [f"from {key}" if key != name else "", each.comment]
            comments.setdefault(name, []).extend(filter(None, notes))
    lines = [f"# Translated from {source} by t5tune migrate.", ""]
    lines += [f"# {name}: {value}  # choose" for name, value in find_missing(values).items()]
    for name, value in values.items():
        comment = [f"# {'; '.join(dict.fromkeys(comments[name]))}"] if comments[name] else []
        written = to_yaml({name: value}).splitlines()
        lines += ["  ".join(written + comment)] if len(written) == 1 else comment + written
    for heading, keys in lists.items():
        lines += ["", f"# {heading}:", *(f"# {key}  # {why}" for key, why in keys.items())] if keys else []
    return "\n".join(map(make_printable, lines)) + "\n"
