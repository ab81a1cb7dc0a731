"""Sweeps expand to the same runs each time, with names that tell them apart."""

import pytest

from t5tune.errors import SettingsError
from t5tune.settings.sweep import expand_sweep, name_run


def test_a_grid_has_each_combination_once() -> None:
    runs = expand_sweep({"lora_r": [4, 8], "learning_rate": [1e-4, 3e-4], "q_lora": [True]}, seed=1, max_runs=4)
    assert runs == {
        "lora_r=4,learning_rate=0.0001,q_lora=true": {"lora_r": 4, "learning_rate": 1e-4, "q_lora": True},
        "lora_r=4,learning_rate=0.0003,q_lora=true": {"lora_r": 4, "learning_rate": 3e-4, "q_lora": True},
        "lora_r=8,learning_rate=0.0001,q_lora=true": {"lora_r": 8, "learning_rate": 1e-4, "q_lora": True},
        "lora_r=8,learning_rate=0.0003,q_lora=true": {"lora_r": 8, "learning_rate": 3e-4, "q_lora": True},
    }
    assert list(runs) == list(expand_sweep({"lora_r": [4, 8], "learning_rate": [1e-4, 3e-4], "q_lora": [True]}, 2, 4))


def test_trials_select_different_combinations_of_a_huge_grid() -> None:
    names = ("lora_r", "lora_alpha", "seed", "max_steps", "warmup_steps")
    sweep = {"trials": 50, **{name: list(range(1, 1001)) for name in names}}
    runs = expand_sweep(sweep, seed=1, max_runs=50)
    assert len(runs) == 50
    assert runs == expand_sweep(sweep, seed=1, max_runs=50)
    assert runs.keys() != expand_sweep(sweep, seed=2, max_runs=50).keys()
    for run in runs.values():
        assert list(run) == [*names]
        assert all(1 <= value <= 1000 for value in run.values())
    assert {tuple(run.values()) for run in expand_sweep({"trials": 9, "a": [1, 2], "b": [1, 2]}, 1, 4).values()} == {
        (1, 1), (1, 2), (2, 1), (2, 2),
    }  # fmt: skip


def test_ranges_are_sampled_evenly_in_their_scale() -> None:
    sweep = {
        "trials": 400,
        "learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "lora_dropout": {"low": 0, "high": 0.5},
        "lora_r": {"low": 4, "high": 6},
        "bf16": [True, False],
    }
    runs = list(expand_sweep(sweep, seed=1, max_runs=400).values())
    rates = sorted(run["learning_rate"] for run in runs)
    dropouts = sorted(run["lora_dropout"] for run in runs)
    assert rates[0] >= 1e-5
    assert rates[-1] <= 1e-1
    assert 5e-4 < rates[len(rates) // 2] < 2e-3  # the median is near the middle of the logarithms
    assert 0.2 < dropouts[len(dropouts) // 2] < 0.3
    assert {run["lora_r"] for run in runs} == {4, 5, 6}
    assert all(isinstance(run["lora_r"], int) for run in runs)
    assert {run["bf16"] for run in runs} == {True, False}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"model_name_or_path": "a/b"}, {"model_name_or_path": "a-b"}),
        ({"lora_target_modules": ["q", "v"]}, {"lora_target_modules": ["q+v"]}),
        ({"learning_rate": 0.12345678}, {"learning_rate": 0.12345679}),
        ({"a": "1,b=2"}, {"a": 1, "b": 2}),
        ({"source_prefix": "x" * 200}, {"source_prefix": "x" * 201}),
    ],
)
def test_names_tell_runs_apart_and_are_names_of_folders(one: dict[str, object], other: dict[str, object]) -> None:
    names = [name_run(one), name_run(other)]
    assert names[0] != names[1]
    assert all("/" not in name and len(name) < 200 for name in names)


def test_an_oversized_sweep_is_refused_with_its_size() -> None:
    with pytest.raises(SettingsError, match="sweep: 10,000 runs, but max_runs is 100; set trials"):
        expand_sweep({"lora_r": list(range(100)), "seed": list(range(100))}, seed=1, max_runs=100)
