"""What follows a step, which evaluation is better than another, and which one counts as a gain."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.trainer_callback import CallbackHandler

from t5tune.commands.train import train
from t5tune.training.flow import find_gains, is_better
from tests.support.processes.command_line import OnRanks
from tests.support.train_runs import make_settings

LARGER = SimpleNamespace(metric_for_best_model="field_f1", greater_is_better=True)
LOSS = SimpleNamespace(metric_for_best_model=None, greater_is_better=False)


def make_line(loss: float, field_f1: float | None = None) -> dict[str, Any]:
    return {"eval_loss": loss} | ({} if field_f1 is None else {"eval_field_f1": field_f1})


def test_a_lower_loss_breaks_a_tie_but_is_no_gain() -> None:
    first, second = make_line(2.0, 100.0), make_line(1.0, 100.0)
    assert is_better(second, first, LARGER)
    assert not is_better(first, second, LARGER)
    assert find_gains([first, second, make_line(9.0, 100.5)], LARGER, 0.0) == [True, False, True]


def test_a_gain_exceeds_the_best_value_by_the_threshold() -> None:
    values = [1.0, 1.5, 1.4, 2.1]
    assert find_gains([make_line(1.0, value) for value in values], LARGER, 0.5) == [True, False, False, True]
    assert find_gains([make_line(value) for value in (2.0, 1.5, 1.6, 1.4)], LOSS, 0.0) == [True, True, False, True]


def test_missing_metrics_and_infinite_losses_are_never_the_best() -> None:
    lines = [make_line(1.0), make_line(math.nan, 90.0), make_line(1.0, 50.0), make_line(0.5), make_line(1.0, 60.0)]
    assert find_gains(lines, LARGER, 0.0) == [False, False, True, False, True]
    assert not is_better(lines[0], None, LARGER)
    assert not is_better(lines[1], lines[2], LARGER)
    assert is_better(lines[2], lines[0], LARGER)  # evaluated before this metric was chosen


def record_events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the events that callbacks get of logs, saves and evaluations, with their steps."""
    events: list[str] = []
    call = CallbackHandler.call_event

    def record(self: Any, event: str, args: Any, state: Any, *more: Any, logs: Any = None, **options: Any) -> Any:
        if event in ("on_log", "on_save", "on_evaluate"):
            kind = f"{event} of {'a loss' if 'loss' in logs else 'metrics'}" if logs else event
            events.append(f"{state.global_step}: {kind.removeprefix('on_')}")
        return call(self, event, args, state, *more, **({"logs": logs} if logs else {}), **options)

    monkeypatch.setattr(CallbackHandler, "call_event", record)
    return events


LOGGED, SAVED, EVALUATED = ["log of a loss"], ["save"], ["log of metrics", "evaluate"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"eval_steps": 2, "save_steps": 4, "logging_steps": 3},
            {1: LOGGED, 2: EVALUATED, 3: LOGGED, 4: SAVED + EVALUATED, 6: LOGGED + SAVED + EVALUATED},
        ),
        (
            {
                "eval_strategy": "epoch", "save_strategy": "epoch", "num_data": 15, "max_steps": 7,
                "training_args": {"logging_strategy": "epoch"},
            },
            {1: LOGGED} | dict.fromkeys((3, 6, 7), LOGGED + SAVED + EVALUATED),
        ),
    ],
    ids=["steps", "epochs"],
)  # fmt: skip
def test_a_step_is_logged_then_saved_then_evaluated(
    changes: dict[str, Any],
    expected: dict[int, list[str]],
    inputs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = record_events(monkeypatch)
    result = train(make_settings(*inputs, tmp_path / "run", eval_fraction=0.2, **changes))
    of_run = f"{result.steps}: log of metrics"  # the run's own summary
    assert events == [*(f"{step}: {kind}" for step, kinds in expected.items() for kind in kinds), of_run]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_new_rank_derives_its_random_state(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    """Otherwise the rank would repeat the random numbers of the run's first steps, as would all ranks."""
    values: dict[str, Any] = {"seed": 5, "save_steps": 2, "max_steps": 4}
    settings = make_settings(untied_base, conversations, tmp_path / "run", **values, gradient_accumulation_steps=2)
    given = settings.model_dump(exclude_unset=True, mode="json") | {"gradient_accumulation_steps": 1}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if name != "data_path"]
    done = on_ranks(2, "train", "--data-path", conversations, *flags)
    assert done.code == 0, done.stderr[-3000:]
    (tmp_path / "run" / "result.json").unlink()  # as if it had been killed after two steps
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert train(settings).resumed_from == tmp_path / "run" / "checkpoint-2"
    assert torch.initial_seed() == np.random.SeedSequence((5, 2, 0)).generate_state(1)[0]
