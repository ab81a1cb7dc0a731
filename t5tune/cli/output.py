"""Where a command's output goes: its result to stdout; progress, notes and errors to stderr."""

import dataclasses
import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from t5tune.checkpoints.model_card import is_timing
from t5tune.cli.results import render_labels
from t5tune.cli.screen import Screen, StderrConsole, print_message
from t5tune.errors import SettingsError, Stopped, T5TuneError, WriteError, to_t5tune_error, unwrap_interrupt
from t5tune.formatting import format_count, format_duration, format_metric_name, format_number, format_size
from t5tune.progress import Report, silent

# labels of a result's values, if they aren't the names with spaces
LABELS = {
    "train_loss": "mean training loss",
    "eval": "held-out",
    "peak_memory_bytes": "peak memory per process",
    "peak_reserved_bytes": "peak memory reserved",
    "bytes": "size",
    "world_size": "processes",
    "zero_stage": "ZeRO stage",
    "lora_tensors": "LoRA tensors",
    "non_lora_tensors": "non-LoRA tensors",
    "custom_metrics": "",
    "recall": "",
    "cut_off": "cut off",
    "signatures": "signature of",
    "token_rows": "rows of added tokens",
    "max_error": "largest logit difference",
    "onto": "merged into",
    "from_training": "difference from training, base as",
    "seconds": "time",
}
NOT_SHOWN = {
    "best_eval", "seed", "split_seed", "lora", "labels",
    # which trim reports in one line
    "tokens", "rows", "parameters", "kept_share", "base_tokens", "base_rows", "base_parameters",
}  # fmt: skip
"""Values of a result that --json and result.json have, and the lines of names and values don't."""
HARMLESS = (("world_size", 1), ("cut_off", 0), ("onto", "base"), ("adapted_tensors", 0), ("token_rows", 0))
"""Values that the lines omit."""


@dataclasses.dataclass
class Output:
    """The output of a command: results on `stream`, as JSON objects with `json`; errors with tracebacks with `debug`.

    Args:
        shows_paths: False if the launching process shows the path of the output.
    """

    stream: TextIO
    json: bool = False
    quiet: bool = False
    debug: bool = False
    shows_paths: bool = True

    def __post_init__(self) -> None:
        self.console = Console(file=self.stream, highlight=False, soft_wrap=True, emoji=False)
        self._screen = None if self.quiet else Screen()
        self.report: Report = self._screen or silent

    def show(self, result: Any, text: RenderableType | None = None, next_steps: Sequence[tuple[str, str]] = ()) -> None:
        """Show a command's result, a dataclass or a dictionary: as JSON with --json, else as `text`.

        Without `text`, the first field, the path of the output, goes to stdout, and a table of the rest to stderr;
        nothing is shown unless `shows_paths`. The next steps, (label, line), come last, on stderr.
        """
        if text is None and not self.shows_paths:
            return
        if self.json:
            self.print_json(result)
            return
        if text is None:
            self.close_screen()
            (_, path), *others = dataclasses.asdict(result).items()
            text = str(path)
            if not self.quiet and others:
                with suppress(OSError):
                    StderrConsole().print(_format_table(dict(others), text))
                    for dataset, table in (dict(others).get("labels") or {}).items():
                        StderrConsole().print(render_labels(dataset, table))
        self.print(text)
        if not self.quiet:
            with suppress(OSError):
                console = StderrConsole()
                for label, line in next_steps:
                    console.print(Text.assemble((f"{label:<8}", "dim"), line))

    def print_json(self, value: Any) -> None:
        """Print a dataclass or a dictionary as JSON, on one line of stdout."""
        self.print(json.dumps(value, ensure_ascii=False, allow_nan=False, default=_to_json))

    def print(self, what: RenderableType, end: str = "\n") -> None:
        self.close_screen()
        if not isinstance(what, str):
            with self.console.capture() as captured:
                self.console.print(what)
            what, end = captured.get(), ""
        try:
            print(what, end=end, file=self.stream, flush=True)
        except OSError as error:
            raise WriteError(f"standard output: can't be written: {error.strerror}") from error

    def fail(self, error: BaseException) -> int:
        """Show an error, and return its exit code: one line per problem on stderr, with --json also a JSON object."""
        error = unwrap_interrupt(error)
        self.close_screen()
        with suppress(OSError):
            StderrConsole().show_cursor()  # which a killed worker may have hidden
        known = to_t5tune_error(error)
        if isinstance(known.__cause__, BrokenPipeError):  # the reader of the result is gone
            return known.exit_code
        if self.debug:
            traceback.print_exception(error)
        print_error(known, is_stop=isinstance(error, Stopped | KeyboardInterrupt))
        if self.json:
            with suppress(WriteError):
                self.print_json({"error": {"kind": known.kind, "message": known.message, "hint": known.hint}})
        return known.exit_code

    def close_screen(self) -> None:
        if self._screen is not None:
            self._screen.close()


def print_error(error: T5TuneError, is_stop: bool = False) -> None:
    """Print an error to stderr: a line per problem and the hint, or a heading and lists.

    Args:
        is_stop: the user stopped the command, which isn't called an error.
    """
    console = StderrConsole()
    for line in _list_stop_lines(error) if is_stop else _list_error_lines(error):
        with suppress(OSError):  # if stderr is closed, the exit code still reports the failure
            print_message(console, line)


def _list_stop_lines(error: T5TuneError) -> Iterator[Text]:
    hint = f". {error.hint[0].upper()}{error.hint[1:]}." if error.hint else ""
    yield Text(f"{error.message}{hint}")


def _list_error_lines(error: T5TuneError) -> Iterator[Text]:
    label = ("error:", "bold red")
    problems = error.problems if isinstance(error, SettingsError) else (error.message,)
    if isinstance(error, SettingsError) and error.heading is not None:
        yield Text.assemble(label, " ", error.heading)
        yield from (Text(f"  {problem}") for problem in problems)
        yield from map(Text, error.choices)
        return
    *others, last = problems
    if error.hint:
        last += f"; {error.hint}"
    yield from (Text.assemble(label, " ", problem) for problem in (*others, last))


def _to_json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else dataclasses.asdict(value)


def _format_table(values: dict[str, Any], path: str) -> Text:
    """Write a result as lines of name and value, unlike a Rich table, which breaks long values inside words."""
    shown = {name: value for name, value in values.items() if name not in NOT_SHOWN}
    rows = [(label, text) for label, text in _list_rows(_add_base_columns(shown)) if text != path]
    width = max((len(label) for label, _ in rows), default=0)
    return Text("\n").join(Text.assemble((f"{label:<{width}}", "dim"), "  ", text) for label, text in rows)


def _add_base_columns(values: dict[str, Any]) -> dict[str, Any]:
    """Put the base's metrics next to the tuned model's, if evaluate computed both."""
    base = values.pop("base", None)
    if base is None:
        return values
    custom = values.pop("custom_metrics") | (values.pop("recall", None) or {})
    rows = {"": ("tuned", "base", "difference")}
    for name in base | custom:  # the names of a custom metric may depend on the predictions
        tuned, other = custom.get(name, values.get(name)), base.get(name)
        difference = None if tuned is None or other is None else tuned - other
        sign = "+" if difference is not None and difference >= 0 else ""
        rows[name] = (_format_optional(tuned), _format_optional(other), sign + _format_optional(difference))
    widths = [max(map(len, column)) + 2 for column in zip(*rows.values(), strict=True)]
    texts = {name: "".join(map(str.ljust, row, widths)).rstrip() for name, row in rows.items()}
    return {"custom_metrics": texts} | {name: value for name, value in values.items() if name not in texts}


def _format_optional(value: float | None) -> str:
    return "–" if value is None else format_number(value)


def _list_rows(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = LABELS.get(name, format_metric_name(name))
        if name == "datasets" and value:
            for dataset, items in value.items():
                yield f"dataset {dataset}", _format_dataset(items)
        elif isinstance(value, dict):  # of metrics, perhaps custom ones
            metrics = {key: item for key, item in value.items() if not is_timing(key)}
            for key, item in metrics.items():
                text = item if isinstance(item, str) else _format_optional(item)
                yield f"{label} {format_metric_name(key)}".strip(), text
        elif value is not None and value is not False and (name, value) not in HARMLESS:
            yield label, _format_value(name, value)


def _format_dataset(items: Any) -> str:
    """Format a dataset's examples and metrics, or the number of examples that prepare gives."""
    if not isinstance(items, dict):
        return format_count(items, "example")
    return ", ".join(f"{format_metric_name(name)} {_format_share(name, value)}" for name, value in items.items())


def _format_share(name: str, value: float | None) -> str:
    return f"{value:.1%}" if name == "share" and value is not None else _format_optional(value)


def _format_value(name: str, value: Any) -> str:
    if name in {"bytes", "peak_memory_bytes", "peak_reserved_bytes"}:
        return format_size(value)
    if name == "seconds":
        return format_duration(value)
    if value is True:
        return "yes"
    return format_number(value) if isinstance(value, int | float) else str(value)
