"""report.html: the report of a training run, one HTML file that needs no network.

    write_run_report(run_folder, settings, result, cache)

It is made from metrics.jsonl and samples.json in the run folder, and the token cache that the run was trained on.
"""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5tune.checkpoints.model_card import is_timing
from t5tune.data.cache import Cache
from t5tune.data.histogram import LengthArray, build_histogram
from t5tune.data.records import LABELED_BAD
from t5tune.io.atomic import write_file
from t5tune.reports.metrics_log import read_metrics, read_samples
from t5tune.reports.svg import Series, draw_histogram, draw_line_chart, format_short
from t5tune.settings import TrainSettings

REPORT_FILE = "report.html"
GIB = 1 << 30
# evaluation metrics that are shown at the top, in addition to the table
TILE_METRICS = ("loss", "perplexity", "exact_match", "rougeL")

STYLE = """
:root {
  color-scheme: light dark;
  --back: #fff; --text: #1f2937; --soft: #6b7280; --line: #d1d5db; --card: #f9fafb;
  --c0: #2563eb; --c1: #c2410c; --c2: #15803d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #0f172a; --text: #e2e8f0; --soft: #94a3b8; --line: #334155; --card: #1e293b;
    --c0: #60a5fa; --c1: #fb923c; --c2: #4ade80;
  }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; background: var(--back); color: var(--text);
       max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.soft { color: var(--soft); margin: .2rem 0 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; }
.cards b { display: block; font-size: 1.25rem; font-weight: 600; }
.cards span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: .9rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem; }
figcaption { font-weight: 600; font-size: .9rem; display: flex; justify-content: space-between; }
svg { display: block; width: 100%; height: auto; }
.axis { fill: var(--soft); font-size: 11px; } .grid { stroke: var(--line); stroke-width: .6; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.line-0 { stroke: var(--c0); } .line-1 { stroke: var(--c1); }
.dot-0, .bar-0 { fill: var(--c0); } .dot-1, .bar-1 { fill: var(--c1); } .bar-2 { fill: var(--c2); }
.legend { font-weight: 400; } .legend span { margin-left: .9rem; }
.key-0 { color: var(--c0); } .key-1 { color: var(--c1); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { border-bottom: 1px solid var(--line); padding: .4rem .8rem .4rem 0; vertical-align: top;
         overflow-wrap: anywhere; }
pre, td.text { white-space: pre-wrap; } code, pre { font: 13px/1.5 ui-monospace, monospace; }
.samples { table-layout: fixed; } summary { cursor: pointer; color: var(--soft); margin-top: .6rem; }
"""


def write_run_report(run_folder: Path, settings: TrainSettings, result: dict[str, Any], cache: Cache) -> Path:
    """Write report.html to the run folder, through a temporary file.

    Args:
        result: the fields of the result of `train`.
        cache: the examples that were trained on.
    """
    lines = read_metrics(run_folder)
    name = html.escape(str(run_folder))
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title><style>{STYLE}</style><h1>{name}</h1>",
        f'<p class="soft">{_render_subtitle(settings, result)}</p>',
        f'<div class="cards">{"".join(_render_tiles(result))}</div>',
        '<h2>Training</h2><div class="charts">',
        *_draw_training_charts(lines),
        "</div>",
        *_render_evaluation(lines),
        *_render_samples(read_samples(run_folder)),
        "<h2>Training data</h2>",
        *_render_left_out(cache.manifest["rejected_by_reason"]),
        '<div class="charts">',
        *_draw_length_charts(cache.read_lengths()),
        "</div>",
        *_render_settings(settings),
    ]
    path = run_folder / REPORT_FILE
    write_file(path, "\n".join(parts).encode(errors="backslashreplace"))
    return path


def _render_subtitle(settings: TrainSettings, result: dict[str, Any]) -> str:
    way = "full fine-tuning" if settings.train_mode == "full" else f"LoRA with rank {settings.lora_r}"
    base = f" on a base quantized to {settings.quant_type}" if settings.q_lora else ""
    share = result["trainable_parameters"] / max(result["total_parameters"], 1)
    return html.escape(
        f"{settings.model_name_or_path}: {way}{base}; trainable parameters: {result['trainable_parameters']:,} of "
        f"{result['total_parameters']:,} ({share:.2%}); {result['examples']:,} training examples"
    )


def _render_tiles(result: dict[str, Any]) -> list[str]:
    loss = result["train_loss"]
    tiles = [
        ("steps", f"{result['steps']:,}"),
        ("epochs", f"{result['epochs']:.3g}"),
        ("mean training loss", "–" if loss is None else f"{loss:.4g}"),
        *(
            (f"held-out {name.replace('_', ' ')}", f"{result['eval'][name]:.4g}")
            for name in TILE_METRICS
            if name in result["eval"]
        ),
        ("tokens/s", format_short(result["tokens_per_second"])),
        ("tokens", format_short(result["tokens"])),
        ("peak memory per process", f"{result['peak_memory_bytes'] / GIB:.2f} GiB"),
        ("process" if result["world_size"] == 1 else "processes", str(result["world_size"])),
        ("time", _format_duration(result["seconds"])),
    ]
    return [f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in tiles]


def _draw_training_charts(lines: list[dict[str, Any]]) -> list[str]:
    def of(name: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(line["step"], line[name] * scale) for line in lines if isinstance(line.get(name), int | float)]

    return [
        draw_line_chart(
            "Loss",
            [Series("training", of("loss")), Series("held out", of("eval_loss"))],
            "step",
            may_be_logarithmic=True,
        ),
        draw_line_chart("Learning rate", [Series("learning rate", of("learning_rate"))], "step"),
        draw_line_chart("Gradient norm", [Series("gradient norm", of("grad_norm"))], "step", may_be_logarithmic=True),
        draw_line_chart("Tokens per second", [Series("tokens/s", of("tokens_per_second"))], "step"),
        draw_line_chart("Peak memory (GiB)", [Series("peak memory", of("peak_memory_bytes", 1 / GIB))], "step"),
    ]


def _render_evaluation(lines: list[dict[str, Any]]) -> list[str]:
    found = []
    for line in (line for line in lines if "eval_loss" in line):
        metrics = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        found.append((line["step"], {name: value for name, value in metrics.items() if not is_timing(name)}))
    if not found:
        return []
    names = list(found[-1][1])
    header = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in ["step", *names])
    rows = (
        f"<tr><td>{step:,}</td>{''.join(f'<td>{_format_number(values[name])}</td>' for name in names)}</tr>"
        for step, values in found
        if set(names) <= values.keys()
    )
    return [f"<h2>Evaluation on held-out examples</h2><table><tr>{header}</tr>", *rows, "</table>"]


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _render_samples(samples: list[dict[str, str]]) -> list[str]:
    if not samples:
        return []
    columns: list[tuple[str, Callable[[dict[str, str]], str]]] = [
        ("source", lambda sample: sample["source"]),
        ("before training", lambda sample: sample["before"]),
        ("after training", lambda sample: sample.get("after", "–")),
        ("target", lambda sample: sample["target"]),
    ]
    header = "".join(f"<th>{name}</th>" for name, _ in columns)
    rows = (
        f"<tr>{''.join(f'<td class=text>{html.escape(text(sample))}</td>' for _, text in columns)}</tr>"
        for sample in samples
    )
    return [
        f'<h2>Sample predictions before and after training</h2><table class="samples"><tr>{header}</tr>',
        *rows,
        "</table>",
    ]


def _render_left_out(by_reason: dict[str, int]) -> list[str]:
    """Report the records that are not used for training, if there are any."""
    rejected = {reason: count for reason, count in by_reason.items() if reason != LABELED_BAD}
    parts = []
    if bad := by_reason.get(LABELED_BAD, 0):
        parts.append(f"labeled bad (label: false, kto_tag: false): {bad:,}")
    if rejected:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.items())
        parts.append(f"rejected: {sum(rejected.values()):,} ({reasons})")
    return [f'<p class="soft">Records left out: {html.escape("; ".join(parts))}</p>'] if parts else []


def _draw_length_charts(lengths: tuple[LengthArray, LengthArray]) -> list[str]:
    charts = []
    for color, name, values in ((0, "Source", lengths[0]), (2, "Target", lengths[1])):
        bars = build_histogram(values)
        charts.append(draw_histogram(f"{name} length", bars.edges, bars.counts, "tokens", color))
    return charts


def _render_settings(settings: TrainSettings) -> list[str]:
    values = settings.model_dump(mode="json")
    defaults = {name: field.get_default() for name, field in TrainSettings.model_fields.items()}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    rest = {name: value for name, value in values.items() if name not in changed}

    def table(part: dict[str, Any]) -> str:
        rows = (
            f"<tr><td><code>{name}</code></td><td><code>{html.escape(_format_value(value))}</code></td></tr>"
            for name, value in part.items()
        )
        return f"<table>{''.join(rows)}</table>"

    return [
        "<h2>Settings</h2>",
        table(changed),
        f"<details><summary>Settings with their default values</summary>{table(rest)}</details>",
    ]


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value in (None, "") else str(value)


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
