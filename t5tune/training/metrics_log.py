"""What a run writes down for its report.

metrics.jsonl has a line of figures each few steps, and a sign of life where steps are slow:

    {"step": 10, "time": "2026-01-31T12:00:00Z", "loss": 1.25, "learning_rate": 0.0001, ...}
    {"step": 10, "time": "2026-01-31T12:01:00Z", "heartbeat": true}

null stands for NaN and infinity. A run that was resumed may hold a step twice: the later line counts. samples.json
has replies to a few examples:

    [{"source": "…", "target": "…", "before": "…", "after": "…"}, …]
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from t5tune.errors import WriteError
from t5tune.io.atomic import append_line
from t5tune.progress import Note, Report, silent

METRICS = "metrics.jsonl"
SAMPLES = "samples.json"
SECONDS_BETWEEN_BEATS = 60.0


class Journal:
    """Appends to the metrics.jsonl of a run folder. What can't be written is told, and written with a later line."""

    def __init__(
        self, run_folder: Path, seconds_between_beats: float = SECONDS_BETWEEN_BEATS, report: Report = silent
    ) -> None:
        self.path = run_folder / METRICS
        self.report = report
        self._waiting: list[str] = []
        self.seconds_between_beats = seconds_between_beats
        self._written_at = time.monotonic()

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Append a line, with the time of the day in UTC."""
        self._written_at = time.monotonic()
        # JSON has no word for what is no finite number
        finite = {name: None if _is_no_number(value) else value for name, value in figures.items()}
        line = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **finite}
        self._waiting.append(json.dumps(line, allow_nan=False))
        try:
            append_line(self.path, "\n".join(self._waiting))
        except WriteError as error:
            self.report(Note(f"{error.message}; training goes on, and its figures wait", warning=True))
        else:
            self._waiting.clear()

    def beat(self, step: int) -> None:
        """Append a sign of life where nothing was written for a while."""
        if time.monotonic() - self._written_at >= self.seconds_between_beats:
            self.write(step, {"heartbeat": True})


def read_journal(run_folder: Path) -> list[dict[str, Any]]:
    """The figures of each step, from all its lines, in the order of steps; heartbeats and broken lines left out."""
    steps: dict[int, dict[str, Any]] = {}
    path = run_folder / METRICS
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a kill may cut a line
        if "heartbeat" not in line:
            steps[step] = steps.get(step, {}) | line
    return [steps[step] for step in sorted(steps)]


def read_samples(run_folder: Path) -> list[dict[str, str]]:
    """What samples.json holds; nothing where there is none. `after` is there once the run is over."""
    try:
        return list(json.loads((run_folder / SAMPLES).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def _is_no_number(value: Any) -> bool:
    """Whether it is a float that is NaN or infinite."""
    return isinstance(value, float) and not math.isfinite(value)
