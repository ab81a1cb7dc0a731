"""evaluate says how many of the examples the run was trained on, wherever they are."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.progress import Event, Note
from t5tune.settings import PrepareSettings
from tests.commands.evaluate.outputs import run_evaluate
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow


def write_pairs(path: Path, numbers: range) -> Path:
    rows = [{"source": f"count {number}", "target": f"{number} lamps"} for number in numbers]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["source", "target"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def evaluate_on(model: Path, data: Path, output: Path, **changes: Any) -> list[str]:
    """Return the notes about trained examples."""
    events: list[Event] = []
    run_evaluate(model, data, output, events.append, **{"max_new_tokens": 2, **changes})
    return [event.text for event in events if isinstance(event, Note) and "trained on" in event.text]


@pytest.mark.parametrize("place", ["run", "elsewhere"])
def test_trained_examples_are_found_in_any_file(place: str, untied_base: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", write_pairs(tmp_path / "data.jsonl", range(8))
    elsewhere = {"preprocessed_path": tmp_path / "elsewhere"} if place == "elsewhere" else {}
    train(make_settings(untied_base, data, run, max_steps=1, **elsewhere))
    assert evaluate_on(run, write_pairs(tmp_path / "new.jsonl", range(8, 12)), tmp_path / "a") == []
    copied = write_pairs(tmp_path / "copied.csv", range(4, 12))
    note = "the run was trained on 4 of 8 examples; scores of other data say more"
    assert evaluate_on(run, copied, tmp_path / "b") == [note]
    note = "the run was trained on all 3 examples; scores of other data say more"
    assert evaluate_on(run, copied, tmp_path / "c", num_data=3) == [note]
    settings = {"model_name_or_path": str(untied_base), "data_path": str(copied), "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**settings))
    assert evaluate_on(run, tmp_path / "cache", tmp_path / "d", num_data=3) == [note]


def test_held_out_examples_are_not_trained_examples(untied_base: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", write_pairs(tmp_path / "data.jsonl", range(8))
    train(make_settings(untied_base, data, run, max_steps=1, eval_fraction=0.25, eval_steps=1))
    note = "the run was trained on 6 of 8 examples; scores of other data say more"
    assert evaluate_on(run, data, tmp_path / "scores") == [note]
    assert evaluate_on(run, run / "data", tmp_path / "held out") == []


def test_trained_texts_with_labels_are_found(untied_base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"count {number}", "label": "ab"[number % 2]} for number in range(8)]
    data, new = tmp_path / "data.jsonl", tmp_path / "new.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    new.write_text("\n".join(map(json.dumps, [*rows[:2], {"text": "other", "label": "a"}])))
    train(make_settings(untied_base, data, tmp_path / "run", max_steps=1, objective="classify"))
    note = "the run was trained on 2 of 3 examples; scores of other data say more"
    assert evaluate_on(tmp_path / "run", new, tmp_path / "scores", max_new_tokens=None) == [note]
