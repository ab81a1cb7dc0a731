"""Custom metrics: how they are found and called, and that each mistake is one line with the next step."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from t5tune.custom_metrics import compute_custom_metrics, load_custom_metric, try_custom_metrics
from t5tune.errors import SettingsError

MODULE = """
import math
import sys

def good(predictions, references):
    return {"ratio": len(predictions[0]) / len(references[0]), "count": len(predictions)}

def same(predictions, references):
    return {"ratio": 1}

def changes(predictions, references):
    predictions.clear(); references.append("")
    return {"rest": len(predictions)}

def numpy(predictions, references):
    import numpy
    return {"small": numpy.float32(0.5), "whole": numpy.int64(3)}

def fails(predictions, references):
    return {"mean": sum([]) / len([])}

def fails_below(predictions, references):
    return {"x": math.sqrt(-1)}

def exits(predictions, references):
    sys.exit(3)

def nothing(predictions, references): pass
def number(predictions, references): return 0.5
def empty(predictions, references): return {}
def text(predictions, references): return {"x": "high"}
def spaced(predictions, references): return {"my score": 1}
def built_in(predictions, references): return {"bleu": 1}
def prefixed(predictions, references): return {"eval_x": 1}
def not_a_number(predictions, references): return {"x": float("nan")}
def huge(predictions, references): return {"x": 10**5000}
VALUE = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with my_metric.py in it. After a test, modules imported from it are forgotten."""
    (tmp_path / "my_metric.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    before = {*sys.modules}
    yield tmp_path
    load_custom_metric.cache_clear()
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("place", ["my_metric", "my_metric.py", "./my_metric.py"])
def test_a_function_is_found_in_the_current_folder(place: str) -> None:
    assert compute_custom_metrics([f"{place}:good"], ["ab", ""], ["abcd", ""]) == {"ratio": 0.5, "count": 2.0}


def test_a_file_elsewhere_can_import_its_neighbors_and_define_dataclasses(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "neighbor.py").write_text("SCORE = 7")
    (folder / "more" / "json.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbor import SCORE\n"
        "@dataclass\nclass Result:\n    value: int\n"
        "def f(predictions, references):\n    import json\n    return {'x': Result(SCORE).value + len(json.dumps(1))}\n"
    )
    assert compute_custom_metrics(["more/json.py:f"], ["a"], ["a"]) == {"x": 8.0}


def test_the_current_folder_comes_before_the_folder_of_a_file(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "my_metric.py").write_text("def f(p, r): return {'x': 1}")
    (folder / "more" / "other.py").write_text("def f(p, r): return {'y': 2}")
    scores = compute_custom_metrics(["more/other.py:f", "my_metric:good"], ["a"], ["a"])
    assert scores == {"y": 2, "ratio": 1, "count": 1}


def test_a_folder_of_the_user_does_not_replace_a_library(folder: Path) -> None:
    (folder / "sacrebleu.py").write_text("raise RuntimeError('not the library')")
    compute_custom_metrics(["my_metric:good"], ["a"], ["a"])
    sys.modules.pop("sacrebleu", None)
    import sacrebleu

    assert "site-packages" in str(sacrebleu.__file__)


def test_numpy_numbers_are_numbers_and_the_texts_are_copies() -> None:
    predictions = ["a", "b"]
    scores = compute_custom_metrics(["my_metric:changes", "my_metric:numpy"], predictions, predictions)
    assert scores == {"rest": 0.0, "small": 0.5, "whole": 3.0}
    assert predictions == ["a", "b"]
    assert not any(isinstance(value, np.generic) for value in scores.values())


def test_a_trial_uses_two_references_and_returns_the_names() -> None:
    assert try_custom_metrics(["my_metric:good", "my_metric:not_a_number"], ["a", "b", "c"]) == ["ratio", "count", "x"]
    with pytest.raises(SettingsError, match="'x' is nan") as caught:
        compute_custom_metrics(["my_metric:not_a_number"], ["a"], ["a"])
    assert caught.value.hint.startswith("return a dict of names and finite numbers")
    assert caught.value.exit_code == 2
    (value,) = compute_custom_metrics(["my_metric:not_a_number"], ["a"], ["a"], allow_non_finite=True).values()
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ("my_metric:xyz", "no such function in my_metric.py; it has good, same, changes, numpy, fails and "),
        ("my_metric:fails", "failed on 2 predictions and references: ZeroDivisionError: "),
        ("my_metric:fails", "(my_metric.py:20); fix the function and run the command again"),
        ("my_metric:fails_below", "(my_metric.py:23)"),
        ("my_metric:exits", "SystemExit: 3 (my_metric.py:26)"),
        ("my_metric:nothing", "metric: my_metric:nothing: returned None; return a dict of names and finite numbers"),
        ("my_metric:number", "returned 0.5; return a dict"),
        ("my_metric:empty", "returned an empty dict; return a dict"),
        ("my_metric:text", "'x' is 'high'; return a dict"),
        ("my_metric:huge", "'x' is a number that is too large; return a dict"),
        ("__main__:no_such_function", "metric: __main__:no_such_function: no"),
        ("sys:no_such_function", "metric: sys:no_such_function: no such function in sys"),
        ("my_metric:spaced", "'my score' can't be a metric's name: use letters, digits and _"),
        ("my_metric:built_in", "'bleu' is a name that t5tune uses; rename the metric"),
        ("my_metric:prefixed", "'eval_x' is a name that t5tune uses; rename the metric"),
        ("my_metric:good my_metric:same", "metric: my_metric:same: 'ratio' is also a metric of my_metric:good; rename"),
    ],
)
def test_a_mistake_is_one_line_with_the_next_step(functions: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        compute_custom_metrics(functions.split(), ["a", "b"], ["a", "b"])
    (problem,) = caught.value.problems
    line = f"{problem}; {caught.value.hint}" if caught.value.hint else problem
    assert message in line
    assert "\n" not in line


def test_a_module_of_a_package_is_found(folder: Path) -> None:
    (folder / "scores" / "of").mkdir(parents=True)
    (folder / "scores" / "of" / "mine.py").write_text("def f(predictions, references): return {'x': 1}")
    assert compute_custom_metrics(["scores.of.mine:f"], ["a"], ["a"]) == {"x": 1.0}
