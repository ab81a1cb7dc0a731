"""Sweeps: lists of values for some settings. All combinations are trained, or a random sample.

expand_sweep({"lora_r": [4, 8], "learning_rate": [1e-4, 3e-4]}, seed=42, max_runs=100)     # four runs
expand_sweep({"trials": 20, "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}}, seed=42, max_runs=100)
"""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from t5tune.errors import SettingsError
from t5tune.formatting import shorten

TRIALS = "trials"
# settings that each run gets from the sweep, or that apply to the sweep as a whole
NOT_VARIED = {
    "output_dir", "preprocessed_path", "run_name", "fresh", "allow_change", "dry_run",
    "sweep", "jobs", "max_runs", "median_stopping",
}  # fmt: skip
MAX_NAME_LENGTH = 120


@dataclass(frozen=True)
class Range:
    """A range to sample from: uniformly, or uniformly on a logarithmic scale. Whole limits give whole numbers."""

    low: int | float
    high: int | float
    log: bool = False

    def sample(self, generator: random.Random) -> int | float:
        if self.log:
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = generator.uniform(self.low, self.high)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return min(max(round(drawn), self.low), self.high)
        return float(f"{drawn:.4g}")  # for a readable folder name


def expand_sweep(sweep: Mapping[str, Any], seed: int, max_runs: int) -> dict[str, dict[str, Any]]:
    """Return the settings that each run changes: name of its folder -> setting -> value.

    Args:
        sweep: setting -> its values, a list or a range; and perhaps `trials`, the size of a random sample.
        seed: of the sample, so that the same sweep always has the same runs.

    Raises:
        SettingsError: a value isn't a list or a range, or there are more than `max_runs` runs.
    """
    trials = sweep.get(TRIALS)
    choices = {name: _read_choices(name, value) for name, value in sweep.items() if name != TRIALS}
    if not choices:
        raise SettingsError("sweep: no settings", hint="give lists of values, such as lora_r: [4, 8]")
    if trials is not None and not (type(trials) is int and trials > 0):
        raise SettingsError(f"sweep: trials: {shorten(json.dumps(trials))}: expected a whole number of at least 1")
    ranges = [name for name, values in choices.items() if isinstance(values, Range)]
    if ranges and trials is None:
        raise SettingsError(f"sweep: {ranges[0]}: a range needs trials", hint="set trials to the number of runs")
    lists = {name: values for name, values in choices.items() if not isinstance(values, Range)}
    size = math.prod(map(len, lists.values()))
    count = trials if trials is not None and (ranges or trials < size) else size
    if count > max_runs:
        hint = "set trials for a random sample, shorten a list, or raise max_runs"
        raise SettingsError(f"sweep: {count:,} runs, but max_runs is {max_runs:,}", hint=hint)
    generator = random.Random(seed)
    if ranges:
        runs = [_sample(choices, generator) for _ in range(count)]
    else:
        indices = range(size) if count == size else sorted(generator.sample(range(size), count))
        runs = [_select_combination(lists, index) for index in indices]
    return {name_run(run): run for run in runs}


def _read_choices(name: str, value: Any) -> Range | list[Any]:
    if name in NOT_VARIED:
        raise SettingsError(f"sweep: {name}: can't vary in a sweep", hint="remove it from the sweep")
    match value:
        case []:
            raise SettingsError(f"sweep: {name}: an empty list", hint="give at least one value, or remove it")
        case list():
            return value
        case {"low": int() | float() as low, "high": int() | float() as high, **rest} if rest.keys() <= {"log"}:
            is_log = rest.get("log", False)
            if isinstance(is_log, bool) and math.isfinite(high - low) and low < high and (low > 0 or not is_log):
                return Range(low, high, is_log)
    problem = f"sweep: {name}: {shorten(json.dumps(value, default=str))}: expected a list of values, or a range"
    hint = f"write {name}: [1, 2], or {name}: {{low: 1, high: 2}}; log: true needs a range above 0"
    raise SettingsError(problem, hint=hint)


def _sample(choices: Mapping[str, Range | list[Any]], generator: random.Random) -> dict[str, Any]:
    return {
        name: values.sample(generator) if isinstance(values, Range) else generator.choice(values)
        for name, values in choices.items()
    }


def _select_combination(lists: Mapping[str, Sequence[Any]], index: int) -> dict[str, Any]:
    """Select the combination with this number; the last setting changes first."""
    chosen = {}
    for name, values in reversed(list(lists.items())):
        index, position = divmod(index, len(values))
        chosen[name] = values[position]
    return dict(reversed(chosen.items()))


def name_run(changes: Mapping[str, Any]) -> str:
    """Name the folder of a run after its settings: lora_r=8,learning_rate=0.0003.

    A name that was shortened or changed, or that could mean different values, ends in a hash of the values.
    """
    name = ",".join(f"{setting}={_format(value)}" for setting, value in changes.items())
    shown = re.sub(r"[^\w.,=+-]+", "-", name)[:MAX_NAME_LENGTH]
    texts = [text for value in changes.values() for text in (value if isinstance(value, list) else [value])]
    if shown == name and not any(isinstance(text, str) and set(text) & set(",=+") for text in texts):
        return name
    return f"{shown}-{sha256(json.dumps(changes, default=str).encode()).hexdigest()[:8]}"


def _format(value: Any) -> str:
    match value:
        case float():
            return f"{value:g}" if float(f"{value:g}") == value else repr(value)
        case list():
            return "+".join(map(_format, value))
        case bool() | None | dict():
            return json.dumps(value, default=str)
    return str(value)
