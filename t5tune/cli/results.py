"""How results are shown on the terminal, if they are more than the path of an output."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from t5tune.errors import make_printable
from t5tune.formatting import GIB, format_count, format_duration, format_number, format_size, shorten
from t5tune.label_metrics import ALL, LabelTable, describe_labels, show_label

if TYPE_CHECKING:
    from t5tune.commands.compare import Comparison
    from t5tune.commands.doctor import Diagnosis
    from t5tune.commands.plan import Plan
    from t5tune.commands.templates import Templates
    from t5tune.planning.run_memory import StageMemory
    from t5tune.planning.run_time import RunTime

TEMPLATE_FLAGS = {"runs": "--config", "conversations": "--conversation-template", "deepspeed": "--deepspeed"}
MAX_CLASSES, MAX_CELL = 10, 30  # characters of a cell, in the table of labels
MIN_COLUMN = 16  # characters of a run's column on a narrow terminal
STYLES = {"good": "green", "warning": "yellow", "broken": "bold red"}


def render_result(command: str, result: Any) -> RenderableType | None:
    """Make the text of a command's result; None: it begins with the path of an output."""
    match command:
        case "plan":
            return Group(*_render_plan(result))
        case "doctor":
            return Group(*_render_diagnosis(result))
        case "templates":
            return _render_templates(result)
        case "migrate":
            return str(result.text.removesuffix("\n"))
        case "schema":
            return json.dumps(result, indent=2, ensure_ascii=False)
        case "compare":
            return ComparisonTable(result)
        case "docs":
            return str(result.text.removesuffix("\n"))
    return None


def render_labels(dataset: str, table: LabelTable) -> Group:
    """Render the scores of the most frequent classes, each with its most frequent wrong prediction."""
    title = "class" if dataset == ALL else f"class of {dataset}"
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in (title, "precision", "recall", "F1", "support", "taken for"):
        grid.add_column(name, justify="left" if name in (title, "taken for") else "right", no_wrap=True)
    for label, scores in islice(table["classes"].items(), MAX_CLASSES):
        found = table["confusion"].get(label, {})
        wrong = (f"{count:,} × {show_label(other)}" for other, count in found.items() if other != label)
        numbers = (format_number(round(scores[name], 1)) for name in ("precision", "recall", "f1", "support"))
        cells = (shorten(make_printable(cell), MAX_CELL) for cell in (show_label(label), *numbers, next(wrong, "")))
        grid.add_row(*map(Text, cells))
    more = len(table["classes"]) - MAX_CLASSES
    rest = f"{format_count(more, 'more class', 'more classes')}; " if more > 0 else ""
    return Group(grid, Text(rest + describe_labels(table)))


class ComparisonTable:
    """A comparison with a row for each group of runs, or with a column for each where a terminal is too narrow."""

    def __init__(self, result: "Comparison") -> None:
        from t5tune.commands.compare import format_table

        self._titles, self._rows = format_table(result.rows)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = align_columns([self._titles, *self._rows])
        if not options.is_terminal or max(map(len, table.plain.split("\n"))) <= options.max_width:
            yield table
            return
        room = options.max_width - max(map(len, self._titles))
        width = min(max(map(len, chain(*self._rows))), max(MIN_COLUMN, room // 2 - 2))  # longer texts wrap
        count = max(1, room // (width + 2))
        for start in range(0, len(self._rows), count):
            columns = (Column(width=width, overflow="fold") for _ in range(count))
            grid = Table.grid("", *columns, padding=(0, 2, 0, 0))
            for cells in zip(self._titles, *self._rows[start : start + count], strict=True):
                grid.add_row(*map(Text, cells))
            yield from (grid, "")


def align_columns(rows: Sequence[Sequence[str]]) -> Text:
    """Render a table as plain lines: Rich would squeeze the columns of a table that is wider than the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)
    return Text("\n".join(lines))


def _render_plan(result: "Plan") -> Iterator[RenderableType]:
    share = result.trainable_parameters / result.total_parameters
    yield Text(
        f"{result.model}: {result.total_parameters:,} parameters, {result.trainable_parameters:,} trainable "
        f"({share:.2%}), {result.precision}"
    )
    yield Text("weights: " + ", ".join(f"{name} {format_size(size)}" for name, size in result.weights.items() if size))
    yield Text(_describe_batch(result))
    yield _make_table(result)
    chosen = next(stage for stage in result.stages if stage.stage == result.chosen)
    loading = f"{format_size(chosen.loading)} per device, {format_size(chosen.loading_host)} of the machine's memory"
    yield Text(f"* while the base is loaded: {loading}")
    yield Text(f"* while a checkpoint is saved: {format_size(chosen.saving_host)} of the machine's memory")
    yield Text(f"* during an evaluation: {format_size(result.evaluation[result.chosen])} per device")
    if result.suggestion is not None:
        from t5tune.cli.options import format_flag  # with pydantic, which --help doesn't need

        best = result.suggestion
        yield Text.assemble(("suggested: ", "bold"), f"{best.flags}  ({format_size(best.total)} per device)")
        for name, cost in best.not_needed.items():
            yield Text(f"  without {format_flag(name)}: the run fits without it, and it {cost}")
    elif result.device_memory is not None:
        yield Text("nothing fits: use shorter examples, a smaller model, or more memory", "yellow")
    if result.time is None:
        yield Text(f"time: not measured, since {result.time_unknown}")
    else:
        yield from _render_time(result.time)


def _render_time(time: "RunTime") -> Iterator[Text]:
    low, high = format_duration(time.low), format_duration(time.high)
    yield Text.assemble(
        ("time: ", "bold"), low if low == high else f"{low} to {high}", ", estimated from measured steps"
    )
    parts = [
        f"start {time.start:.1f} s",
        f"{format_count(time.timed_steps, 'step')} of {time.step:.2f} ± {time.margin:.2f} s",
        *([f"evaluation {time.evaluation:.1f} s (× {time.evaluations})"] if time.evaluations else []),
        f"checkpoint {time.checkpoint:.1f} s (× {time.checkpoints})",
    ]
    yield Text("measured: " + ", ".join(parts))


def _describe_batch(result: "Plan") -> str:
    device = f"{result.processes} × {result.device}"
    if result.device_memory is not None:
        device += f" with {format_size(result.device_memory)}"
    parts = [
        device,
        f"largest micro-batch {result.batch_size} × ({result.source_length:,} + {result.target_length:,}) tokens",
    ]
    if result.padding is not None:
        parts.append(f"{result.padding:.1%} padding")
    if result.steps is not None:
        parts.append(format_count(result.steps, "step"))
    parts.append(f"learning rate {result.learning_rate:g}")
    return ", ".join(parts)


def _make_table(result: "Plan") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("GiB per device", "weights", "gradients", "optimizer", "activations", "runtime", "total", "RAM", "")
    for number, name in enumerate(names):
        side = "left" if number in (0, len(names) - 1) else "right"
        table.add_column(name, justify=side, style="bold" if name == "total" else "", no_wrap=True)  # type: ignore[arg-type]
    for stage in result.stages:
        table.add_row(*_make_row(stage, stage.stage == result.chosen))
    return table


def _make_row(stage: "StageMemory", is_chosen: bool) -> list[str]:
    sizes = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.runtime, stage.total, stage.host)
    fits = "" if stage.fits is None else "fits" if stage.fits else "no"
    name = "no DeepSpeed" if stage.stage == "none" else stage.stage
    return [f"{name}{' *' if is_chosen else ''}", *map(_format_gib, sizes), fits]


def _format_gib(size: int) -> str:
    gib = size / GIB
    return "–" if size == 0 else f"{gib:.2f}" if gib < 100 else f"{gib:.1f}"  # so that a row fits in 80 columns


def _render_diagnosis(diagnosis: "Diagnosis") -> Iterator[Text]:
    """Yield the findings as unwrapped plain lines, which a user can paste into an issue report."""
    yield Text(f"t5tune {diagnosis.version} on {diagnosis.platform}")
    width = max(len(finding.check) for finding in diagnosis.findings)
    for finding in diagnosis.findings:
        state = Text(f"{finding.state:<8}", STYLES[finding.state])
        yield Text.assemble(state, f"{finding.check:<{width}}  ", finding.found)
        if finding.mend:
            yield Text.assemble(" " * (width + 10), ("fix: ", "bold"), finding.mend)
    verdict = "training can run here" if diagnosis.ok else "training can't run here: fix the problems above"
    yield Text(verdict, "green" if diagnosis.ok else "bold red")


def _render_templates(result: "Templates") -> str:
    if result.copied:
        return "\n".join(map(str, result.copied))
    if result.shown is not None:
        return result.shown.read_text(encoding="utf-8").removesuffix("\n")
    width = max(map(len, chain.from_iterable(result.descriptions.values())))
    lines: list[str] = []
    for kind, descriptions in result.descriptions.items():
        lines.append(f"{kind}: {TEMPLATE_FLAGS[kind]} NAME")
        lines += [f"  {name:<{width}}  {description}" for name, description in descriptions.items()]
    return "\n".join(lines)
