"""`t5tune plan` on the terminal: the model, a table of the memory by ZeRO stage, and the suggested flags."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from t5tune.cli.output import Output
from t5tune.commands.plan import GIB, Plan, StageMemory, plan
from t5tune.settings import PlanSettings


def run(settings: PlanSettings, output: Output) -> int:
    """Show the plan."""
    result = plan(settings, output.report)
    output.show(result, render_plan(result))
    return 0


def render_plan(result: Plan) -> Group:
    """Make the text of a plan."""
    return Group(*_render_parts(result))


def _render_parts(result: Plan) -> Iterator[RenderableType]:
    share = result.trainable_parameters / result.total_parameters
    yield Text(
        f"{result.model}: {result.total_parameters:,} parameters, {result.trainable_parameters:,} trainable "
        f"({share:.2%}), {result.precision}"
    )
    yield Text("weights: " + ", ".join(f"{name} {_format_size(size)}" for name, size in result.weights.items()))
    yield Text(_describe_batch(result))
    yield _make_table(result)
    if result.suggestion is not None:
        best = result.suggestion
        yield Text.assemble(("suggested: ", "bold"), f"{best.flags}  ({_format_size(best.total)} per device)")
    elif result.device_memory is not None:
        yield Text("nothing fits: use shorter examples, a smaller model, or more memory", "yellow")


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
