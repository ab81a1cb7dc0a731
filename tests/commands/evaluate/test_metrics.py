"""The choice of metrics in `evaluate` and in training, custom metrics, the comparison with the base, early stopping."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.evaluate import EvaluateResult, evaluate
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.custom_metrics import load_custom_metric
from t5tune.errors import SettingsError
from t5tune.formatting import format_metric_name
from t5tune.metrics import describe_signatures
from t5tune.progress import Evaluated, Event, Note
from t5tune.runs.checkpoints import verify
from t5tune.runs.metrics_log import read_metrics
from t5tune.runs.result import read_result
from t5tune.settings import EvaluateSettings, PrepareSettings
from tests.support import train_runs
from tests.support.processes.command_line import CommandResult, t5tune_in_fork

pytestmark = pytest.mark.slow

METRICS = (
    "loss", "perplexity", "bits_per_character", "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf",
    "chrf_pp", "valid_json", "field_f1",
)  # fmt: skip
# the values fall from call to call; the first call is the trial before training
SHRINKING = """
CALLS = []
def shrink(predictions, references):
    CALLS.append(len(references))
    return {"shrink": -len(CALLS), "small": -len(CALLS) / 1000}
"""
make_short_settings = functools.partial(train_runs.make_settings, max_steps=4, logging_steps=10, save_steps=500)


def run_evaluate(model: Path, data: Path, output: Path, **changes: Any) -> EvaluateResult:
    values = {"model_name_or_path": str(model), "data_path": str(data), "output_dir": output, "use_cpu": True}
    return evaluate(EvaluateSettings(**{**values, "max_new_tokens": 12, **changes}))


def get_metrics(result: EvaluateResult) -> dict[str, float | None]:
    return {name: getattr(result, name) for name in METRICS}


def read_lines(result: EvaluateResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.predictions.read_text(encoding="utf-8").splitlines()]


def write_function(path: Path, code: str) -> Path:
    path.write_text(code)
    return path


@pytest.fixture(scope="module")
def cache(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("metrics") / "cache"
    prepare(PrepareSettings(model_name_or_path=str(untied_base), data_path=str(conversations), output_dir=folder))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve sources and targets, none of which is JSON."""
    path = tmp_path_factory.mktemp("metrics") / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"source": f"count {n}", "target": f"{n} lamps"}) for n in range(12)))
    return path


@pytest.fixture(scope="module")
def run(untied_base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that also trained layer norms and the rows of added tokens."""
    folder = tmp_path_factory.mktemp("metrics") / "run"
    train(make_short_settings(untied_base, cache, folder, modules_to_save=["final_layer_norm"]))
    return folder


def test_compare_base_gives_the_scores_of_the_base_alone(
    run: Path, untied_base: Path, cache: Path, tmp_path: Path
) -> None:
    function = write_function(tmp_path / "sizes.py", "def f(p, r): return {'length': sum(map(len, p))}")
    both = run_evaluate(run, cache, tmp_path / "both", num_data=12, compare_base=True, metric=f"{function}:f")
    tuned, base = (run_evaluate(model, cache, tmp_path / model.name, num_data=12) for model in (run, untied_base))
    assert get_metrics(both) == get_metrics(tuned)
    length = sum(len(line["prediction"]) for line in read_lines(base))
    assert both.base == get_metrics(base) | {"length": length}
    assert both.base["loss"] != both.loss
    lines = zip(read_lines(both), read_lines(tuned), read_lines(base), strict=True)
    for line, with_adapter, without in lines:
        of_base = {f"base_{name}": without[name] for name in ("prediction", "logprob", "probability", "loss")}
        assert line == with_adapter | of_base
    assert tuned.base is None


def test_the_command_shows_both_models_and_the_difference(run: Path, cache: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", run, "--data-path", cache, "--num-data", 4, "--max-new-tokens", 4, "--compare-base")
    write_function(tmp_path / "my_metric.py", "def f(p, r): return {'my_length': sum(map(len, p))}")
    more = ("--metrics", "chrf", "chrf_pp", "--metric", "my_metric:f", "--use-cpu")
    shown = t5tune_in_fork(*arguments, *more, "--output-dir", "shown", cwd=tmp_path)
    assert shown.code == 0, shown.stderr
    words = [line.split() for line in shown.stderr.splitlines()]
    assert ["tuned", "base", "difference"] in words
    result = t5tune_in_fork(*arguments, *more, "--output-dir", "out", "--json", cwd=tmp_path).json
    assert set(result["base"]) == {"loss", "perplexity", "bits_per_character", "chrf", "chrf_pp", "my_length"}
    assert result["bleu"] is result["valid_json"] is None
    signatures = describe_signatures(["chrf", "chrf_pp"])
    assert (
        result["signatures"] == signatures == json.loads((tmp_path / "out" / "scores.json").read_text())["signatures"]
    )
    lines = [["signature", "of", format_metric_name(name), text] for name, text in signatures.items()]
    assert [line for line in words if line[0] == "signature"] == lines
    (row,) = [line for line in words if line[0] == "loss"]
    assert [float(text) for text in row[1:]] == pytest.approx(
        [result["loss"], result["base"]["loss"], result["loss"] - result["base"]["loss"]], rel=1e-2
    )
    assert row[3][0] in "+-"
    assert [line[:2] for line in words if line[0] == "my"] == [["my", "length"]]
    assert result["custom_metrics"].keys() == {"my_length"}


def test_the_result_and_predictions_contain_only_the_chosen_metrics(run: Path, cache: Path, tmp_path: Path) -> None:
    every = run_evaluate(run, cache, tmp_path / "every", num_data=6)
    some = run_evaluate(run, cache, tmp_path / "some", num_data=6, metrics=["rougeL", "bleu"])
    assert get_metrics(some) == {
        name: value if name in ("loss", "perplexity", "bits_per_character", "rougeL", "bleu") else None
        for name, value in get_metrics(every).items()
    }
    assert set(read_lines(some)[0]) == {"source", "target", "prediction", "logprob", "probability", "loss", "rougeL"}


def test_a_failing_custom_metric_does_not_lose_the_predictions(untied_base: Path, pairs: Path, tmp_path: Path) -> None:
    function = write_function(tmp_path / "failing.py", "def f(p, r): return {'x': 1 / (3 - len(r))}")
    with pytest.raises(SettingsError, match="failed on 3 predictions and references: ZeroDivisionError") as caught:
        run_evaluate(untied_base, pairs, tmp_path / "out", num_data=3, metric=f"{function}:f")
    predictions = tmp_path / "out" / "predictions.jsonl"
    assert str(caught.value.hint).endswith(f"; the predictions are in {predictions} (add --overwrite to replace them)")
    assert len(predictions.read_text().splitlines()) == 3
    write_function(function, "def f(p, r): return {'x': 1}")
    load_custom_metric.cache_clear()
    fixed = run_evaluate(untied_base, pairs, tmp_path / "out", num_data=3, metric=f"{function}:f", overwrite=True)
    assert fixed.custom_metrics == {"x": 1}


def test_a_custom_metric_that_fails_names_its_dataset(untied_base: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "alike.jsonl").write_text("\n".join([json.dumps({"source": "a", "target": "lamps"})] * 2))
    datasets = [{"path": str(pairs), "num_data": 2}, {"path": str(tmp_path / "alike.jsonl")}]
    write_function(tmp_path / "a.py", "def f(p, r): return {'corr': 1 if len({*r}) > 1 else float('nan')}")
    write_function(tmp_path / "b.py", "def f(p, r): return {'ratio': 1 / (len({*r}) - 1)}")
    values = {"model_name_or_path": str(untied_base), "data": datasets, "use_cpu": True, "max_new_tokens": 4}
    notes: list[Event] = []
    settings = EvaluateSettings(**values, metric=f"{tmp_path / 'a.py'}:f", output_dir=tmp_path / "a")
    result = evaluate(settings, notes.append)
    assert result.custom_metrics == {"corr": 1}
    assert result.datasets is not None
    assert [scores.get("corr") for scores in result.datasets.values()] == [1, None]
    assert Note("metric: the scores of dataset alike omit corr, which is nan", warning=True) in notes
    settings = EvaluateSettings(**values, metric=f"{tmp_path / 'b.py'}:f", output_dir=tmp_path / "b")
    with pytest.raises(SettingsError, match="dataset alike: metric: .* failed on 2 predictions .*Zero") as caught:
        evaluate(settings)
    assert f"the predictions are in {tmp_path / 'b' / 'predictions.jsonl'}" in str(caught.value.hint)


def test_json_targets_are_scored_as_json(untied_base: Path, pairs: Path, tmp_path: Path) -> None:
    records = [{"source": "a", "target": '{"a": [1, 2]}'}, {"source": "b", "target": "no json"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    result = run_evaluate(untied_base, tmp_path / "data.jsonl", tmp_path / "out")
    assert (result.valid_json, result.field_f1) == (0, 0)
    assert [{"valid_json", "field_f1"} <= line.keys() for line in read_lines(result)] == [True, False]
    without = run_evaluate(untied_base, pairs, tmp_path / "without", num_data=2)
    assert without.valid_json is without.field_f1 is None
    with pytest.raises(SettingsError, match="metrics: valid_json: none of the 2 targets is a JSON object or array"):
        run_evaluate(untied_base, pairs, tmp_path / "none", num_data=2, metrics=["valid_json"])


# ---------------------------------------------------------------- during training


def test_a_custom_metric_chooses_the_best_checkpoint_and_stops_training(
    untied_base: Path, pairs: Path, tmp_path: Path
) -> None:
    function = write_function(tmp_path / "shrinking.py", SHRINKING)
    changes: dict[str, Any] = {
        "metric": f"{function}:shrink", "metrics": ["bleu"], "metric_for_best_model": "eval_shrink", "max_steps": 20,
        "eval_steps": 2, "eval_fraction": 0.25, "eval_generate": 3, "early_stopping_patience": 2,
    }  # fmt: skip
    notes: list[Event] = []
    result = train(make_short_settings(untied_base, pairs, tmp_path / "run", **changes), notes.append)
    assert result.steps == 6
    reason = "at step 6: shrink no better for 2 evaluations; best: step 2 (-2)"
    assert result.stopped_early == reason
    assert read_result(tmp_path / "run").stopped_early == reason
    assert Note(f"stopped early {reason}") in notes
    evaluated = [line for line in read_metrics(tmp_path / "run") if "eval_loss" in line]
    assert [line["eval_shrink"] for line in evaluated] == [-2, -3, -4]
    assert "eval_bleu" in evaluated[0]
    assert "eval_rougeL" not in evaluated[0]
    assert result.eval["shrink"] == -2
    assert "stopped early at step 6" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.long
def test_a_smaller_improvement_than_the_threshold_does_not_count(
    untied_base: Path, pairs: Path, tmp_path: Path
) -> None:
    """The metric grows by 0.5 each time."""
    code = "C = []\ndef grow(p, r):\n    C.append(1)\n    return {'grow': len(C) / 2}"
    function = write_function(tmp_path / "growing.py", code)
    changes: dict[str, Any] = {
        "metric": f"{function}:grow", "metric_for_best_model": "grow", "max_steps": 5, "eval_steps": 1,
        "eval_fraction": 0.25, "eval_generate": 3, "early_stopping_patience": 2,
    }  # fmt: skip
    events: list[Event] = []
    settings = make_short_settings(untied_base, pairs, tmp_path / "a", **changes, early_stopping_threshold=0.5)
    stopped = train(settings, events.append)
    assert [event.is_best for event in events if isinstance(event, Evaluated)] == [True, True, True]
    assert stopped.stopped_early == (
        "at step 3: grow no better by more than 0.5 for 2 evaluations; best: step 3 (2, within the threshold)"
    )
    settings = make_short_settings(untied_base, pairs, tmp_path / "b", **changes, early_stopping_threshold=0.4)
    whole = train(settings)
    assert (whole.steps, whole.stopped_early) == (5, None)


def test_an_unchanged_metric_stops_training_although_the_loss_falls(
    untied_base: Path, pairs: Path, tmp_path: Path
) -> None:
    """If checkpoints have the same metric, the checkpoint with the lowest loss is kept."""
    function = write_function(tmp_path / "same.py", "def f(p, r): return {'same_score': 100}")
    changes: dict[str, Any] = {
        "metric": f"{function}:f", "metric_for_best_model": "same_score", "max_steps": 9, "eval_steps": 1,
        "eval_fraction": 0.25, "eval_generate": 3, "early_stopping_patience": 2,
    }  # fmt: skip
    events: list[Event] = []
    result = train(make_short_settings(untied_base, pairs, tmp_path / "run", **changes), events.append)
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert evaluated[0].values["loss"] > evaluated[1].values["loss"] > evaluated[2].values["loss"]
    assert [event.is_best for event in evaluated] == [True, True, True]  # step 3's adapter is kept
    best = "step 3 (100, equal but with a lower loss)"
    assert result.stopped_early == f"at step 3: same score no better for 2 evaluations; best: {best}"
    assert Note("the weights are from the best step, 3: same score 100") in events


def test_an_evaluation_omits_a_metric_that_is_not_finite(untied_base: Path, pairs: Path, tmp_path: Path) -> None:
    code = "C = []\ndef f(p, r):\n    C.append(1)\n    return {'x': [0, 5, float('nan'), float('inf'), 4][len(C) - 1]}"
    function = write_function(tmp_path / "gaps.py", code)
    changes: dict[str, Any] = {
        "metric": f"{function}:f", "metric_for_best_model": "x", "eval_steps": 1, "eval_fraction": 0.25,
        "eval_generate": 3,
    }  # fmt: skip
    events: list[Event] = []
    result = train(make_short_settings(untied_base, pairs, tmp_path / "run", **changes), events.append)
    assert [line.get("eval_x") for line in read_metrics(tmp_path / "run") if "eval_loss" in line] == [5, None, None, 4]
    assert [event.text for event in events if isinstance(event, Note) and event.warning] == [
        "metric: the evaluation at step 2 omits x, which is nan",
        "metric: the evaluation at step 3 omits x, which is inf",
    ]
    assert [event.is_best for event in events if isinstance(event, Evaluated)] == [True, False, False, False]
    assert result.eval["x"] == 5


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("values", "gets_better"), [([1, 2, 3, 4], True), ([4, 3, 2, 1], False)])
@pytest.mark.variants("values0-True-greedy", "values1-False-reduce_lr_on_plateau")
def test_a_schedule_lowers_the_rate_if_a_metric_falls(
    untied_base: Path, pairs: Path, tmp_path: Path, schedule: str, values: list[int], gets_better: bool
) -> None:
    code = f"C = []\ndef f(p, r):\n    C.append(1)\n    return {{'x': {[0, *values]}[len(C) - 1]}}"
    function = write_function(tmp_path / "steady.py", code)
    options = {"patience": 0, "factor": 0.5} | ({"min_lr": 1e-6, "reset_start": 0} if schedule == "greedy" else {})
    changes: dict[str, Any] = {
        "metric": f"{function}:f", "metric_for_best_model": "x", "eval_steps": 1, "eval_fraction": 0.25,
        "eval_generate": 3, "lr_scheduler_type": schedule, "training_args": {"lr_scheduler_kwargs": options},
    }  # fmt: skip
    run = tmp_path / "run"
    train(make_short_settings(untied_base, pairs, run, **changes))
    rates = [line["learning_rate"] for line in read_metrics(run) if "loss" in line]
    assert (rates[-1] >= rates[0]) == gets_better, rates


@pytest.mark.parametrize(
    ("second", "changes", "message"),
    [
        ("1 / 0", {}, r"failed on 3 predictions and references: ZeroDivisionError: "),
        ("None", {}, "failing.py:f: returned None"),
        ("{'y': 1}", {"metric_for_best_model": "x"}, "metric_for_best_model: x: not among this evaluation's metrics: "),
        (
            "{'x': float('nan')}",
            {"metric_for_best_model": "x", "lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type: reduce_lr_on_plateau needs metric_for_best_model, but x is nan at step 2",
        ),
    ],
)
@pytest.mark.variants(1)
def test_a_custom_metric_that_fails_during_training_costs_no_step(
    untied_base: Path, pairs: Path, tmp_path: Path, second: str, changes: dict[str, Any], message: str
) -> None:
    code = "def f(p, r):\n    return {'x': 1} if len(r) < 3 else "
    function = write_function(tmp_path / "failing.py", code + second)
    common = {"eval_steps": 2, "eval_fraction": 0.25, "eval_generate": 3, **changes}
    run = tmp_path / "run"
    settings = make_short_settings(untied_base, pairs, run, metric=f"{function}:f", **common)
    with pytest.raises(SettingsError, match=message) as caught:
        train(settings)
    saved = f"the step is saved in {run / 'checkpoint-2'}; the same command resumes from it"
    assert str(caught.value.hint).endswith(saved)
    assert verify(run / "checkpoint-2") is None
    fixed = f"{write_function(tmp_path / 'fixed.py', code + '{chr(120): 2}')}:f"
    resumed = train(make_short_settings(untied_base, pairs, run, metric=fixed, **common))
    assert resumed.resumed_from == run / "checkpoint-2"
    assert [line["eval_x"] for line in read_metrics(run) if "eval_loss" in line] == [2, 2]
    train(make_short_settings(untied_base, pairs, tmp_path / "other", metric=fixed, **common))
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (run, tmp_path / "other")]
    assert adapters[0] == adapters[1]


def test_a_saved_evaluation_without_a_needed_metric_is_repeated(untied_base: Path, pairs: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"eval_steps": 2, "save_steps": 2, "eval_fraction": 0.25}
    run = tmp_path / "run"
    train(make_short_settings(untied_base, pairs, run, **changes))
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoint-4")  # the evaluation is in checkpoint-2, but not yet in its history
    function = write_function(tmp_path / "my_metric.py", "def f(p, r): return {'x': 1}")
    changes |= {"eval_generate": 2, "metric": f"{function}:f", "metric_for_best_model": "x"}
    resumed = train(make_short_settings(untied_base, pairs, run, **changes))
    assert resumed.resumed_from == run / "checkpoint-2"
    assert resumed.eval["x"] == 1
    state = json.loads((run / "trainer_state.json").read_text())
    assert [line["eval_x"] for line in state["log_history"] if "eval_loss" in line] == [1, 1]


@pytest.mark.long
@pytest.mark.distributed
def test_ranks_agree_on_a_random_metric_and_its_failure(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    code = (
        "import random\n"
        "R = random.Random()\n"
        "def chance(p, r): return {'chance': R.random()}\n"
        "def fails(p, r): return {'x': 1} if len(r) < 3 else {'x': 'high'}\n"
    )
    function = write_function(tmp_path / "chances.py", code)
    common = (
        "train", "--model-name-or-path", untied_base, "--data-path", conversations, "--max-steps", "6", "--eval-steps",
        "1", "--eval-fraction", "0.2", "--eval-generate", "4", "--report-samples", "0", "--use-cpu", "--json",
    )  # fmt: skip
    best = ("--metric-for-best-model", "chance", "--early-stopping-patience", "2")
    agreed = on_ranks(2, *common, "--output-dir", tmp_path / "run", "--metric", f"{function}:chance", *best)
    assert agreed.code == 0, agreed.stderr
    failed = on_ranks(2, *common, "--output-dir", tmp_path / "failed", "--metric", f"{function}:fails")
    assert failed.code == 2
    assert "fails: 'x' is 'high'; return a dict of names and finite numbers" in failed.errors[0]
    assert failed.errors[0].endswith("checkpoint-1; the same command resumes from it")
    assert verify(tmp_path / "failed" / "checkpoint-1") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_for_best_model": "shrnk"}, "not among the metrics of this run's evaluations; did you mean shrink?"),
        ({"metric_for_best_model": "field_f1"}, "metric_for_best_model: field_f1: not among the metrics"),
        ({"metrics": ["field_f1"]}, "metrics: field_f1: none of the 3 targets is a JSON object or array"),
    ],
)
def test_a_metric_that_evaluations_lack_is_refused_before_training(
    untied_base: Path, pairs: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    function = write_function(tmp_path / "shrinking.py", SHRINKING)
    more = {"eval_fraction": 0.3, "eval_generate": 3, "metric": f"{function}:shrink"}
    with pytest.raises(SettingsError) as caught:
        train(make_short_settings(untied_base, pairs, tmp_path / "run", **more, **changes))
    assert message in caught.value.message
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not read_metrics(tmp_path / "run")
