"""The table of a command's result, on stderr: names, sizes and times for a reader; JSON has the result as it is."""

import io
import json
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest

from t5tune.cli.output import Output
from t5tune.errors import Stopped
from t5tune.preparing.cache_reuse import make_resume_error

# one value of each kind
VALUES: dict[str, Any] = {
    "run": Path("run"),
    "adapter": Path("run"),
    "train_loss": 0.19399,
    "eval": {"loss": 0.0011, "exact_match": 98.0, "rougeL": 99.5, "runtime": 5.9, "samples_per_second": 5.8},
    "custom_metrics": {"length": 12.0, "reply_bytes": 2048, "words_per_second": 3.5, "bytes": 7.0},
    "from_training": {"nf4": 0.01},
    "tokens_per_second": 2118.4,
    "peak_memory_bytes": 635_000_000,
    "bytes": 1234,
    "world_size": 1,
    "adapted_tensors": 0,
    "onto": "base",
    "verified": True,
    "up_to_date": False,
    "resumed_from": None,
    "seconds": 247.7,
}


def make_result(**values: Any) -> Any:
    """Make a dataclass with these values, as commands return it."""
    return make_dataclass("Result", [*values])(**values)


def test_the_table_has_names_sizes_and_times_for_a_reader(capsys: pytest.CaptureFixture[str]) -> None:
    stdout = io.StringIO()
    Output(stdout).show(make_result(**VALUES))
    assert stdout.getvalue() == "run\n"
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().err.splitlines())
    assert {name: value.strip() for name, value in rows.items()} == {
        "mean training loss": "0.194",
        "held-out loss": "0.0011",
        "held-out exact match": "98",
        "held-out ROUGE-L": "99.5",
        "length": "12",
        "reply bytes": "2,048",
        "words per second": "3.5",
        "bytes": "7",
        "difference from training, base as nf4": "0.01",
        "tokens per second": "2,118",
        "peak memory per process": "0.59 GiB",
        "size": "1.21 KiB",
        "verified": "yes",
        "time": "4 min 08 s",
    }


def test_a_metric_of_only_one_model_has_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    custom = {"length": 1368.0, "reply_bytes": 5.0, "only_tuned": 1.0}
    base = {"loss": 2.5, "length": 2735.0, "reply_bytes": 3000.0, "only_base": 0.0}
    values = {"predictions": Path("predictions.jsonl"), "loss": 2.25, "bleu": None}
    Output(io.StringIO()).show(make_result(**values, custom_metrics=custom, base=base))
    assert [line.split() for line in capsys.readouterr().err.splitlines()] == [
        ["tuned", "base", "difference"],
        ["loss", "2.25", "2.5", "-0.25"],
        ["length", "1,368", "2,735", "-1,367"],
        ["reply", "bytes", "5", "3,000", "-2,995"],
        ["only", "base", "–", "0", "–"],
        ["only", "tuned", "1", "–", "–"],
    ]


def test_a_long_value_stays_on_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = Path("/a folder/" + "with-a-long-name/" * 5)
    Output(io.StringIO()).show(make_result(**VALUES | {"adapter": long, "world_size": 4}))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(str(long))
    assert any(line.split() == ["processes", "4"] for line in lines)


def test_json_keeps_every_key_and_number() -> None:
    stdout = io.StringIO()
    Output(stdout, json=True).show(make_result(**VALUES))
    found = json.loads(stdout.getvalue())
    assert set(found) == set(VALUES)
    assert found["eval"] == VALUES["eval"]
    assert found["peak_memory_bytes"] == 635_000_000


def test_a_refused_resume_lists_differences_and_choices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = io.StringIO()
    lines = ("seed: 1 before, 2 now", "lora_r: 8 before, 4 now")
    error = make_resume_error(Path("run/checkpoint-7"), lines, ["max_steps"])
    assert Output(stream, json=True).fail(error) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: run/checkpoint-7: the run can't be resumed with different settings or data:",
        "  seed: 1 before, 2 now",
        "  lora_r: 8 before, 4 now",
        "to resume, use the previous settings and data",
        "to resume anyway, add --allow-change max_steps",
        "to start a new run from these weights, use --model-name-or-path run/checkpoint-7 and a new output_dir",
        "to start over, add --fresh; the old run is kept under a new name",
    ]
    shown = json.loads(stream.getvalue())["error"]
    assert shown["kind"] == "SettingsError"
    assert shown["message"].splitlines()[1:] == [*lines]
    assert "add --allow-change max_steps; to start a new run" in shown["hint"]


@pytest.mark.parametrize(
    ("stop", "code", "line", "known"),
    [
        (KeyboardInterrupt(), 130, "interrupted", ("Interrupted", None)),
        (KeyboardInterrupt(15), 143, "interrupted", ("Interrupted", None)),
        (
            Stopped("stopped after step 5 of 9", hint="run the same command to continue"),
            143,
            "stopped after step 5 of 9. Run the same command to continue.",
            ("Stopped", "run the same command to continue"),
        ),
    ],
)
def test_a_stop_is_not_called_an_error(
    stop: BaseException, code: int, line: str, known: tuple[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    assert Output(stream, json=True).fail(stop) == code
    assert capsys.readouterr().err == f"{line}\n"
    shown = json.loads(stream.getvalue())["error"]
    assert (shown["kind"], shown["hint"]) == known
