"""report.html: the report of a training run, one HTML file that needs no network.

    write_run_report(run_folder, settings, result, cache)

It is made from metrics.jsonl and samples.json in the run folder, and the token cache that the run was trained on.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from t5tune.checkpoints.model_card import is_timing
from t5tune.data.cache import Cache
from t5tune.data.cache_view import build_histogram
from t5tune.data.records import LABELED_BAD
from t5tune.reports.metrics_log import read_metrics, read_samples
from t5tune.reports.page import draw_length_charts, write_page
from t5tune.reports.svg import Series, draw_line_chart, format_short
from t5tune.settings import TrainSettings

REPORT_FILE = "report.html"
GIB = 1 << 30
# evaluation metrics that are shown at the top, in addition to the table
TILE_METRICS = ("loss", "perplexity", "exact_match", "rougeL")


def write_run_report(run_folder: Path, settings: TrainSettings, result: dict[str, Any], cache: Cache) -> Path:
    """Write report.html to the run folder.

    Args:
        result: the fields of the result of `train`.
        cache: the examples that were trained on.
    """
    lines = read_metrics(run_folder)
    sources, targets = map(build_histogram, cache.read_lengths())
    parts = [
        f'<p class="soft">{_render_subtitle(settings, result)}</p>',
        f'<div class="cards">{"".join(_render_tiles(result))}</div>',
        '<h2>Training</h2><div class="charts">',
        *_draw_training_charts(lines),
        "</div>",
        *_render_evaluation(lines),
        *_render_samples(read_samples(run_folder)),
        "<h2>Training data</h2>",
        *_render_left_out(cache.manifest["rejected_by_reason"]),
        draw_length_charts(sources, targets),
        *_render_settings(settings),
    ]
    path = run_folder / REPORT_FILE
    write_page(path, str(run_folder), parts)
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
        draw_line_chart("Loss", [Series("training", of("loss")), Series("held out", of("eval_loss"))], allow_log=True),
        draw_line_chart("Learning rate", [Series("learning rate", of("learning_rate"))]),
        draw_line_chart("Gradient norm", [Series("gradient norm", of("grad_norm"))], allow_log=True),
        draw_line_chart("Tokens per second", [Series("tokens/s", of("tokens_per_second"))]),
        draw_line_chart("Peak memory (GiB)", [Series("peak memory", of("peak_memory_bytes", 1 / GIB))]),
    ]


def _render_evaluation(lines: list[dict[str, Any]]) -> list[str]:
    found = []
    for line in (line for line in lines if "eval_loss" in line):
        metrics = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        found.append((line["step"], {name: value for name, value in metrics.items() if not is_timing(name)}))
    if not found:
        return []
    names = list(found[-1][1])
    rows = (
        [f"{step:,}", *(_format_number(values[name]) for name in names)]
        for step, values in found
        if set(names) <= values.keys()
    )
    header = ["step", *(name.replace("_", " ") for name in names)]
    return ["<h2>Evaluation on held-out examples</h2>", _render_table(rows, header)]


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _render_samples(samples: list[dict[str, str]]) -> list[str]:
    if not samples:
        return []
    rows = ((one["source"], one["before"], one.get("after", "–"), one["target"]) for one in samples)
    header = ("source", "before training", "after training", "target")
    return ["<h2>Sample predictions before and after training</h2>", _render_table(rows, header, "samples")]


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


def _render_settings(settings: TrainSettings) -> list[str]:
    values = settings.model_dump(mode="json")
    defaults = {name: field.get_default() for name, field in TrainSettings.model_fields.items()}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    rest = {name: value for name, value in values.items() if name not in changed}

    def table(part: dict[str, Any]) -> str:
        return _render_table(((name, _format_value(value)) for name, value in part.items()), kind="settings")

    return [
        "<h2>Settings</h2>",
        table(changed),
        f"<details><summary>Settings with their default values</summary>{table(rest)}</details>",
    ]


def _render_table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), kind: str = "") -> str:
    """Make a table; `kind` is its class in the style sheet."""
    lines = [
        f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
        for tag, cells in [("th", header), *(("td", row) for row in rows)]
        if cells
    ]
    return f'<table class="{kind}">{"".join(lines)}</table>'


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value in (None, "") else str(value)


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
