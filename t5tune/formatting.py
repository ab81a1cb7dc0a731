"""How numbers, counts, sizes, durations, names of metrics and long texts are written, in messages and HTML pages."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

GIB = 1 << 30  # bytes
SIZE_UNITS = {"GiB": GIB, "MiB": 1 << 20, "KiB": 1 << 10}
METRIC_NAMES = {
    "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF",
    "chrf_pp": "chrF++", "valid_json": "valid JSON", "field_f1": "field F1", "macro_f1": "macro F1", "mcc": "MCC",
    "ece": "calibration error", "micro_f1": "micro F1", "entity_f1": "entity F1", "spearman": "Spearman",
    "pearson": "Pearson", "rmse": "RMSE",
}  # fmt: skip


def format_number(value: float) -> str:
    """Four significant digits without trailing zeros; thousands separated by commas: 0.0001, 12.35, 81,920."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"


def format_label(label: str | float) -> str:
    """Write a label, or a number with the seven significant digits that fp32 has: 45.27, 1000003."""
    return label if isinstance(label, str) else f"{label:.7g}"


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """Format a count with its noun: `1 record`, `2,000 records`."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def format_parameters(count: int) -> str:
    """Write a number of parameters: 12.9B, 300M, 1.5M."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.{0 if count >= 1e7 else 1}f}M"


def format_size(num_bytes: int) -> str:
    """Write a size in the largest unit that gives at least 0.1: 0.59 GiB, 12.30 MiB, 0.24 KiB."""
    unit, size = next((pair for pair in SIZE_UNITS.items() if num_bytes >= pair[1] // 10), ("KiB", 1 << 10))
    return f"{num_bytes / size:.2f} {unit}"


def format_duration(seconds: float) -> str:
    """Write a duration: 9.5 s, 4 min 08 s, 3 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def shorten(text: str, limit: int = 60) -> str:
    """Cut a text to at most `limit` characters, including an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def abbreviate_value(value: Any) -> str:
    """Write a value as JSON, shortened if it is long, and then with its hash."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def describe_change(name: str, before: Any, now: Any) -> str:
    """Describe a value that differs: `learning_rate: 0.0003 before, 0.001 now`."""
    return f"{name}: {abbreviate_value(before)} before, {abbreviate_value(now)} now"


def format_metric_name(name: str) -> str:
    """Write the name of a metric for a reader: exact_match -> exact match, rougeL -> ROUGE-L."""
    if name.startswith("base_"):  # of the base, next to the tuned model's
        return f"base {format_metric_name(name.removeprefix('base_'))}"
    return METRIC_NAMES.get(name, name.replace("_", " "))


def format_metrics(metrics: Mapping[str, float], datasets: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Write the metrics of an evaluation during training: all overall metrics, and each dataset's loss."""
    overall = [f"{format_held_out_metric(name)} {format_number(value)}" for name, value in metrics.items()]
    return overall + [f"dataset {name}: loss {format_number(values['loss'])}" for name, values in datasets.items()]


def format_held_out_metric(name: str) -> str:
    """Write the name of an evaluation's metric, so that its loss isn't taken for the training loss."""
    return "held-out loss" if name == "loss" else format_metric_name(name)
