"""tests/golden/options.txt: a change of the command line shows in its diff."""

from typing import Any

from typer.core import TyperArgument

from t5tune.cli.app import build_command
from t5tune.settings import COMMANDS


def build_list() -> str:
    """Return the options of every command that --help-all lists, one per line, with type and default."""
    lines: list[str] = []
    for model in COMMANDS:
        lines.append(f"t5tune {model.command}")
        params: list[Any] = build_command(model.command).params  # their type lacks the attributes of options
        for param in params:
            is_argument = isinstance(param, TyperArgument)
            words = [param.metavar] if is_argument else [*param.opts, *param.secondary_opts, param.metavar]
            if field := model.model_fields.get(param.name):
                words.append("required" if field.is_required() else repr(field.default))
            if not param.hidden:
                lines.append(f"  {' '.join(filter(None, words))}")
        lines.append("")
    return "\n".join(lines)
