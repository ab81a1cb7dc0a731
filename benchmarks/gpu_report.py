"""The tables of a GPU benchmark, and the values that follow from several measurements.

summary = summarize(outcomes)
text = format_tables(outcomes, summary)
"""

import re
from collections.abc import Iterable
from typing import Any

from gpu_runner import Outcome

# bf16 operations per second without sparsity, from NVIDIA's data sheets; the first whose name the GPU's contains
DATA_SHEET_PEAKS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "A40": 150e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX A6000": 155e12,
}  # fmt: skip
# NVIDIA's NeMo, pretraining T5-3B on A100s: tokens per second and GPU
NEMO_SPEED, NEMO_PARAMETERS, NEMO_PEAK = 13_800, 3e9, DATA_SHEET_PEAKS["A100"]
TRAINING_FLOPS, LORA_FLOPS = 6, 4  # per parameter and token: LoRA computes no gradients of the base's weights
PEAK_GOAL, TRAINER_GOAL = 0.4, 1.5
PEAK_GOAL_SHAPE = "flan-t5-xl"
TRAIN = "train"
ATTENTION = "attention"


def summarize(outcomes: list[Outcome]) -> dict[str, Any]:
    """Compute the rows of the training table, and whether the goals are met; None if that wasn't measured."""
    environment = next((outcome.result or {} for outcome in outcomes if outcome.name == "environment"), {})
    peak = find_data_sheet_peak(environment.get("gpu", ""))
    rows = [
        make_training_row(outcome.name, outcome.result, peak)
        for outcome in outcomes
        if outcome.name.startswith(f"{TRAIN} ") and outcome.result
    ]
    trainer = {row["shape"]: row["tokens_per_second"] for row in rows if row["way"] == "trainer"}
    for row in rows:
        if row["shape"] in trainer:
            row["times_trainer"] = round(row["tokens_per_second"] / trainer[row["shape"]], 2)
    packed = [row for row in rows if row["way"] == "packed"]
    goals = {
        f"{row['shape']}: {TRAINER_GOAL} times the Trainer": row["times_trainer"] >= TRAINER_GOAL
        for row in packed
        if "times_trainer" in row
    }
    goals |= {
        f"{row['shape']}: {PEAK_GOAL:.0%} of the peak": row["of_peak"] >= PEAK_GOAL
        for row in packed
        if row["shape"].startswith(PEAK_GOAL_SHAPE)
    }
    goals |= {
        f"{row['shape']}: NeMo's tokens/s, scaled": row["tokens_per_second"] >= row["nemo_tokens_per_second"]
        for row in packed
        if "nemo_tokens_per_second" in row
    }
    states = {
        state: [outcome.name for outcome in outcomes if outcome.state == state] for state in ("skipped", "failed")
    }
    return {"gpu": environment.get("gpu"), "goals": goals, "training": rows, **states}


def find_data_sheet_peak(gpu: str) -> float | None:
    """Find the peak of a GPU by its name, such as `NVIDIA H100 80GB HBM3`."""
    return next((peak for name, peak in DATA_SHEET_PEAKS.items() if re.search(rf"\b{name}\b", gpu)), None)


def make_training_row(name: str, result: dict[str, Any], peak: float | None) -> dict[str, Any]:
    """Make a row of the training table from a measurement such as `train flan-t5-xl 512 packed`."""
    _, size, longest, way = name.split(" ", 3)
    row: dict[str, Any] = {"shape": f"{size} {longest}", "way": way, **result}
    if peak is not None:
        operations = result["tokens_per_second"] * result["operations_per_token"]
        row["of_data_sheet"] = round(operations / peak, 3)
        row["nemo_tokens_per_second"] = round(scale_nemo_speed(result["parameters"], peak))
    return row


def scale_nemo_speed(parameters: int, peak: float) -> float:
    """Scale NeMo's tokens per second to a GPU with this peak, and to LoRA on a model with this number of parameters.

    NeMo's speed is operations per second / operations per token. The former is proportional to the GPU's peak. The
    latter are 6 per parameter in pretraining, and 4 with LoRA:

        speed = 13,800 · peak / 312e12 · (6 · 3e9) / (4 · parameters)

    Both counts take each token through the whole model, though a token passes either the encoder or the decoder.
    """
    operations = TRAINING_FLOPS * NEMO_PARAMETERS / (LORA_FLOPS * parameters)
    return NEMO_SPEED * peak / NEMO_PEAK * operations


def format_tables(outcomes: list[Outcome], summary: dict[str, Any]) -> str:
    """Format everything as Markdown."""
    goals = [[goal, "met" if met else "not met"] for goal, met in summary["goals"].items()]
    parts = [f"# {summary['gpu'] or 'Unknown GPU'}"]
    if goals:
        parts.append(format_table(["goal", ""], goals))
    if summary["training"]:
        parts.append("## Training\n\n" + format_training(summary["training"]))
    others = [
        f"## {outcome.name}\n\n{format_result(outcome.result)}"
        for outcome in outcomes
        if outcome.result is not None and not outcome.name.startswith(f"{TRAIN} ")
    ]
    parts += others
    missing = [[outcome.name, outcome.state, outcome.reason or ""] for outcome in outcomes if outcome.reason]
    if missing:
        parts.append("## Not measured\n\n" + format_table(["measurement", "", "reason"], missing))
    return "\n\n".join(parts) + "\n"


def format_training(rows: list[dict[str, Any]]) -> str:
    columns = {
        "shape": "shape and longest", "way": "way", "batch": "batch", "useful_share": "useful / all tokens",
        "tokens_per_second": "useful tokens/s", "times_trainer": "× Trainer", "nemo_tokens_per_second": "NeMo, scaled",
        "of_peak": "of the measured peak", "of_data_sheet": "of the data sheet's", "launches": "launches",
        "idle_share": "GPU idle", "peak_memory_mb": "memory, MB", "reserved_memory_mb": "reserved, MB",
    }  # fmt: skip
    table = format_table(list(columns.values()), [[row.get(name) for name in columns] for row in rows])
    # says if attention was not computed in one kernel
    notes = [
        f"- {row['shape']} {row['way']}: {note}" for row in rows for note in row.get("notes", ()) if ATTENTION in note
    ]
    return "\n\n".join([table, "\n".join(notes)]) if notes else table


def format_result(result: dict[str, Any]) -> str:
    """Format a result: a table of its simple values, and a table of its nested values."""
    simple = {name: value for name, value in result.items() if not isinstance(value, dict)}
    nested = {name: value for name, value in result.items() if isinstance(value, dict)}
    parts = []
    if simple:
        parts.append(format_table(["", ""], [[name, value] for name, value in simple.items()]))
    if nested:
        columns = list(dict.fromkeys(name for values in nested.values() for name in values))
        rows = [[name, *(values.get(column) for column in columns)] for name, values in nested.items()]
        parts.append(format_table(["", *columns], rows))
    return "\n\n".join(parts)


def format_table(header: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(format_cell, line)) + " |" for line in lines)


def format_cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    # thousands separators only where a number isn't a small one
    text = f"{value:,.0f}" if isinstance(value, float) and abs(value) >= 1000 else str(value)
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else text
    return text.replace("|", "\\|").replace("\n", " ")
