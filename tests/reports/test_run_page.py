"""The metrics log, and report.html of a run: its content is correct, it needs no network, and a browser renders it."""

import html
import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from t5tune.commands.train import train
from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import DependencyError, Stopped
from t5tune.formatting import format_number, format_size
from t5tune.progress import Advanced, silent
from t5tune.reports.page import STYLE
from t5tune.reports.run_page import format_command, write_run_report
from t5tune.reports.svg import Series, draw_confusion_matrix, draw_line_chart, format_short
from t5tune.runs.folder import RunFolder
from t5tune.runs.metrics_log import MetricsLog, read_metrics
from t5tune.runs.result import read_result
from t5tune.settings import TrainSettings, load_settings
from tests.support.processes.command_line import parse_words, t5tune_in_fork
from tests.support.processes.runs import stop_at
from tests.support.servers.browser import Browser
from tests.support.train_runs import make_settings, read_losses, read_metrics_lines

pytestmark = pytest.mark.slow

CANARY = "hf_canary0123456789"
CHARTS = [
    "Loss", "Learning rate", "Gradient norm", "Tokens per second", "Peak memory (GiB)", "Source length",
    "Target length",
]  # fmt: skip


class Page(HTMLParser):
    """Parses the page: the lines of each chart, and the cells of its tables."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.text = (run / "report.html").read_text()
        self.charts: dict[str, list[list[str]]] = {}
        self.cells: list[str] = []
        self.names: set[str] = set()
        self._in_cell = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.names.add(tag)
        if tag == "svg":
            self.charts[str(values["aria-label"])] = []
        elif tag == "polyline":
            list(self.charts.values())[-1].append(str(values["points"]).split())
        elif tag in {"td", "th"}:
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


def rewrite_report(run: Path, copy: Path, files: dict[str, list[Any]], **changes: Any) -> Page:
    """Write the report of a copy of the run, with other files and other values in its result."""
    shutil.copytree(run, copy)
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines) if name.endswith("l") else json.dumps(lines)
        (copy / name).write_text(text)
    settings, result = RunFolder(copy).read_settings(TrainSettings), json.loads((copy / "result.json").read_text())
    assert settings is not None
    values = result | changes | {"eval": result["eval"] | changes.get("eval", {})}
    write_run_report(copy, make_run_plan(settings), values, open_examples(copy / "data"), has_held_out=True)
    return Page(copy)


@pytest.fixture(scope="module")
def run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "reported"
    chosen = make_settings(untied_base, conversations, folder, eval_fraction=0.3, eval_steps=3, report_samples=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", CANARY)
        train(chosen)
    return folder


def test_the_page_shows_metrics_settings_and_lengths(run: Path) -> None:
    page = Page(run)
    assert list(page.charts) == CHARTS
    assert [len(line) for line in page.charts["Loss"]] == [6, 2]
    assert all(len(page.charts[name][0]) == 6 for name in CHARTS[1:5])
    heights = [float(point.split(",")[1]) for point in page.charts["Loss"][0]]
    assert (heights[0] < heights[-1]) is (read_losses(run)[0] > read_losses(run)[-1])
    result = json.loads((run / "result.json").read_text())
    bars = re.findall(r"<title>[\d,]+–[\d,]+: (\d+)</title>", page.text)
    assert sum(map(int, bars)) == 2 * result["examples"]
    assert f"{result['eval']['loss']:.4g}" in page.cells
    assert {"0.01", "8", *TrainSettings.model_fields} <= set(page.cells)
    tiles = dict(re.findall(r"<div><b>([^<]*)</b><span>([^<]*)</span></div>", page.text))
    assert tiles[format_size(result["peak_memory_bytes"])] == "peak memory per process"
    assert "runtime" not in page.text


def test_the_page_is_one_file_without_scripts_links_or_secrets(run: Path) -> None:
    page = Page(run)
    assert not page.names & {"script", "link", "img", "iframe", "object", "a"}
    assert [part for part in ("://", "@import", "url(", CANARY) if part in page.text] == []


def test_sample_predictions_equal_stock_predictions(run: Path, untied_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    samples = json.loads((run / "samples.json").read_text())
    assert [sample["worst_of"] for sample in samples] == [*[None] * 5, *[12] * 5]  # 12 examples are held out
    losses = [sample["loss"] for sample in samples]
    assert losses[5:] == sorted(losses, reverse=True)[:5]
    cells = Page(run).cells
    tokenizer = AutoTokenizer.from_pretrained(run)
    base = AutoModelForSeq2SeqLM.from_pretrained(untied_base).eval()

    def reply(model: Any, source: str) -> str:
        ids = model.generate(**tokenizer(source, return_tensors="pt"), max_new_tokens=20, do_sample=False)
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))

    before = [reply(base, sample["source"]) for sample in samples]
    tuned = PeftModel.from_pretrained(base, str(run)).eval()
    for sample, first in zip(samples, before, strict=True):
        for name, found in (("before", first), ("after", reply(tuned, sample["source"]))):
            # the page may truncate the prediction at a different length
            short, long = sorted((found.strip(), sample[name].strip()), key=len)
            assert long.startswith(short), name
            assert sample[name] in cells


def test_the_result_and_the_table_have_the_best_step(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    chosen = {"eval_fraction": 0.3, "eval_steps": 1, "max_steps": 4, "learning_rate": 1.0}
    settings = make_settings(untied_base, conversations, tmp_path / "run", **chosen, lora_r=4, seed=7, split_seed=8)
    result = train(settings)
    losses = {line["step"]: line["eval_loss"] for line in read_metrics_lines(tmp_path / "run") if "eval_loss" in line}
    assert result.best_step == min(losses, key=losses.__getitem__) != 4
    assert result.best_eval is not None
    assert result.best_eval["loss"] == losses[result.best_step]
    assert result.eval["loss"] == losses[4]  # the result has the weights of the last step
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (saved["best_step"], saved["best_eval"]) == (result.best_step, result.best_eval)
    assert (saved["seed"], saved["split_seed"]) == (7, 8)
    assert (saved["lora"]["lora_r"], saved["lora"]["lora_target_modules"]) == (4, ["q", "v"])
    assert read_result(tmp_path / "run") == result
    cells = Page(tmp_path / "run").cells
    assert [cell for cell in cells if cell.endswith("(best)")] == [f"{result.best_step} (best)"]
    assert cells[cells.index("step") + 1] == "epoch"
    epochs = {line["step"]: line["epoch"] for line in read_metrics_lines(tmp_path / "run") if "eval_loss" in line}
    assert cells[cells.index("4") + 1] == format_number(epochs[4])


@pytest.mark.parametrize(("fraction", "kind"), [(0.2, "held-out"), (0.0, "training")])
def test_the_page_says_which_examples_are_sampled(
    fraction: float, kind: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """Held-out examples are sampled even if the run doesn't evaluate them."""
    chosen = {"eval_fraction": fraction, "eval_strategy": "no", "max_steps": 1, "report_samples": 2}
    result = train(make_settings(untied_base, conversations, tmp_path / "run", **chosen, train_mode="full"))
    assert f"Greedy predictions for {kind} examples" in Page(tmp_path / "run").text
    assert (result.best_step, result.best_eval, result.lora) == (None, None, None)


def test_sample_predictions_do_not_change_training(
    run: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    quiet = make_settings(untied_base, conversations, tmp_path / "run", eval_fraction=0.3, eval_steps=3)
    train(quiet)
    assert not (tmp_path / "run" / "samples.json").exists()
    assert "before training" not in Page(tmp_path / "run").text
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "run"))
    assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_renders_the_page(dark: bool, run: Path) -> None:
    with Browser.start() as browser:
        page = browser.open((run / "report.html").as_uri(), width=480, dark=dark)
        heights = page.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)")
        assert len(heights) == len(CHARTS)
        assert min(heights) > 100
        assert page.evaluate("document.documentElement.scrollWidth") <= 480
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0
        assert page.is_dark() is dark


def test_the_metrics_log_survives_resumes_and_truncation(tmp_path: Path) -> None:
    journal = MetricsLog(tmp_path, seconds_between_heartbeats=0)
    journal.write(1, {"loss": 3.0})
    journal.write_heartbeat(1)
    journal.write(2, {"loss": 2.0})
    journal.write(2, {"eval_loss": 2.5})
    journal.write(1, {"loss": 2.9})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert [line.get("heartbeat", False) for line in lines] == [False, True, False, False, False]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"]) for line in lines)
    assert [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(tmp_path)] == [
        (1, 2.9, None),
        (2, 2.0, 2.5),
    ]
    journal.write(4, {"loss": float("nan"), "grad_norm": float("inf")})
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail).items() >= {"step": 4, "loss": None, "grad_norm": None}.items()
    quiet = MetricsLog(tmp_path, seconds_between_heartbeats=1000)
    quiet.write_heartbeat(5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(lines) + 2


def test_slow_steps_write_heartbeats(
    untied_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricsLog.__init__, "__defaults__", (0.0, silent))
    train(make_settings(untied_base, conversations, tmp_path / "run", max_steps=4, logging_steps=100))
    assert [line["step"] for line in read_metrics_lines(tmp_path / "run") if "heartbeat" in line] == [1, 2, 3, 4]


def test_progress_in_a_log_file_is_plain_lines(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    done = t5tune_in_fork(
        "train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", tmp_path / "run",
        "--max-steps", "4", "--logging-steps", "2", "--report-samples", "0", "--use-cpu",
        env={"TERM": "xterm-256color", "CI": "true"},
    )  # fmt: skip
    assert done.code == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("train: step")]
    assert [line.split()[2] for line in lines] == ["1", "2", "4"]
    assert all("loss" in line and "tokens/s" in line for line in lines)
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr


def test_a_missing_tracker_is_refused_before_anything_is_written(
    untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    missing = [name for name in ("wandb", "mlflow", "trackio") if importlib.util.find_spec(name) is None]
    for name in missing:
        with pytest.raises(DependencyError, match=f"{name} isn't installed") as caught:
            train(make_settings(untied_base, conversations, tmp_path / "run", report_to=[name]))
        assert f"pip install {name}" in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


def test_charts_omit_infinite_values_and_thin_out_long_series() -> None:
    long = [(float(step), 2.0) for step in range(10_000)]
    assert len(re.findall(r"[\d.]+,[\d.]+", draw_line_chart("A", [Series("a", long)]))) <= 301
    assert draw_line_chart("A", [Series("a", [(1, float("nan"))])]) == ""
    (points,) = re.findall(r'points="(.*?)"', draw_line_chart("A", [Series("a", [(1, 1), (2, float("inf")), (3, 2)])]))
    assert len(points.split()) == 2
    assert [format_short(value) for value in (0.00015, 12.5, 1200, 8718.9, 81_000, 3.2e6)] == [
        "0.00015", "12.5", "1,200", "8,719", "81k", "3.2M",
    ]  # fmt: skip


def test_large_falls_of_the_loss_get_a_log_scale() -> None:
    def heights(*values: float) -> list[float]:
        chart = draw_line_chart("A", [Series("a", list(enumerate(values)))], allow_log=True)
        return [float(place.split(",")[1]) for place in re.findall(r'points="(.*?)"', chart)[0].split()]

    first, second, third = heights(10, 0.1, 0.001)
    assert second - first == pytest.approx(third - second, abs=0.2)
    first, second, third = heights(10, 6, 2)
    assert second - first == pytest.approx(third - second, abs=0.2)
    assert heights(1000, 0, 0)[1] == heights(1000, 0, 0)[2]  # zero has no logarithm, so the axis is linear


def test_a_noisy_line_has_a_smooth_line_over_its_values() -> None:
    # falls from 2 to 1, with an outlier
    losses = [(step, 2 - step / 100 + (50 if step == 40 else 0.1 * (step % 2))) for step in range(100)]
    series = [
        Series("training", losses, is_smoothed=True),
        Series("held out", [(50, 1.6), (99, 1.1)], is_marked=True),
    ]
    chart = draw_line_chart("Loss", series)
    assert "training: running median of 5 values; faint: each logged value" in chart
    assert re.findall(r'<polyline class="(.*?)"', chart) == ["raw line-0", "line-0", "line-1"]
    raw, smooth, _ = (
        [float(place.split(",")[1]) for place in points.split()] for points in re.findall('points="(.*?)"', chart)
    )
    assert len(raw) == len(smooth) == 100
    assert smooth[0] == raw[0]
    assert min(raw) == raw[40] < min(smooth) - 100  # the outlier is only in the faint line
    assert chart.rindex("<circle") > chart.rindex("<polyline")
    assert re.findall(r"<title>(.*?)</title>", chart) == ["held out: 1.6 at step 50", "held out: 1.1 at step 99"]
    short = draw_line_chart("Loss", [Series("training", losses[:10], is_smoothed=True)])
    assert "running median" not in short
    assert re.findall(r'<polyline class="(.*?)"', short) == ["line-0"]


def test_a_confusion_matrix_shows_the_counts_of_the_first_classes() -> None:
    def read_cells(figure: str) -> list[tuple[str, ...]]:
        return re.findall(r'<rect class="(bar-\d)" fill-opacity="([\d.]+)".*?<title>(.*?)</title>', figure)

    counts = {"a<b": {"a<b": 3, "c": 1}, "c": {"(no label)": 2}}
    figure = draw_confusion_matrix("Labels", counts, ["(no label)"])
    assert read_cells(figure) == [
        ("bar-0", "0.55", "a&lt;b → a&lt;b: 3 of 4"),
        ("bar-5", "0.25", "a&lt;b → c: 1 of 4"),
        ("bar-5", "0.70", "c → (no label): 2 of 2"),
    ]
    assert re.findall(r'<text class="count"[^>]*>(\d+)<', figure) == ["3", "1", "2"]
    many = {f"class {number}": {f"class {number}": 1} for number in range(120)}
    figure = draw_confusion_matrix("Labels", many)
    assert len(read_cells(figure)) == 100
    assert "only the first 100 of 120 classes" in figure
    assert 'class="count"' not in figure


def test_the_command_gives_the_settings_of_the_run(run: Path) -> None:
    def parse(settings: TrainSettings) -> TrainSettings:
        script = "t5tune() { printf '%s\\0' \"$@\"; }\n" + format_command(settings)
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        command, *words = done.stdout.removesuffix("\0").split("\0")
        assert command == "train"
        parsed = parse_words(words, TrainSettings)
        return load_settings(TrainSettings, flags=parsed.values, problems=parsed.problems)[0]

    settings = RunFolder(run).read_settings(TrainSettings)
    assert settings is not None
    assert parse(settings) == settings
    unusual = TrainSettings(
        model_name_or_path="a 'model'", data_path=["my data.jsonl", "-odd.jsonl"], output_dir=Path("run"),
        source_prefix="fix:\nthis\t", bf16=True, add_tokens=["\n", "{"], lora_target_modules=["q", "v"],
        gradient_checkpointing=True, eval_fraction=0.1,
    )  # fmt: skip
    assert parse(unusual) == unusual
    empty = unusual.model_copy(update={"report_to": [], "metric": [], "add_tokens": []})
    assert parse(empty) == empty
    in_fp32 = unusual.model_copy(update={"q_lora": True, "bf16": False})  # q_lora alone would turn bf16 on
    assert parse(in_fp32) == in_fp32
    in_yaml = unusual.model_copy(update={"training_args": {"adam_beta2": 0.99}})
    assert parse(in_yaml) == unusual
    assert format_command(in_yaml).endswith('\n# and in YAML, given with --config: training_args: {"adam_beta2": 0.99}')
    once = unusual.model_copy(update={"fresh": True, "allow_change": ["max_steps"]})
    assert format_command(once) == format_command(unusual)
    assert html.escape(format_command(settings)) in Page(run).text


def test_the_table_has_a_column_for_each_metric(run: Path, tmp_path: Path) -> None:
    lines = [
        {"step": step, "eval_loss": 1.0, "eval_runtime": 77.7, "eval_samples_per_second": 7.7, **more}
        for step, more in ((3, {"eval_first_score": 31.0}), (6, {"eval_words_per_second": 41.0}))
    ]
    cells = rewrite_report(run, tmp_path / "run", {"metrics.jsonl": lines}, best_step=3).cells
    start = cells.index("step")
    rows = [cells[start + 5 * number : start + 5 * (number + 1)] for number in range(3)]
    assert rows == [
        ["step", "epoch", "loss", "first score", "words per second"],
        ["3 (best)", "–", "1", "31", "–"], ["6", "–", "1", "–", "41"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "evaluated"), [("eval_data_path", [3, 4, 5, 6]), ("metric_for_best_model", [1, 2, 3, 4, 5, 6])]
)
def test_evaluations_on_different_examples_have_separate_curves(
    change: str, evaluated: list[int], untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    """A different metric for the best model is measured on the same examples."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(conversations.read_text().splitlines(keepends=True)[:6]))
    folder = tmp_path / "run"
    first = make_settings(untied_base, conversations, folder, eval_data_path=[str(conversations)], eval_steps=1)
    with pytest.raises(Stopped):
        train(first, stop_at(Advanced("train", 3)))
    values = {"eval_data_path": [str(few)], "metric_for_best_model": "loss"}
    result = train(first.replace(**{change: values[change]}))
    assert result.resumed_from == folder / "checkpoint-3"
    lines = result.metrics()
    assert [line["step"] for line in lines if "eval_loss" in line] == evaluated
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [len(line) for line in Page(folder).charts["Loss"]] == [6, len(evaluated)]


def test_markup_in_the_data_is_shown_as_text(run: Path, tmp_path: Path) -> None:
    samples = [
        {"source": "<script>1</script>", "target": '"<b>', "before": "", "after": "<img src=x>", "loss": None,
         "worst_of": worst_of}
        for worst_of in (None, 20)
    ]  # fmt: skip
    page = rewrite_report(run, tmp_path / "run", {"samples.json": samples}, eval={"<i>": 1.0})
    assert not page.names & {"script", "img", "i"}
    assert page.cells.count("<script>1</script>") == 2
    assert "(empty)" in page.cells
    assert "The worst 1 of 20 examples, by loss" in page.text


@pytest.mark.parametrize("value", [1e-300, 1e-30, 3e-12, 1.0, 5e20])
def test_a_chart_of_one_tiny_value_has_an_axis(value: float) -> None:
    figure = draw_line_chart("Learning rate", [Series("rate", [(1, value), (2, value)])])
    heights = [float(y) for y in re.findall(r'<line class="grid"[^>]* y1="([\d.]+)"', figure)]
    assert len(heights) >= 3
    assert len(set(heights)) == len(heights)


def test_each_line_has_a_color_of_the_page() -> None:
    series = [Series(f"dataset {number}", [(1, number), (2, number + 1)]) for number in range(8)]
    figure = draw_line_chart("Loss", series)
    used = re.findall(r'polyline class="(line-\d)"', figure)
    assert used == [f"line-{number % 6}" for number in range(8)]
    assert all(f".{name} {{ stroke: var(--c{name[-1]}); }}" in STYLE for name in used)
