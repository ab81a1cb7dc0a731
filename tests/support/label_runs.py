"""Small runs that learn labels, one for each kind of label, and the records that they learn."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from t5tune.commands.evaluate import evaluate
from t5tune.commands.train import train
from t5tune.settings import EvaluateSettings, TrainSettings

NAMES, THINGS = ("Ada", "Mira", "Otto"), ("tea", "coffee", "bread")
PAIRS = [(name, thing) for name in NAMES for thing in THINGS]
ORDERS = [f"Hello , {thing} for {name} please ." for name, thing in PAIRS]
WORDS = [order.split() for order in ORDERS]


class Kind(NamedTuple):
    """How a kind of label is trained. `column`: of the texts, which requests and prompts send."""

    settings: dict[str, Any]
    column: str
    records: list[dict[str, Any]]


KINDS = {
    "classify": Kind(
        {"objective": "classify", "source_prefix": "order: "},
        "text",
        [{"text": order, "label": thing} for order, (_, thing) in zip(ORDERS, PAIRS, strict=True)],
    ),
    "several": Kind(
        {"objective": "classify"},
        "text",
        [{"text": order, "labels": list(pair)} for order, pair in zip(ORDERS, PAIRS, strict=True)],
    ),
    "regress": Kind(
        {"objective": "regress"}, "text", [{"text": order, "score": len(order) / 7} for order in ORDERS]
    ),
    "tag": Kind(
        {"objective": "tag", "source_prefix": "find names: "},
        "tokens",
        [{"tokens": words, "ner_tags": ["B-name" if word in NAMES else "O" for word in words]} for words in WORDS],
    ),
    "numbers": Kind(
        {"objective": "regress"}, "tokens", [{"tokens": words, "score": [*map(len, words)]} for words in WORDS]
    ),
    "residues": Kind(
        {"objective": "tag", "source_words": "residues"},
        "sequence",
        [{"sequence": "MKUT" + "AZ" * length, "label": "CHEE" + "CH" * length} for length in range(1, 6)],
    ),
}  # fmt: skip


def train_labels(base: Path, folder: Path, kind: str, **changes: Any) -> Path:
    """Train a run in an empty folder, next to its data `data.jsonl`."""
    given = KINDS[kind]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in given.records))
    values: dict[str, Any] = {"max_steps": 8, "learning_rate": 2e-2, "use_cpu": True, "report_samples": 0}
    settings = TrainSettings(
        model_name_or_path=str(base), data_path=str(data), output_dir=folder / "run",
        **(given.settings | values | changes),
    )  # fmt: skip
    train(settings)
    return folder / "run"


def predict(run: Path, folder: Path) -> list[dict[str, Any]]:
    """Return what evaluate predicts for a run's data: the lines of predictions.jsonl."""
    data = str(run.parent / "data.jsonl")
    result = evaluate(EvaluateSettings(model_name_or_path=str(run), data_path=data, output_dir=folder, use_cpu=True))
    return [json.loads(line) for line in result.predictions.read_text().splitlines()]
