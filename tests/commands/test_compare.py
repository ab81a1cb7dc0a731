"""compare shows what differs between runs, groups seeds, and takes metrics from the best step."""

import csv
import io
import json
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from rich.console import Console

from t5tune.cli.results import ComparisonTable
from t5tune.commands.compare import compare
from t5tune.commands.evaluate import evaluate
from t5tune.commands.train import train
from t5tune.errors import SettingsError
from t5tune.progress import Event, Note
from t5tune.settings import CompareSettings, EvaluateSettings
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.train_runs import make_settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(make_settings(untied_base, conversations, run, eval_fraction=0.2, eval_steps=2, save_steps=2))
    return run


def copy_run(trained: Path, folder: Path, losses: list[float | None] | None = None, **settings: Any) -> Path:
    """Copy a run, with these held-out losses in its evaluations, in order, and these settings."""
    shutil.copytree(trained, folder)
    changed = {**yaml.safe_load((folder / "settings.yaml").read_text()), **settings}
    (folder / "settings.yaml").write_text(yaml.safe_dump(changed))
    given = iter(losses or [])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if losses and "eval_loss" in line:
            line["eval_loss"] = next(given)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with two LoRA ranks and three seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    for rank, seed, losses in [
        (4, 1, [3.0, 2.0, 2.5]),
        (4, 2, [3.0, 2.4, 2.2]),
        (4, 3, [3.0, 2.9, 2.1]),
        (8, 1, [1.0, 1.5, None]),
    ]:
        copy_run(trained, folder / f"r{rank}-s{seed}", losses, lora_r=rank, seed=seed)
    (folder / "notes").mkdir()  # a pattern also finds folders that aren't runs
    return folder


def test_seeds_share_a_row_and_the_best_run_is_first(runs: Path, tmp_path: Path) -> None:
    result = compare(CompareSettings(runs=[runs / "*"], csv=tmp_path / "t.csv", html=tmp_path / "t.html"))
    assert result.sorted_by == "loss"
    assert [row.settings for row in result.rows] == [{"lora_r": 8}, {"lora_r": 4}]
    assert [row.seeds for row in result.rows] == [[1], [1, 2, 3]]
    assert [row.best for row in result.rows] == [runs / "r8-s1", runs / "r4-s1"]
    assert result.rows[1].values["best_step"] == [4, 6, 6]
    assert result.rows[1].values["loss"] == [2.0, 2.2, 2.1]
    assert len(result.rows[1].values["seconds"]) == 3
    with open(tmp_path / "t.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["lora_r"], first["loss"], first["loss sd"]) == ("8", "1.0", "")
    assert second["best run"] == str(runs / "r4-s1")
    assert float(second["loss"]) == pytest.approx(mean([2.0, 2.2, 2.1]))
    assert float(second["loss sd"]) == pytest.approx(stdev([2.0, 2.2, 2.1]))
    page = (tmp_path / "t.html").read_text()
    assert page.count("<polyline") >= 8  # the training loss and the held-out loss of four runs
    assert "2.1 ± 0.1" in page
    assert "r4-s1 (best of 3)" in page
    (slowest, _) = compare(CompareSettings(runs=[runs / "*"], sort_by="best_step")).rows[::-1]
    assert slowest.best == runs / "r4-s1"


def test_the_loss_decides_between_equal_metrics_as_in_training(trained: Path, tmp_path: Path) -> None:
    run = copy_run(trained, tmp_path / "run", [3.0, 2.0, 2.5], metric_for_best_model="macro_f1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tied = [line | {"eval_macro_f1": 100.0} if "eval_loss" in line else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in tied))
    (row,) = compare(CompareSettings(runs=[run])).rows
    assert (row.values["best_step"], row.values["loss"]) == ([4], [2.0])


def test_the_terminal_shows_the_table(runs: Path) -> None:
    done = t5tune_in_fork("compare", runs / "*")
    assert done.code == 0, done.stderr
    header, best, other = done.stdout.splitlines()
    assert header.split()[:4] == ["run", "lora_r", "seed", "best"]
    assert best.split()[:4] == ["r8-s1", "8", "1", "2"]
    assert other.split()[:8] == ["r4-s1", "(best", "of", "3)", "4", "1", "2", "3"]
    assert "2.1 ± 0.1" in other


def test_a_sweep_is_its_folder_or_what_the_shell_finds_there(runs: Path) -> None:
    by_shell = sorted(runs.iterdir())
    assert runs / "notes" in by_shell  # for the data folder of a sweep
    shown = [t5tune_in_fork("compare", *words) for words in ([runs], [runs / "*"], by_shell)]
    assert [done.code for done in shown] == [0, 0, 0], shown[-1].stderr
    assert "r8-s1" in shown[0].stdout
    assert shown[0].stdout == shown[1].stdout == shown[2].stdout
    assert f"skipped, because not a run folder: {runs / 'notes'}" in shown[2].stderr


@pytest.mark.parametrize(
    ("width", "is_terminal", "start"),
    [
        (200, True, "run                lora_r  seed"),
        (50, True, "run          r8-s1              r4-s1 (best of 3)\nlora_r "),
        (48, True, "run          r8-s1             r4-s1 (best of  \n                               3)"),
        (40, True, "run          r8-s1           \nlora_r "),
        (50, False, "run                lora_r"),
    ],
)
def test_a_narrow_terminal_gets_a_column_for_each_row(width: int, is_terminal: bool, start: str, runs: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=is_terminal, soft_wrap=True, highlight=False)
    console.print(ComparisonTable(compare(CompareSettings(runs=[runs / "*"]))))
    assert text.getvalue().startswith(start)
    if is_terminal:
        assert max(map(len, text.getvalue().split("\n"))) <= width
    assert "2.1 ± 0.1" in text.getvalue()


def test_a_resumed_run_has_no_time(trained: Path, tmp_path: Path) -> None:
    run = copy_run(trained, tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "resumed_from": result["run"] + "/checkpoint-2"}))
    (row,) = compare(CompareSettings(runs=[run])).rows
    assert row.values.keys() & {"seconds", "peak_memory_bytes"} == {"peak_memory_bytes"}


def test_scores_of_evaluate_join_their_run(runs: Path, conversations: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "r4-s1", tmp_path / "run")
    found = evaluate(
        EvaluateSettings(
            model_name_or_path=str(run),
            data_path=[str(conversations)],
            output_dir=run / "scores",
            num_data=4,
            metrics=["exact_match"],
            use_cpu=True,
            max_new_tokens=4,
        )  # fmt: skip
    )
    (row,) = compare(CompareSettings(runs=[run])).rows
    assert row.values["evaluate loss"] == [found.loss]
    assert row.values["evaluate exact_match"] == [found.exact_match]


def test_an_unfinished_run_is_compared_with_a_note(trained: Path, tmp_path: Path) -> None:
    run = copy_run(trained, tmp_path / "run")
    (run / "result.json").unlink()
    notes = list[Event]()
    (row,) = compare(CompareSettings(runs=[run]), notes.append).rows
    assert "seconds" not in row.values
    assert notes == [
        Note(
            f"{run}: not finished: its metrics are those up to step 6; to finish it, run its command again",
            warning=True,
        )
    ]


def test_runs_with_other_held_out_examples_are_marked(
    trained: Path, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    train(make_settings(untied_base, conversations, other, eval_fraction=0.2, split_seed=5, max_steps=1))
    notes = list[Event]()
    compare(CompareSettings(runs=[trained, other]), notes.append)
    assert any(isinstance(note, Note) and "have different held-out examples" in note.text for note in notes)


def test_runs_of_different_objectives_are_refused(trained: Path, tmp_path: Path) -> None:
    other = copy_run(trained, tmp_path / "other", objective="dpo")
    with pytest.raises(SettingsError, match=f"different objectives: {trained} has sft, {other} has dpo"):
        compare(CompareSettings(runs=[trained, other]))
