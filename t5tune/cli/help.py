"""The help: `t5tune` alone, `t5tune COMMAND --help` with the settings that most people use, and `--help-all`.

Rendered here rather than by Typer, so that it is short, appears at once, and shows a bool as `--bf16 / --no-bf16`.
"""

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text

from t5tune.cli.summaries import EXAMPLES, FIRST_STEPS, SUMMARIES

if TYPE_CHECKING:
    from t5tune.cli.options import Option

MAX_WIDTH = 120  # longer lines are hard to read
MAX_LABEL = 30  # a longer one gets a line of its own
GENERAL_OPTIONS = {
    "-h, --help": "Show this help; after a command, the help of that command.",
    "--version": "Print the version.",
    "--install-completion": "Let the shell complete commands and options with Tab.",
    "--show-completion": "Print the script that --install-completion installs.",
}
REQUIRED = "Required, here or in the --config file"
NOTES = (
    "Each --some-setting is also the key some_setting of the --config file, the environment variable "
    "T5TUNE_SOME_SETTING and the argument some_setting=value. A flag overrides the variable, and the variable "
    "overrides the file. A type that ends in … takes one or several values."
)


def show_help(command: str | None, everything: bool = False) -> None:
    """Print the help of a command, or of t5tune.

    Args:
        everything: list all options of the command, instead of those that most people use.
    """
    console = Console(highlight=False, emoji=False, markup=False)
    width = min(console.width, MAX_WIDTH)
    with console.capture() as captured:
        for part in _render_overview(width) if command is None else _render_command(command, everything, width):
            console.print(part, width=width)
    print(captured.get(), end="", flush=True)


def _render_overview(width: int) -> Iterator[RenderableType]:
    yield _format_title("Usage:", "t5tune COMMAND [OPTIONS]\n")
    yield "Fine-tune T5, mT5, ByT5 and related models: prepare → train → export → merge.\n"
    yield _format_title("Commands:")
    yield _format_rows(SUMMARIES.items(), width, _find_column(SUMMARIES, width))
    yield _format_title("\nStart here:")
    for number, (purpose, example) in enumerate(FIRST_STEPS.items(), 1):
        yield f"  {number}. {purpose}"
        yield _format_command_line(example, width, indent=5)
    yield _format_title("\nOptions:")
    yield _format_rows(GENERAL_OPTIONS.items(), width, _find_column(GENERAL_OPTIONS, width))


def _render_command(command: str, everything: bool, width: int) -> Iterator[RenderableType]:
    # imports pydantic, which the overview doesn't need
    from t5tune.cli.options import list_essential_options, list_options

    options = [option for option in list_options(command) if not option.is_hidden]
    yield _format_title("Usage:", f"{_format_usage(command, options)}\n")
    yield f"{SUMMARIES[command]}\n"
    shown = options if everything else list_essential_options(command)
    groups = _group_options(shown, by_panel=everything)
    column = _find_column([option.label for option in shown], width)
    for title, rows in groups.items():
        if everything:
            # a panel's border takes four characters, and replaces the indentation
            text = _format_rows(rows, width - 4, column, indent=0)
            yield Panel(text, title=title, title_align="left", border_style="dim")
        else:
            yield _format_title(f"{title}:")
            yield _format_rows(rows, width, column)
            yield ""
    if everything:
        yield ""
    yield _format_title("Examples:")
    for example in EXAMPLES[command]:
        yield _format_command_line(example, width)
    if everything:
        yield "\n" + textwrap.fill(NOTES, width, break_on_hyphens=False)
    elif rest := len(options) - len(shown):
        yield f"\nt5tune {command} --help-all lists the other {rest} options."


def _format_usage(command: str, options: list["Option"]) -> str:
    given = [option for option in options if option.argument]
    arguments = [option.argument if option.is_required else f"[{option.argument}]" for option in given]
    return " ".join(["t5tune", command, *arguments, "[OPTIONS]"])


def _group_options(options: list["Option"], by_panel: bool = False) -> dict[str, list[tuple[str, str]]]:
    """Group labels and descriptions under titles: first what is required, then the others, by panel or together."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for option in sorted(options, key=lambda option: (not option.is_required, not option.argument)):
        title = REQUIRED if option.is_required else option.panel if by_panel else "Options"
        groups.setdefault(title, []).append((option.label, option.description))
    return groups


def _find_column(labels: Iterable[str], width: int) -> int:
    """Return the width of the labels' column, with the space after it."""
    limit = min(MAX_LABEL, width // 2)
    return 2 + max((len(label) for label in labels if len(label) <= limit), default=0)


def _format_rows(rows: Iterable[tuple[str, str]], width: int, column: int, indent: int = 2) -> Text:
    """Format labels and descriptions in two columns; a long label is on the line above its description."""
    margin = " " * (indent + column)
    text = Text()
    for label, description in rows:
        text.append(" " * indent + label.ljust(column), "cyan")
        if len(label) > column - 2:
            text.append(f"\n{margin}")
        # textwrap doesn't break a line at a no-break space
        joined = description.replace("Default: ", "Default:\xa0")
        lines = textwrap.wrap(joined, max(width - len(margin), 10), break_on_hyphens=False)
        text.append(f"\n{margin}".join(lines).replace("\xa0", " ") + "\n")
    text.right_crop(1)
    return text


def _format_command_line(line: str, width: int, indent: int = 2) -> Text:
    """Format a command to copy; a long one continues after a backslash, before one of its flags."""
    first, *flags = line.split(" --")
    lines = [" " * indent + first]
    for flag in flags:
        if len(lines[-1]) + len(f" --{flag} \\") > width:
            lines[-1] += " \\"
            lines.append(f"{' ' * (indent + 4)}--{flag}")
        else:
            lines[-1] += f" --{flag}"
    return Text("\n".join(lines), "green", no_wrap=True, overflow="ignore")


def _format_title(title: str, text: str = "") -> Text:
    return Text.assemble((title, "bold"), f" {text}" if text else "")
