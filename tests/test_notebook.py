"""examples/notebook runs in a real kernel, and so do other lines that a researcher would type."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow

NOTEBOOK = REPOSITORY / "examples" / "notebook" / "tune.ipynb"
OTHER_LINES = {
    "a typo": "TrainSettings(model_name_or_path='pocket', data_path='pocket', output_dir='r', learning_rat=1)",
    "a wrong path": "train(TrainSettings(model_name_or_path='pocket', data_path='no.csv', output_dir='r'))",
    "again": "train(settings, progress_bar()).steps",
    "a list": "train(TrainSettings(model_name_or_path='pocket', data_path=[{'source': 'a', 'target': 'b'}] * 8, "
    "output_dir='tiny', max_steps=1)).examples",
    "a loss curve": "[line['loss'] for line in run.metrics()][0] > [line['loss'] for line in run.metrics()][-1]",
    "the model": "model.generate(**tokenizer('Hello', return_tensors='pt'), max_new_tokens=2).shape[0]",
    "help": "import inspect; print(inspect.signature(TrainSettings))",
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The notebook's code cells and then OTHER_LINES, executed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for line in OTHER_LINES.values():
        cell = nbformat.v4.new_code_cell(line)
        cell.metadata["tags"] = ["raises-exception"]
        notebook.cells.append(cell)
    folder = tmp_path_factory.mktemp("notebook")
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def find_cell(cells: list[Any], text: str) -> Any:
    return next(cell for cell in cells if text in cell.source)


def read_value(cell: Any) -> str:
    """The value of the cell's last line, as text."""
    return str(next(output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"))


def read_error(cell: Any) -> str:
    (error,) = (output for output in cell.outputs if output.output_type == "error")
    return "\n".join(error.traceback)


@pytest.mark.long
def test_nothing_is_shown_on_stderr(cells: list[Any]) -> None:
    """Jupyter shows it in red."""
    assert [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"] == []


@pytest.mark.long
def test_training_shows_bars_as_widgets_and_evaluations_as_lines(cells: list[Any]) -> None:
    outputs = find_cell(cells, "run = train(").outputs
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert re.findall(r"^step (\d+): held-out loss [\d.]+, perplexity [\d.]+", text, re.MULTILINE) == ["50", "100"]


@pytest.mark.long
def test_the_notebook_shows_the_metrics_and_the_report(cells: list[Any]) -> None:
    table = read_value(find_cell(cells, "run.metrics()"))
    assert re.search(r"^10 +100 +[\d.]+ +[\d.]+ ", table, re.MULTILINE)
    assert any("image/png" in output.get("data", {}) for output in find_cell(cells, "metrics.curve(").outputs)
    (report,) = find_cell([cell for cell in cells if cell.source == "run"], "run").outputs
    assert report.data["text/html"].startswith("<iframe srcdoc=")
    assert report.data["text/plain"].startswith("TrainResult(run=")


@pytest.mark.long
def test_the_model_replies_and_a_data_frame_is_trained_on(cells: list[Any]) -> None:
    (reply,) = find_cell(cells, "chatter.reply").outputs
    assert reply.text.startswith("{\n")
    assert read_value(find_cell(cells, "pairs = ")).startswith("(99, ")
    said = str(find_cell(cells, "pairs = ").outputs)
    assert "1 record rejected (not text: 1): sums/data/records/rejected.jsonl" in said
    assert read_value(find_cell(cells, "merged.checkpoint")) == "PosixPath('merged')"


@pytest.mark.long
def test_a_mistake_is_one_line(cells: list[Any]) -> None:
    typo = read_error(find_cell(cells, OTHER_LINES["a typo"]))
    assert typo == "SettingsError: learning_rat: unknown setting; did you mean learning_rate?"
    path = read_error(find_cell(cells, OTHER_LINES["a wrong path"]))
    assert path == "DataError: data_path: no.csv: no such file or folder; check the path's spelling"


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "value"), [("again", "100"), ("a list", "8"), ("a loss curve", "True"), ("the model", "1")]
)
def test_other_lines_work_too(line: str, value: str, cells: list[Any]) -> None:
    assert read_value(find_cell(cells, OTHER_LINES[line])) == value


@pytest.mark.long
def test_the_settings_are_shown_with_their_types(cells: list[Any]) -> None:
    (shown,) = find_cell(cells, OTHER_LINES["help"]).outputs
    assert shown.text.startswith("(*, model_name_or_path: str, data_path: list[str] | str, output_dir: str | ")


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)
    assert Path(NOTEBOOK.parent / "README.md").is_file()
