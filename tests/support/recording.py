"""Record which examples each step really gets."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from t5tune.model.loss import IGNORED_LABEL


def record_to(folder: str) -> None:
    """From here on, each rank writes the targets of its micro-batches to a file in the folder."""
    from t5tune.training.trainer import T5Trainer

    path = Path(folder, f"rank-{os.environ.get('RANK', '0')}.jsonl")
    train = T5Trainer.training_step

    def record(self: T5Trainer, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        rows = [[token for token in row if token != IGNORED_LABEL] for row in inputs["labels"].tolist()]
        with open(path, "a") as file:
            file.write(json.dumps([self.state.global_step + 1, [row for row in rows if row]]) + "\n")
        return train(self, model, inputs, *arguments, **options)

    T5Trainer.training_step = record  # type: ignore[method-assign]


def read_recorded(folder: Path) -> dict[int, list[list[int]]]:
    """Read what was recorded: step -> sorted targets of its examples, over all ranks and micro-batches."""
    steps = defaultdict(list)
    for path in folder.iterdir():
        for step, rows in map(json.loads, path.read_text().splitlines()):
            steps[step] += rows
    return {step: sorted(rows) for step, rows in sorted(steps.items())}
