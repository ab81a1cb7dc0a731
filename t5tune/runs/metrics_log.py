"""The files that a run's report is made from: metrics.jsonl and samples.json.

metrics.jsonl has a line of metrics every few steps, and a heartbeat if nothing was logged for a while. A resumed run
adds a line, since later steps no longer count; and a second line if the held-out examples have changed, since
earlier evaluations can't be compared with its own:

    {"step": 10, "time": "2026-01-31T12:00:00Z", "loss": 1.25, "learning_rate": 0.0001, ...}
    {"step": 10, "time": "2026-01-31T12:01:00Z", "heartbeat": true}
    {"step": 10, "time": "2026-01-31T13:00:00Z", "resumed": true}
    {"step": 10, "time": "2026-01-31T13:00:00Z", "new_held_out": true}

NaN and infinity are written as null. The file of a resumed run may contain a step twice: the later line counts.
samples.json has the model's predictions for a few examples, before and after training. `loss` is the mean over the
target's tokens after training. `worst_of` is the number of examples from which those with the highest losses were
chosen; null for evenly spaced examples:

    [{"source": "…", "target": "…", "before": "…", "after": "…", "loss": 0.25, "worst_of": null}, …]
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5tune.errors import SettingsError, WriteError
from t5tune.io.atomic import append_line
from t5tune.progress import Note, Report, silent

METRICS_FILE = "metrics.jsonl"
RESUMED = "resumed"
NEW_HELD_OUT = "new_held_out"
EVAL_LABELS = "eval_labels"  # dataset -> table, as in the result, while all evaluation metrics are numbers
SUMMARY = "train_loss"  # of the lines, only the summary at the end has it
SAMPLES_FILE = "samples.json"
SECONDS_BETWEEN_HEARTBEATS = 60.0


class MetricsLog:
    """Appends to metrics.jsonl. Lines that can't be written are reported and retried with the next line."""

    def __init__(
        self, run_folder: Path, seconds_between_heartbeats: float = SECONDS_BETWEEN_HEARTBEATS, report: Report = silent
    ) -> None:
        self.path = run_folder / METRICS_FILE
        self.report = report
        self._waiting: list[str] = []
        self.seconds_between_heartbeats = seconds_between_heartbeats
        self._written_at = time.monotonic()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a line with the metrics and the current time in UTC."""
        self._written_at = time.monotonic()
        line = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **drop_non_finite(metrics)}
        self._waiting.append(json.dumps(line, allow_nan=False))
        try:
            append_line(self.path, "\n".join(self._waiting))
        except WriteError as error:
            note = f"{error.message}; training continues, and the metrics will be written with the next line"
            self.report(Note(note, warning=True))
        else:
            self._waiting.clear()

    def has_summary(self, step: int) -> bool:
        """Whether an earlier process, which was killed after the last step, has written the run's summary."""
        return any(line["step"] == step and SUMMARY in line for line in read_metrics(self.path.parent))

    def write_heartbeat(self, step: int) -> None:
        """Append a heartbeat if nothing was written for a while."""
        if time.monotonic() - self._written_at >= self.seconds_between_heartbeats:
            self.write(step, {"heartbeat": True})


class Metrics(list[dict[str, Any]]):
    """The metrics of a run: a dict for each logged step, in step order, with "step", "loss", "eval_loss", …"""

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps that have a metric, and its values, for a plot: `plt.plot(*metrics.curve("eval_loss"))`.

        Training and evaluations are logged at different steps, so in a table each has gaps, which would break a line.
        """
        found = [(line["step"], value) for line in self if (value := line.get(name)) is not None]
        return [step for step, _ in found], [value for _, value in found]


def read_metrics(run_folder: Path | str) -> Metrics:
    """Read the metrics of each step, merged from all of its lines, in step order, without heartbeats.

    Steps that a resumed run has repeated, evaluations on earlier held-out examples, and truncated lines are left out.
    """
    if not Path(run_folder).is_dir():
        raise SettingsError(f"{run_folder}: no such folder", hint="name a run folder")
    steps: dict[int, dict[str, Any]] = {}
    path = Path(run_folder) / METRICS_FILE
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if RESUMED in line:
            steps = {number: values for number, values in steps.items() if number <= step}
        elif NEW_HELD_OUT in line:
            steps = {number: kept for number, values in steps.items() if (kept := _drop_evaluation(values))}
        elif "heartbeat" not in line:
            steps[step] = steps.get(step, {}) | line
    return Metrics(steps[step] for step in sorted(steps))


def _drop_evaluation(metrics: dict[str, Any]) -> dict[str, Any]:
    """Drop the metrics of an evaluation; a step without other metrics is dropped, too."""
    kept = {name: value for name, value in metrics.items() if not name.startswith("eval_")}
    return kept if kept.keys() - {"step", "time", "epoch"} else {}


def read_samples(run_folder: Path) -> list[dict[str, Any]]:
    """Read samples.json; empty if it is missing. Only a finished run's samples have `after`, `loss` and `worst_of`."""
    try:
        return list(json.loads((run_folder / SAMPLES_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def drop_non_finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinity by None: JSON has neither."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
