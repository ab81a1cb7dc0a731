"""docs/commands.md: the purpose of each command, and every setting."""

import re
import typing
from dataclasses import dataclass

from pydantic.fields import FieldInfo

from t5tune.cli.options import unwrap_type
from t5tune.cli.summaries import EXAMPLES, SUMMARIES
from t5tune.settings import COMMANDS, Settings
from t5tune.settings.field_types import get_extra


def build_page() -> str:
    """Return the text of docs/commands.md: each command with its purpose, then each setting once, under an anchor."""
    rows = find_setting_rows()
    lines = [
        "<!-- generated from the settings by `make generate` -->",
        "",
        "# Commands",
        "",
        " · ".join(f"[{model.command}](#t5tune-{model.command})" for model in COMMANDS),
        "",
        "Each setting is a flag (`--lora-r 16`), a key of the YAML file that `--config` reads (`lora_r: 16`) and an",
        "environment variable (`T5TUNE_LORA_R`). A flag overrides the variable, and the variable overrides the file.",
        "Every command has `--config`, `--json`, `--quiet` and `--debug`. `--help` shows the most common settings,",
        "`--help-all` all settings. On the command line, `lora_r=16` is the same as `--lora-r 16`.",
        "",
        "The tables of the commands have the most common settings. [All settings](#settings) are explained once, at",
        "the end of this page; each has an address, such as [`lora_r`](#lora_r).",
    ]
    for model in COMMANDS:
        lines += build_command_section(model, rows)
    lines += ["", "## Settings"]
    panels: dict[str, list[str]] = {}
    for row in rows:
        description = f"{row.description} *({', '.join(row.commands)})*"
        cells = f'<a id="{row.anchor}"></a>`{row.name}`', row.default, description
        panels.setdefault(row.panel, []).append(f"| {' | '.join(cells)} |")
    for panel, texts in panels.items():
        lines += ["", f"### {panel}", "", "| setting | default | |", "|---|---|---|", *texts]
    return "\n".join(lines) + "\n"


@dataclass
class SettingRow:
    """A setting as one or more commands describe it."""

    name: str
    panel: str
    default: str
    description: str
    commands: list[str]
    anchor: str


def find_setting_rows() -> list[SettingRow]:
    """Return each setting once, or once for each group of commands that describe it differently."""
    rows: dict[tuple[str, ...], SettingRow] = {}
    anchors = {anchor_of(model.find_panel(name)) for model in COMMANDS for name in model.model_fields}
    for model in COMMANDS:
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else format_default(field.default)
            key = (name, default, format_description(field))
            if key in rows:
                rows[key].commands.append(model.command)
                continue
            anchor = f"{model.command}-{name}" if name in anchors else name
            anchors.add(anchor)
            rows[key] = SettingRow(*key[:1], model.find_panel(name), *key[1:], [model.command], anchor)
    return list(rows.values())


def build_command_section(model: type[Settings], rows: list[SettingRow]) -> list[str]:
    """Return the lines on a command: its summary, two examples, its essential settings, and links to the rest."""
    lines = ["", f"## t5tune {model.command}", "", SUMMARIES[model.command]]
    if model.also_positional:
        lines += [f"The first word after `{model.command}` may be the `{model.also_positional}`, without its flag."]
    if places := [f"`{name}`" for name, field in model.model_fields.items() if get_extra(field, "positional")]:
        lines += [f"Given by their place, without a flag: {', '.join(places)}."]
    lines += ["", "```sh", *map(break_command, EXAMPLES[model.command]), "```"]
    own = {row.name: row for row in rows if model.command in row.commands}
    essential = dict.fromkeys((*model.list_required(), *model.essential))
    if essential:
        lines += ["", "| setting | default | |", "|---|---|---|"]
    lines += [
        f"| [`{name}`](#{own[name].anchor}) | {own[name].default} | {own[name].description} |" for name in essential
    ]
    panels: dict[str, list[str]] = {}
    for name, row in own.items():
        if name not in essential:
            panels.setdefault(model.find_panel(name), []).append(f"[`{name}`](#{row.anchor})")
    if panels:
        lines += ["", "More settings:", ""]
        lines += [f"- {panel}: {', '.join(links)}" for panel, links in panels.items()]
    return lines


def break_command(command: str) -> str:
    """Break a command into lines of at most 80 characters."""
    text, line = "", ""
    for word in re.findall(r'(?:"[^"]*"|\S)+(?: (?!-)(?:"[^"]*"|\S)+)*', command):
        if line and len(line) + len(word) > 77:
            text, line = f"{text}{line} \\\n", "   "
        line = f"{line} {word}" if line else word
    return text + line


def format_description(field: FieldInfo) -> str:
    text = field.description or ""
    if typing.get_origin(unwrap_type(field)) is typing.Literal:
        text += f" One of {', '.join(f'`{choice}`' for choice in typing.get_args(unwrap_type(field)))}."
    return text.replace("|", "\\|")


def format_default(default: object) -> str:
    if default in (None, "", {}, []):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
