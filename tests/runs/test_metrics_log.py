"""metrics.jsonl: its curves can be drawn, and a run has one summary line, however often it was killed."""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from t5tune.commands.train import train
from t5tune.runs.metrics_log import read_metrics
from t5tune.runs.result import read_result
from tests.support.paths import REPOSITORY
from tests.support.train_runs import make_settings, read_metrics_lines

pytestmark = pytest.mark.slow

LOGGED, EVALUATED = [1, 2, 4, 6], [3, 6]


@pytest.fixture(scope="module")
def run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps are logged at other steps than its evaluations."""
    folder = tmp_path_factory.mktemp("metrics") / "run"
    train(make_settings(untied_base, conversations, folder, eval_fraction=0.2, eval_steps=3, logging_steps=2))
    return folder


def execute_in_notebook(*cells: str) -> Any:
    """Execute cells in a Jupyter kernel. Return the outputs of the last one."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=500).execute()
    return notebook.cells[-1].outputs


def test_a_curve_has_the_steps_that_have_the_metric(run: Path) -> None:
    metrics = read_metrics(run)
    for name, expected in (("loss", LOGGED), ("eval_loss", EVALUATED), ("eval_rougeL", [])):
        steps, values = metrics.curve(name)
        assert steps == expected
        assert values == [line[name] for line in read_metrics_lines(run) if name in line]
    assert read_result(run).metrics() == metrics


def test_the_documented_plot_draws_training_and_evaluation_losses(run: Path) -> None:
    page = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    (plot,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "plt.plot" in block)
    read_lines = "[(line.get_label(), line.get_xydata().tolist()) for line in plt.gca().lines]"
    outputs = execute_in_notebook(f"from t5tune import read_result\nrun = read_result({str(run)!r})", plot + read_lines)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    (lines,) = (output.data["text/plain"] for output in outputs if output.output_type == "execute_result")
    drawn = {label: [point[0] for point in points] for label, points in ast.literal_eval(lines)}
    assert drawn == {"loss": LOGGED, "eval_loss": EVALUATED}


@pytest.mark.parametrize("has_summary", [True, False], ids=["after the summary", "before the summary"])
def test_a_run_killed_before_its_export_logs_one_summary(
    has_summary: bool, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    settings = make_settings(untied_base, conversations, tmp_path / "run", max_steps=2)
    train(settings)
    lines = read_metrics_lines(tmp_path / "run")
    kept = [line for line in lines if has_summary or "train_loss" not in line]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for name in ("result.json", "adapter_model.safetensors", "report.html"):
        (tmp_path / "run" / name).unlink()
    assert train(settings).resumed_from == tmp_path / "run" / "checkpoint-2"
    after = read_metrics_lines(tmp_path / "run")
    summaries = [line for line in after if "train_loss" in line]
    assert len(summaries) == 1
    assert summaries[0]["train_loss"] == lines[-1]["train_loss"]
    if has_summary:
        assert [line for line in after if "resumed" not in line] == lines


def test_steps_after_the_resumed_step_do_not_count(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    settings = make_settings(untied_base, conversations, tmp_path / "run", max_steps=5, save_steps=2, logging_steps=1)
    train(settings)
    shutil.rmtree(tmp_path / "run" / "checkpoint-5")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "result.json").unlink()
    train(settings.replace(max_steps=3, allow_change=["max_steps"]))
    assert read_metrics(tmp_path / "run").curve("loss")[0] == [1, 2, 3]
