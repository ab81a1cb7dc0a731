"""Targets that are labels: metrics, tables, pictures and notes, in `evaluate` and in training."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.evaluate import EvaluateResult
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.progress import Event, Note
from t5tune.runs.metrics_log import read_metrics
from t5tune.runs.result import read_result
from t5tune.settings import PrepareSettings
from tests.commands.evaluate.outputs import make_short_settings, read_predictions, run_evaluate
from tests.support.processes.command_line import t5tune_in_fork

pytestmark = pytest.mark.slow


def write_records(path: Path, targets: list[str]) -> Path:
    lines = [json.dumps({"source": f"say {target} to {n}", "target": target}) for n, target in enumerate(targets)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("labels") / "data.jsonl", ["spam", "spam", "spam", "ham", "egg"] * 10)


@pytest.fixture(scope="module")
def run(untied_base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that confuses some labels, stopped early by macro-F1."""
    changes: dict[str, Any] = {
        "max_steps": 40, "eval_steps": 10, "eval_fraction": 0.3, "eval_generate": 8, "train_mode": "full",
        "metric_for_best_model": "macro_f1", "early_stopping_patience": 1, "learning_rate": 5e-3,
        "conversation_template": "plain", "per_device_train_batch_size": 16,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("labels") / "run"
    train(make_short_settings(untied_base, data, folder, **changes))
    return folder


@pytest.fixture(scope="module")
def scores(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateResult:
    return run_evaluate(run, data, tmp_path_factory.mktemp("labels") / "scores")


def test_the_confusion_matrix_counts_the_predictions(scores: EvaluateResult) -> None:
    lines = read_predictions(scores)
    found = Counter((line["target"], line["prediction"]) for line in lines)
    assert scores.labels is not None
    table = scores.labels["all"]
    assert list(table["classes"]) == ["spam", "ham", "egg"]
    assert {(row, column): count for row, counts in table["confusion"].items() for column, count in counts.items()} == {
        pair: count for pair, count in found.items() if pair[1] in table["classes"]
    }
    others = sum(count for pair, count in found.items() if pair[1] not in table["classes"])
    assert sum(each["no_label"] for each in table["classes"].values()) == others
    assert scores.accuracy == scores.exact_match
    assert scores.macro_f1 == pytest.approx(sum(each["f1"] for each in table["classes"].values()) / 3, abs=1e-3)
    saved = json.loads((scores.predictions.parent / "scores.json").read_text())
    assert (saved["labels"], saved["mcc"]) == (scores.labels, scores.mcc)


def test_the_page_of_evaluate_has_a_cell_for_each_count(scores: EvaluateResult) -> None:
    page = (scores.predictions.parent / "report.html").read_text()
    assert scores.labels is not None
    cells = {cell: int(count) for cell, count in re.findall(r"<title>(\w+ → [\w() ]+): (\d+) of \d+</title>", page)}
    confusion, classes = scores.labels["all"]["confusion"], scores.labels["all"]["classes"]
    expected = {f"{row} → {column}": count for row, counts in confusion.items() for column, count in counts.items()}
    expected |= {f"{row} → (no label)": each["no_label"] for row, each in classes.items() if each["no_label"]}
    assert cells == expected
    assert "By class" in page


def test_macro_f1_chooses_the_best_step_and_the_result(run: Path) -> None:
    result = read_result(run)
    lines = {line["step"]: line for line in read_metrics(run) if "eval_loss" in line}
    assert len(lines) > 1
    best = max(lines.values(), key=lambda line: (line["eval_macro_f1"], -line["eval_loss"]))
    assert result.best_step == best["step"]
    assert result.labels == best["eval_labels"]
    assert result.eval["mcc"] == best["eval_mcc"]
    assert sum(each["support"] for each in best["eval_labels"]["all"]["classes"].values()) == 8
    # the labels are the targets of all held-out examples, however few predictions are generated
    assert set(best["eval_labels"]["all"]["classes"]) == {"spam", "ham", "egg"}
    page = (run / "report.html").read_text()
    assert "Confusion matrix" in page
    assert "<th>labels</th>" not in page


def test_the_terminal_shows_the_classes(run: Path, data: Path, tmp_path: Path) -> None:
    done = t5tune_in_fork(
        "evaluate", run, "--data-path", data, "--metrics", "labels", "--use-cpu", "--output-dir", tmp_path / "scores"
    )
    assert done.code == 0, done.stderr
    lines = [line.split() for line in done.stderr.splitlines()]
    assert ["report", str(tmp_path / "scores" / "report.html")] in lines
    assert ["class", "precision", "recall", "F1", "support", "taken", "for"] in lines
    assert [line[4] for line in lines if line[:1] in (["spam"], ["ham"], ["egg"])] == ["30", "10", "10"]
    assert " of 50; always replying 'spam' would give an accuracy of 60" in done.stderr
    assert not [line for line in lines if line[:1] == ["BLEU"]]


def test_one_of_several_datasets_has_metrics_of_labels(run: Path, data: Path, tmp_path: Path) -> None:
    texts = write_records(tmp_path / "texts.jsonl", [f"number {n}" for n in range(70)])
    result = run_evaluate(
        run, texts, tmp_path / "out", data=[{"path": str(data)}, {"path": str(texts)}], data_path=None
    )
    assert result.accuracy is None
    assert result.datasets is not None
    assert [("accuracy" in each, "mcc" in each) for each in result.datasets.values()] == [(True, True), (False, False)]
    assert result.labels is not None
    assert list(result.labels) == ["data"]
    assert result.datasets["data"]["macro_f1"] > 0


def test_labels_that_differ_in_case_are_named_once(untied_base: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.jsonl", ["Not sure", "not  sure", "yes"] * 8)
    events: list[Event] = []
    values = {"model_name_or_path": str(untied_base), "data_path": str(data), "output_dir": tmp_path / "cache"}
    prepare(PrepareSettings(**values), events.append)
    notes = [event.text for event in events if isinstance(event, Note) and "labels" in event.text]
    assert notes == [
        "labels that differ only in case or spaces are different labels: 'Not sure', 'not  sure'; if they mean the "
        "same, spell them alike in the data"
    ]


def test_labels_that_no_held_out_example_has_are_named(untied_base: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.jsonl", ["spam", "ham"] * 20 + ["egg", "bacon"])
    values = {"model_name_or_path": str(untied_base), "data_path": str(data), "eval_fraction": 0.1}
    expected = (
        "no held-out example has the labels 'egg', 'bacon'; use a larger eval_fraction, a different split_seed, or a "
        "file with every label as eval_data_path"
    )
    notes: list[Event] = []
    prepare(PrepareSettings(**values, output_dir=tmp_path / "cache"), notes.append)
    assert Note(expected, warning=True) in notes
    notes.clear()
    train(make_short_settings(untied_base, data, tmp_path / "run", eval_fraction=0.1, max_steps=1), notes.append)
    assert Note(expected, warning=True) in notes
    notes.clear()
    prepare(PrepareSettings(**values | {"eval_fraction": 0.9}, output_dir=tmp_path / "most"), notes.append)
    assert not [note for note in notes if isinstance(note, Note) and "held-out" in note.text]
