"""Evaluations, and what they write."""

import functools
import json
from pathlib import Path
from typing import Any

from t5tune.commands.evaluate import EvaluateResult, evaluate
from t5tune.progress import Report, silent
from t5tune.settings import EvaluateSettings
from tests.support import train_runs

METRICS = (
    "examples", "loss", "perplexity", "bits_per_character", "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf",
    "chrf_pp",
)  # fmt: skip
EVALUATED = [name for name in METRICS if name not in ("examples", "bits_per_character")]  # in training, too


def run_evaluate(model: Path, data: Path, output: Path, /, report: Report = silent, **changes: Any) -> EvaluateResult:
    values = {"model_name_or_path": str(model), "data_path": str(data), "output_dir": output, "use_cpu": True}
    return evaluate(EvaluateSettings(**{**values, "max_new_tokens": 12, **changes}), report)


def get_metrics(result: EvaluateResult) -> dict[str, float]:
    return {name: getattr(result, name) for name in METRICS}


def read_predictions(result: EvaluateResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.predictions.read_text(encoding="utf-8").splitlines()]


make_short_settings = functools.partial(train_runs.make_settings, max_steps=4, logging_steps=10, save_steps=500)


def write_answers(path: Path, *answers: str) -> Path:
    lines = [json.dumps({"source": f"question {n}", "target": answers[n % len(answers)]}) for n in range(12)]
    path.write_text("\n".join(lines))
    return path
