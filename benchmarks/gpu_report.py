"""The goals and tables of a GPU benchmark.

summary = summarize_checks(outcomes)    # or summarize_speed(outcomes)
text = format_tables(outcomes, summary)
is_good = not list_unmet(summary)
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from gpu_runner import NEEDS_GPU, Outcome

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
MEMORY_GOAL_MB = 12_000  # QLoRA on XXL
ENVIRONMENT, MEMORY = "environment", "memory of QLoRA flan-t5-xxl"
MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
TRAIN = "train"
ATTENTION = "attention"
NO_GPU = "none"


def summarize_checks(outcomes: list[Outcome]) -> dict[str, Any]:
    """Judge each check: it is a goal, which is met if all of its comparisons are."""
    return {
        "gpu": get_gpu(outcomes),
        "goals": {outcome.name: judge_check(outcome) for outcome in outcomes if outcome.name != ENVIRONMENT},
        **list_missing(outcomes),
    }


def judge_check(outcome: Outcome) -> str:
    """A check that fails, is skipped, or compares nothing, isn't met."""
    if outcome.state == NEEDS_GPU:
        return NEEDS_GPU
    comparisons = (outcome.result or {}).get("comparisons")
    is_met = bool(comparisons) and all(comparison["is_met"] for comparison in comparisons)
    return MET if outcome.state == "measured" and is_met else NOT_MET


def summarize_speed(outcomes: list[Outcome]) -> dict[str, Any]:
    """Compute the rows of the training table, and judge the goals."""
    gpu = get_gpu(outcomes)
    peak = find_data_sheet_peak(gpu or "")
    rows = [
        make_training_row(outcome.name, outcome.result, peak)
        for outcome in outcomes
        if outcome.name.startswith(f"{TRAIN} ") and outcome.result
    ]
    trainer = {row["shape"]: row["tokens_per_second"] for row in rows if row["way"] == "trainer"}
    for row in rows:
        if row["shape"] in trainer:
            row["times_trainer"] = round(row["tokens_per_second"] / trainer[row["shape"]], 2)
    on_gpu = gpu not in (None, NO_GPU)
    goals = {goal: judge_speed(met, on_gpu) for goal, met in list_speed_goals(outcomes, rows).items()}
    return {"gpu": gpu, "goals": goals, "training": rows, **list_missing(outcomes)}


def list_speed_goals(outcomes: list[Outcome], rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    """List the goals of all measurements: whether they are met, False if one failed, None without a measurement."""
    goals = dict[str, bool | None]()
    measured = {f"{TRAIN} {row['shape']} {row['way']}": row for row in rows}
    states = {outcome.name: outcome.state for outcome in outcomes}

    def add(goal: str, names: list[str], is_met: Callable[[dict[str, Any]], bool]) -> None:
        if all(name in measured for name in names):
            goals[goal] = is_met(measured[names[0]])
        else:
            goals[goal] = False if any(states[name] == "failed" for name in names) else None

    for outcome in outcomes:
        if outcome.name == MEMORY:
            result = outcome.result or {}
            found = result["memory_mb"] <= MEMORY_GOAL_MB if result else None
            goals[f"{MEMORY}: at most {MEMORY_GOAL_MB:,} MB"] = False if outcome.state == "failed" else found
        if not (outcome.name.startswith(f"{TRAIN} ") and outcome.name.endswith(" packed")):
            continue
        shape = outcome.name.removeprefix(f"{TRAIN} ").removesuffix(" packed")
        other = f"{TRAIN} {shape} trainer"
        if other in states:
            add(
                f"{shape}: {TRAINER_GOAL} times the Trainer",
                [outcome.name, other],
                lambda row: row["times_trainer"] >= TRAINER_GOAL,
            )
        if shape.startswith(PEAK_GOAL_SHAPE):
            add(f"{shape}: {PEAK_GOAL:.0%} of the peak", [outcome.name], lambda row: row["of_peak"] >= PEAK_GOAL)
        if "nemo_tokens_per_second" in measured.get(outcome.name, {}):
            add(
                f"{shape}: NeMo's tokens/s, scaled",
                [outcome.name],
                lambda row: row["tokens_per_second"] >= row["nemo_tokens_per_second"],
            )
    return goals


def judge_speed(is_met: bool | None, on_gpu: bool) -> str:
    if not on_gpu:
        return NEEDS_GPU
    return NOT_MEASURED if is_met is None else MET if is_met else NOT_MET


def get_gpu(outcomes: list[Outcome]) -> str | None:
    """Return the name of the GPU; None: it wasn't measured."""
    gpu: str | None = next((outcome.result or {} for outcome in outcomes if outcome.name == ENVIRONMENT), {}).get("gpu")
    return gpu


def list_missing(outcomes: list[Outcome]) -> dict[str, list[str]]:
    return {state: [outcome.name for outcome in outcomes if outcome.state == state] for state in ("skipped", "failed")}


def list_unmet(summary: dict[str, Any]) -> list[str]:
    """List the goals that aren't met, and the measurements that failed."""
    return list(
        dict.fromkeys([*(goal for goal, state in summary["goals"].items() if state == NOT_MET), *summary["failed"]])
    )


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
    parts = [f"# {summary['gpu'] or 'Unknown GPU'}"]
    if summary["goals"]:
        parts.append(format_goals(outcomes, summary))
    if summary.get("training"):
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


def format_goals(outcomes: list[Outcome], summary: dict[str, Any]) -> str:
    """Format the goals, with the reason or the comparison that decided, which is the first that isn't met."""
    decisive = {outcome.name: describe_decisive(outcome) for outcome in outcomes}
    rows = [[goal, state, decisive.get(goal, "")] for goal, state in summary["goals"].items()]
    return format_table(["goal", "", ""], rows)


def describe_decisive(outcome: Outcome) -> str:
    """Describe the comparison that isn't met, or else the one that is closest to its bound."""
    comparisons = (outcome.result or {}).get("comparisons", [])
    if not comparisons:
        return outcome.reason or ""
    one = min(comparisons, key=lambda one: (one["is_met"], -compute_closeness(one)))
    found = f"{one['found']:.3g}" if isinstance(one["found"], float) else one["found"]
    bound = f"{one['bound']:.3g}" if isinstance(one["bound"], float) else one["bound"]
    return f"{one['what']}: {found} {one['relation']} {bound}"


def compute_closeness(comparison: dict[str, Any]) -> float:
    """Compute the found value as a share of an upper bound; 0 for other comparisons."""
    found, bound = comparison["found"], comparison["bound"]
    return found / bound if comparison["relation"] == "<=" and isinstance(found, int | float) and bound else 0.0


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
    parts = []
    if comparisons := result.get("comparisons"):
        result = {name: value for name, value in result.items() if name != "comparisons"}
        parts.append(format_table(list(comparisons[0]), [[*one.values()] for one in comparisons]))
    simple = {name: value for name, value in result.items() if not isinstance(value, dict)}
    nested = {name: value for name, value in result.items() if isinstance(value, dict)}
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
