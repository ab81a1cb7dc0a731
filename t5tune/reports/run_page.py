"""report.html: the report of a training run, one HTML file that needs no network.

    write_run_report(run_folder, plan, result, examples, has_held_out=True)

Its data comes from metrics.jsonl and samples.json in the run folder, and from the run's token cache.
"""

import html
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t5tune.checkpoints.model_card import DATASET_COUNTS, is_timing
from t5tune.data.caches.cache_view import build_histogram
from t5tune.data.caches.examples import Examples
from t5tune.data.reading.rejections import LABELED_BAD
from t5tune.data.reading.remote_files import hide_data_queries
from t5tune.file_names import REPORT_FILE
from t5tune.formatting import GIB, format_count, format_duration, format_metric_name, format_number, format_size
from t5tune.label_metrics import LABELS
from t5tune.metrics import SACREBLEU_METRICS, prefix_metric, split_by_dataset
from t5tune.reports.page import draw_length_charts, render_labels, render_table, write_page
from t5tune.reports.svg import Series, draw_line_chart, format_short
from t5tune.runs.metrics_log import read_metrics, read_samples
from t5tune.runs.plan import RunPlan
from t5tune.settings.field_types import Settings
from t5tune.settings.flags import list_flags, list_without_flags

# evaluation metrics at the top of the page, if there are any; the table shows all
TILE_METRICS = (
    "loss", "perplexity", "rewards/accuracies", "rewards/margins", "exact_match", "rougeL", "field_f1",
    "macro_f1", "mcc",
)  # fmt: skip
TEXT_SCORES = {"exact_match", "rougeL", *SACREBLEU_METRICS}
# more metrics of preference training and distillation: name -> title of the chart
OBJECTIVE_CHARTS = {
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Reward margin",
    "kl": "Divergence from the teacher, per token",
}
# settings for a single start of a run, which aren't needed to repeat it
NOT_REPEATED = {"fresh", "allow_change", "dry_run"}


def write_run_report(
    run_folder: Path, plan: RunPlan, result: dict[str, Any], examples: Examples, has_held_out: bool
) -> Path:
    """Write report.html to the run folder.

    Args:
        result: the fields of the result of `train`.
        examples: the training examples.
        has_held_out: whether the samples are held-out examples, even if the run didn't evaluate them.
    """
    settings = hide_data_queries(plan.given)
    lines = read_metrics(run_folder)
    sources, targets = map(build_histogram, examples.read_lengths())
    parts = [
        f'<p class="soft">{_render_subtitle(plan, result)}</p>',
        "<details><summary>The command that made this run</summary>"
        f"<pre>{html.escape(format_command(settings))}</pre></details>",
        f'<div class="cards">{"".join(_render_tiles(result))}</div>',
        '<h2>Training</h2><div class="charts">',
        *_draw_training_charts(lines, result.get("datasets") or {}),
        "</div>",
        *_render_evaluation(lines, result.get("datasets") or {}, result.get("best_step")),
        *render_labels(result.get("labels") or {}),
        *_render_samples(read_samples(run_folder), "held-out" if has_held_out else "training"),
        "<h2>Training data</h2>",
        *_render_datasets(examples),
        *_render_left_out(examples.manifest["rejected_by_reason"]),
        draw_length_charts(sources, targets),
        *_render_settings(settings),
    ]
    path = run_folder / REPORT_FILE
    write_page(path, str(run_folder), parts)
    return path


def _render_subtitle(plan: RunPlan, result: dict[str, Any]) -> str:
    adapter, objective = plan.model.adapter, plan.data.objective
    quantization = plan.model.precision.quantization
    method = "full fine-tuning" if adapter is None else f"LoRA with rank {adapter.lora_r}"
    method += f", objective {objective}" if objective != "sft" else ""
    method += f", teacher {plan.teacher.teacher_model_name_or_path}" if plan.teacher is not None else ""
    base = f" on a base quantized to {quantization.quant_type}" if quantization is not None else ""
    share = result["trainable_parameters"] / max(result["total_parameters"], 1)
    stop = f"; stopped early {result['stopped_early']}" if result.get("stopped_early") else ""
    processes = f"; {result['world_size']} processes" if result["world_size"] > 1 else ""
    examples = format_count(result["examples"], "training example")
    return html.escape(
        f"{plan.model.base.model_name_or_path}: {method}{base}; trainable parameters: "
        f"{result['trainable_parameters']:,} of {result['total_parameters']:,} ({share:.2%}); {examples}{processes}"
        f"{stop}"
    )


def format_command(settings: Settings) -> str:
    """Format the command of a run: one changed setting per line; settings without a flag follow as comments."""
    names = [name for name in type(settings).model_fields if name not in NOT_REPEATED]
    words = (shlex.join(group) for group in list_flags(settings, names))
    command = " \\\n  ".join(["t5tune train", *words])
    for name, value in list_without_flags(settings).items():
        command += f"\n# and in YAML, given with --config: {name}: {json.dumps(value, ensure_ascii=False)}"
    return command


def _render_tiles(result: dict[str, Any]) -> list[str]:
    tiles = [
        ("steps", f"{result['steps']:,}"),
        ("epochs", f"{result['epochs']:.3g}"),
        ("mean training loss", _format_optional(result["train_loss"])),
        *(
            (f"held-out {format_metric_name(name)}", _format_optional(result["eval"][name]))
            for name in TILE_METRICS
            if name in result["eval"]
        ),
        ("tokens/s", format_short(result["tokens_per_second"])),
        ("tokens", format_short(result["tokens"])),
        ("peak memory per process", format_size(result["peak_memory_bytes"])),
        ("time", format_duration(result["seconds"])),
    ]
    return [f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in tiles]


def _draw_training_charts(lines: list[dict[str, Any]], datasets: Iterable[str]) -> list[str]:
    def of(name: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return [(line["step"], line[name] * scale) for line in lines if isinstance(line.get(name), int | float)]

    def draw_both(title: str, name: str, held_out: str, allow_log: bool = False) -> str:
        lines = [Series("training", of(name), is_smoothed=True), Series("held out", of(held_out), is_marked=True)]
        return draw_line_chart(title, lines, allow_log)

    losses = [draw_both("Loss", "loss", "eval_loss", allow_log=True)]
    if of("kl"):  # with a teacher, the training loss contains more than the cross-entropy that evaluations measure
        losses = [
            draw_line_chart("Loss", [Series("training", of("loss"), is_smoothed=True)], allow_log=True),
            draw_both("Cross-entropy of the targets", "nll", "eval_loss", allow_log=True),
        ]
    by_dataset = [Series(name, of(f"eval_{prefix_metric(name, 'loss')}"), is_marked=True) for name in datasets]
    return [
        *losses,
        draw_line_chart("Held-out loss by dataset", by_dataset, allow_log=True),
        *(draw_both(title, name, f"eval_{name}") for name, title in OBJECTIVE_CHARTS.items() if of(name)),
        draw_line_chart("Learning rate", [Series("learning rate", of("learning_rate"))]),
        draw_line_chart("Gradient norm", [Series("gradient norm", of("grad_norm"))], allow_log=True),
        draw_line_chart("Tokens per second", [Series("tokens/s", of("tokens_per_second"))]),
        draw_line_chart("Peak memory (GiB)", [Series("peak memory", of("peak_memory_bytes", 1 / GIB))]),
    ]


def _render_evaluation(
    lines: list[dict[str, Any]], datasets: dict[str, dict[str, float | None]], best_step: int | None
) -> list[str]:
    """Render the metrics of all evaluations with the best step marked, and the result's metrics by dataset."""
    found = []
    for line in (line for line in lines if "eval_loss" in line):
        metrics = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
        overall, _ = split_by_dataset(metrics, datasets)
        shown = {name: value for name, value in overall.items() if name != LABELS and not is_timing(name)}
        found.append((line["step"], line.get("epoch"), shown))
    if not found:
        return []
    names = list(dict.fromkeys(name for _, _, values in found for name in values))
    rows = (
        [
            f"{step:,} (best)" if step == best_step else f"{step:,}",
            _format_optional(epoch),
            *(_format_optional(values.get(name)) for name in names),
        ]
        for step, epoch, values in found
    )
    header = ["step", "epoch", *map(format_metric_name, names)]
    better = "Lower is better for loss and perplexity."
    if TEXT_SCORES & set(names):
        better += " Exact match, ROUGE, BLEU and chrF are from 0 to 100: higher is better."
    parts = ["<h2>Evaluation on held-out examples</h2>", f'<p class="soft">{better}</p>']
    parts.append(f'<div class="scroll">{render_table(rows, header)}</div>')
    scores = {
        name: {key: value for key, value in values.items() if key not in DATASET_COUNTS}
        for name, values in datasets.items()
    }
    if names := list(dict.fromkeys(key for values in scores.values() for key in values)):
        rows = ([name, *(_format_optional(values.get(key)) for key in names)] for name, values in scores.items())
        table = render_table(rows, ["dataset", *map(format_metric_name, names)])
        parts += ["<h3>By dataset, in the result</h3>", f'<div class="scroll">{table}</div>']
    return parts


def _format_optional(value: float | None) -> str:
    return "–" if value is None else format_number(value)


def _render_samples(samples: list[dict[str, Any]], kind: str) -> list[str]:
    if not samples:
        return []
    worst = [sample for sample in samples if sample.get("worst_of")]
    others = [sample for sample in samples if sample not in worst]
    parts = [
        "<h2>Sample predictions before and after training</h2>",
        f'<p class="soft">Greedy predictions for {kind} examples before and after training; long texts are cut off. '
        "Loss: the mean over the target's tokens, after training.</p>",
        f"<h3>Evenly spaced examples</h3>{_render_sample_table(others)}",
    ]
    if worst:
        title = f"The worst {len(worst)} of {format_count(worst[0]['worst_of'], 'example')}, by loss"
        parts.append(f"<h3>{title}</h3>{_render_sample_table(worst)}")
    return parts


def _render_sample_table(samples: list[dict[str, Any]]) -> str:
    titles = {"source": "source", "before": "before training", "after": "after training", "target": "target"}
    header = "".join(f"<th>{title}</th>" for title in titles.values())
    lines = [f'<tr>{header}<th class="loss">loss</th></tr>']
    for sample in samples:
        found = {title: sample.get(key) for key, title in titles.items()}
        texts = {title: "–" if text is None else text or "(empty)" for title, text in found.items()}
        texts["loss"] = _format_optional(sample.get("loss"))
        cells = (f'<td data-name="{title}">{html.escape(text)}</td>' for title, text in texts.items())
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="samples">{"".join(lines)}</table>'


def _render_datasets(examples: Examples) -> list[str]:
    """Render the share of each dataset in an epoch, if there are several."""
    if not examples.are_several:
        return []
    rows = (
        (dataset.name, f"{size:,}", f"{rates['share']:.1%}", f"{rate:,}", f"{rate / size:.3g}")
        for dataset, rates in zip(examples.datasets, examples.describe_rates(), strict=True)
        if (size := len(dataset.cache)) and (rate := rates["examples_per_epoch"]) is not None
    )
    header = ("dataset", "examples", "share", "examples per epoch", "times each")
    return [f'<div class="scroll">{render_table(rows, header)}</div>']


def _render_left_out(by_reason: dict[str, int]) -> list[str]:
    rejected = {reason: count for reason, count in by_reason.items() if reason != LABELED_BAD}
    parts = []
    if bad := by_reason.get(LABELED_BAD, 0):
        parts.append(f"labeled bad (label: false, kto_tag: false): {bad:,}")
    if rejected:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejected.items())
        parts.append(f"rejected: {sum(rejected.values()):,} ({reasons})")
    return [f'<p class="soft">Records left out: {html.escape("; ".join(parts))}</p>'] if parts else []


def _render_settings(settings: Settings) -> list[str]:
    values = settings.model_dump(mode="json")
    defaults = {name: field.get_default() for name, field in type(settings).model_fields.items()}
    rows: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for name, value in values.items():
        rows[value == defaults[name]].append((name, _format_value(value)))
    changed, rest = (render_table(rows[is_default], kind="settings") for is_default in (False, True))
    return [
        "<h2>Settings</h2>",
        changed,
        f"<details><summary>Settings with their default values</summary>{rest}</details>",
    ]


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value in (None, "") else str(value)
