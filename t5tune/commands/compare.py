"""`t5tune compare`: a table of training runs: the settings that differ, held-out metrics, time and memory.

    comparison = compare(CompareSettings(runs=[Path("sweep")], sort_by="exact_match"))
    comparison.rows[0].values["exact_match"]        # [87.5, 86.0, 88.1] of three seeds

Runs that differ only in their seed share a row; tables show means and standard deviations.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from t5tune.checkpoints.model_card import is_timing
from t5tune.errors import CheckpointError, SettingsError
from t5tune.file_names import SCORES_FILE, SETTINGS_FILE
from t5tune.formatting import format_duration, format_number, format_size
from t5tune.io.atomic import write_file
from t5tune.io.untrusted import read_json_object
from t5tune.io.yaml_file import MAX_SETTINGS_BYTES, read_yaml
from t5tune.metrics import is_better_low
from t5tune.progress import Note, Report, silent
from t5tune.reports.comparison_page import write_comparison_page
from t5tune.reports.svg import Series
from t5tune.runs.checkpoints import list_checkpoints, read_run_identity
from t5tune.runs.folder import RunFolder
from t5tune.runs.metrics_log import METRICS_FILE, read_metrics
from t5tune.runs.result import read_result
from t5tune.settings import CompareSettings, TrainSettings

TITLES = {"seconds": "time", "peak_memory_bytes": "peak memory"}
# settings that name a run or a place, or that change only its speed
NOT_COMPARED = {"output_dir", "run_name", "preprocessed_path", "seed", "hub_model_id", "num_workers", "cache_dir"}


@dataclass(frozen=True)
class ComparedRow:
    """Runs that differ only in their seed.

    Args:
        settings: those that aren't the same in all rows.
        values: name -> number of each run: `best_step`, the metrics at that step, the scores of `evaluate` with
            `evaluate` before their names, `seconds` and `peak_memory_bytes` of finished runs; `seconds` not if a run
            was resumed.
        best: the best run by the metric to sort by; None: they don't have it.
    """

    runs: list[Path]
    seeds: list[int]
    settings: dict[str, Any]
    values: dict[str, list[float]]
    best: Path | None = None


@dataclass(frozen=True)
class Comparison:
    """The rows, the best one first by the metric `sorted_by`, and the files that were written."""

    rows: list[ComparedRow]
    sorted_by: str | None
    csv: Path | None
    html: Path | None


def compare(settings: CompareSettings, report: Report = silent) -> Comparison:
    """Compare runs, and write a table and a page if the settings name them.

    Raises:
        SettingsError: a folder is neither a run nor a folder of runs, the runs have different objectives, or none has
            the metric to sort by.
    """
    runs = _read_runs(settings.runs, report)
    _check_same_task(runs, report)
    sorted_by = _choose_metric(settings.sort_by, runs)
    sign = 1 if sorted_by in ("best_step", *TITLES) or is_better_low(sorted_by or "loss") else -1

    def rank(row: ComparedRow) -> float:
        return sign * fmean(row.values[sorted_by]) if sorted_by in row.values else math.inf

    rows = sorted(_group_by_seed(runs, rank), key=rank)
    if settings.csv is not None:
        with _explain_unwritten("csv", settings.csv):
            write_file(settings.csv, _format_csv(rows).encode())
    if settings.html is not None:
        charts = {
            "Training loss": _read_curves(rows, "loss"),
            f"Held-out {sorted_by or 'loss'}": _read_curves(rows, f"eval_{sorted_by or 'loss'}"),
        }
        with _explain_unwritten("html", settings.html):
            write_comparison_page(settings.html, *format_table(rows), charts)
    return Comparison(rows, sorted_by, settings.csv, settings.html)


@contextmanager
def _explain_unwritten(setting: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"{setting}: {path}: can't be written: {error.strerror}"
        raise SettingsError(problem, hint="choose a file in an existing folder") from error


def format_table(rows: Sequence[ComparedRow]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return the titles of the columns, and the texts of each row."""
    columns = _list_texts(rows)
    groups = [f"{row.best.name} (best of {len(row.runs)})" if row.best else f"{len(row.runs)} runs" for row in rows]
    columns["run"] = [group if row.runs[1:] else row.runs[0].name for row, group in zip(rows, groups, strict=True)]
    for name in dict.fromkeys(name for row in rows for name in row.values):
        title = TITLES.get(name, name.replace("_", " "))
        columns[title] = [_format_value(name, row.values.get(name, [])) for row in rows]
    return list(columns), list(zip(*columns.values(), strict=True))


def _format_value(name: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = fmean(values)
    if name == "seconds":
        return format_duration(mean)
    if name == "peak_memory_bytes":
        return format_size(round(mean))
    return format_number(mean) + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def _format_csv(rows: Sequence[ComparedRow]) -> str:
    """Write the table as CSV, with a column of standard deviations after each column of means."""
    columns: dict[str, Sequence[object]] = {**_list_texts(rows), "best run": [row.best for row in rows]}
    for name in dict.fromkeys(name for row in rows for name in row.values):
        found = [row.values.get(name, []) for row in rows]
        columns[name] = [fmean(values) if values else None for values in found]
        if any(len(row.runs) > 1 for row in rows):
            columns[f"{name} sd"] = [stdev(values) if len(values) > 1 else None for values in found]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
    return text.getvalue()


def _list_texts(rows: Sequence[ComparedRow]) -> dict[str, list[str]]:
    """List the columns that aren't numbers: name -> the text of each row."""
    columns = {"run": [" ".join(map(str, row.runs)) for row in rows]}
    for name in rows[0].settings:
        values = [row.settings[name] for row in rows]
        columns[name] = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in values]
    if len({seed for row in rows for seed in row.seeds}) > 1:
        columns["seed"] = [" ".join(map(str, row.seeds)) for row in rows]
    return columns


def _read_curves(rows: Sequence[ComparedRow], name: str) -> list[Series]:
    """Read the curve of a metric of each run."""
    logs = {folder: read_metrics(folder) for row in rows for folder in row.runs}
    return [
        Series(folder.name, list(zip(*log.curve(name), strict=True)), is_smoothed=True) for folder, log in logs.items()
    ]


def _read_runs(patterns: Sequence[Path], report: Report) -> list[ComparedRow]:
    """Read each run as a row with all of its settings, and the scores of folders that `evaluate` has written."""
    found = _find_paths(patterns, report)
    folders = [path for path in found if _is_run(path)]
    if not folders:
        problem = f"runs: {' '.join(map(str, patterns))}: no run folder"
        raise SettingsError(problem, hint="give the output_dir of t5tune train, or a pattern such as 'runs/*'")
    runs = {folder.resolve(): _read_run(folder, report) for folder in folders}
    inside = [path.parent for folder in folders for path in sorted(folder.glob(f"*/{SCORES_FILE}"))]
    for folder in filter(_has_scores, dict.fromkeys([*found, *inside])):
        scores = read_json_object(folder, SCORES_FILE)
        evaluated = scores.get("settings")
        models = evaluated if isinstance(evaluated, dict) else {}
        paths = [models.get(name) for name in ("adapter", "model_name_or_path")]
        for run in filter(None, [runs.get(Path(path).resolve()) for path in paths if isinstance(path, str)]):
            run.values.update({f"evaluate {name}": values for name, values in _select_metrics(scores)})
    return list(runs.values())


def _find_paths(patterns: Sequence[Path], report: Report) -> list[Path]:
    """List the given paths, with the content of folders of runs, such as sweeps, in place of these folders.

    A given path that isn't a run is skipped if it is next to a run: the shell also puts a sweep's data in place of
    `sweep/*`.

    Raises:
        SettingsError: a given path doesn't exist, or neither it nor a path next to it is a run.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if pattern.exists() else _list_matches(str(pattern)) or [pattern]
        for path in matches:
            found += _list_matches(f"{escape(str(path))}/*") if _is_folder_of_runs(path) else [path]
    found = list(dict.fromkeys(found))
    places = {path.parent for path in found if _is_run(path)}
    skipped = [path for path in found if path in patterns and not (_is_run(path) or _has_scores(path))]
    for path in skipped:
        if not path.exists() or path.parent not in places:
            hint = "give run folders, a folder of runs such as a sweep's, or a pattern such as 'runs/*'"
            raise SettingsError(f"runs: {path}: not a run folder, nor a folder of runs", hint=hint)
    if skipped:
        report(Note(f"skipped, because not a run folder: {', '.join(map(str, skipped))}"))
    return found


def _list_matches(pattern: str) -> list[Path]:
    return [Path(path) for path in sorted(glob(pattern))]


def _is_run(path: Path) -> bool:
    return (path / SETTINGS_FILE).is_file() and (path / METRICS_FILE).is_file()


def _has_scores(path: Path) -> bool:
    return (path / SCORES_FILE).is_file()


def _is_folder_of_runs(path: Path) -> bool:
    return not _is_run(path) and any(_is_run(inside) for inside in _list_matches(f"{escape(str(path))}/*"))


def _read_run(folder: Path, report: Report) -> ComparedRow:
    settings, log = read_yaml(folder / SETTINGS_FILE, MAX_SETTINGS_BYTES), read_metrics(folder)
    metric = settings.get("metric_for_best_model") or "loss"
    evaluations = [line for line in log if None not in (line.get("eval_loss"), line.get(f"eval_{metric}"))]
    sign = 1 if is_better_low(metric) else -1
    values: dict[str, list[float]] = {}
    if evaluations:
        best = min(evaluations, key=lambda line: (sign * line[f"eval_{metric}"], line["eval_loss"]))  # as in training
        metrics = {name.removeprefix("eval_"): value for name, value in best.items() if name.startswith("eval_")}
        values = {"best_step": [best["step"]], **dict(_select_metrics(metrics))}
    if RunFolder(folder).is_finished:
        result = read_result(folder)
        if result.resumed_from is None:  # otherwise the time before isn't known
            values["seconds"] = [result.seconds]
        values["peak_memory_bytes"] = [result.peak_memory_bytes]
    else:
        step = log[-1]["step"] if log else 0
        text = f"{folder}: not finished: its metrics are those up to step {step}; to finish it, run its command again"
        report(Note(text, warning=True))
    return ComparedRow([folder], [settings.get("seed", TrainSettings.model_fields["seed"].default)], settings, values)


def _select_metrics(metrics: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not is_timing(name):
            yield name, [value]


def _check_same_task(runs: Sequence[ComparedRow], report: Report) -> None:
    """Refuse runs with different objectives, and warn of different held-out examples."""
    objectives = {run.settings.get("objective", "sft"): run.runs[0] for run in runs}
    if len(objectives) > 1:
        listed = ", ".join(f"{folder} has {objective}" for objective, folder in objectives.items())
        raise SettingsError(f"runs: different objectives: {listed}", hint="compare runs of one objective")
    held_out = {}
    for folder in (run.runs[0] for run in runs):
        for checkpoint in list_checkpoints(folder)[:1]:
            with suppress(CheckpointError):
                held_out[read_run_identity(checkpoint).get("held_out")] = folder
    held_out.pop(None, None)  # runs without evaluations
    if len(held_out) > 1:
        problem = f"{' and '.join(map(str, [*held_out.values()][:2]))} have different held-out examples"
        report(Note(f"{problem}, so their metrics can't be compared; use the scores of t5tune evaluate", warning=True))


def _group_by_seed(runs: Sequence[ComparedRow], rank: Callable[[ComparedRow], float]) -> list[ComparedRow]:
    """Make a row of the runs that differ only in their seed, with the settings that aren't the same in all rows."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in NOT_COMPARED)
    texts = {name: [json.dumps(run.settings.get(name), default=str) for run in runs] for name in names}
    different = [name for name in names if len(set(texts[name])) > 1]
    groups: dict[tuple[str, ...], list[ComparedRow]] = {}
    for number, run in enumerate(runs):
        groups.setdefault(tuple(texts[name][number] for name in different), []).append(run)
    return [
        ComparedRow(
            [run.runs[0] for run in group],
            [run.seeds[0] for run in group],
            {name: group[0].settings.get(name) for name in different},
            {
                name: [run.values[name][0] for run in group]
                for name in group[0].values
                if all(name in run.values for run in group)
            },
            best.runs[0] if rank(best := min(group, key=rank)) < math.inf else None,
        )
        for group in groups.values()
    ]


def _choose_metric(given: str | None, runs: Sequence[ComparedRow]) -> str | None:
    """Choose the metric to sort by: the given one, else the `metric_for_best_model` of all runs."""
    known = list(dict.fromkeys(name for run in runs for name in run.values))
    if given is not None and given not in known:
        raise SettingsError(f"sort_by: {given}: no run has this metric", hint=f"the metrics are {', '.join(known)}")
    chosen = {run.settings.get("metric_for_best_model") or "loss" for run in runs}
    return given or next((name for name in chosen if name in known and len(chosen) == 1), None)
