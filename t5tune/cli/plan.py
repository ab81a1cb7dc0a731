"""`t5tune plan` on the terminal: the model, a table of the memory by ZeRO stage, and the suggested flags."""

from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from t5tune.cli.console import format_json
from t5tune.commands.plan import GIB, Plan, StageMemory, plan
from t5tune.progress import Report
from t5tune.settings import PlanSettings


def show_plan(settings: PlanSettings, report: Report, stream: TextIO, as_json: bool) -> None:
    """Print the plan, as text or as one JSON object."""
    result = plan(settings, report)
    if as_json:
        print(format_json(result), file=stream, flush=True)
    else:
        print_plan(result, stream)


def print_plan(result: Plan, stream: TextIO) -> None:
    """Print the plan as text."""
    console = Console(file=stream, highlight=False, soft_wrap=True, emoji=False)
    share = result.trainable_parameters / result.total_parameters
    lines = [
        f"{result.model}: {result.total_parameters:,} parameters, {result.trainable_parameters:,} trainable "
        f"({share:.2%}), {result.precision}",
        "weights: " + ", ".join(f"{name} {_format_size(size)}" for name, size in result.weights.items()),
        _describe_batch(result),
    ]
    for line in lines:
        console.print(line, markup=False)
    console.print(_make_table(result))
    if result.suggestion is not None:
        best = result.suggestion
        console.print(Text.assemble(("suggested: ", "bold"), f"{best.flags}  ({_format_size(best.total)} per device)"))
    elif result.device_memory is not None:
        console.print(Text("nothing fits: use shorter examples, a smaller model, or more memory", "yellow"))


def _describe_batch(result: Plan) -> str:
    device = f"{result.processes} × {result.device}"
    if result.device_memory is not None:
        device += f" with {_format_size(result.device_memory)}"
    parts = [
        device,
        f"largest micro-batch {result.batch_size} × ({result.source_length:,} + {result.target_length:,}) tokens",
    ]
    if result.padding is not None:
        parts.append(f"{result.padding:.1%} padding")
    if result.steps is not None:
        parts.append(f"{result.steps:,} steps")
    return ", ".join(parts)


def _make_table(result: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("GiB per device", "weights", "gradients", "optimizer", "activations", "runtime", "total", "host", "")
    for number, name in enumerate(names):
        side = "left" if number in (0, len(names) - 1) else "right"
        table.add_column(name, justify=side, style="bold" if name == "total" else "", no_wrap=True)  # type: ignore[arg-type]
    for stage in result.stages:
        table.add_row(*_make_row(stage, stage.stage == result.chosen))
    return table


def _make_row(stage: StageMemory, is_chosen: bool) -> list[str]:
    sizes = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.runtime, stage.total, stage.host)
    fits = "" if stage.fits is None else "fits" if stage.fits else "no"
    name = "no DeepSpeed" if stage.stage == "none" else stage.stage
    return [f"{name}{' *' if is_chosen else ''}", *(f"{size / GIB:.2f}" if size else "–" for size in sizes), fits]


def _format_size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (GIB >> 10):.2f} MiB"
