"""benchmarks/gpu.py without a GPU: goals that wrong numbers don't meet, what is written, and all that a CPU can do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gpu.benchmark import benchmarks, load  # noqa: F401
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow

H100 = {"gpu": "NVIDIA H100 80GB HBM3"}


def succeed(folder: Path) -> dict[str, Any]:
    return {"folder": folder.name, "not finite": float("nan")}


def fail(_folder: Path) -> dict[str, Any]:
    print("before the failure")
    raise ValueError("no such\nkernel")


def crash(_folder: Path) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hang(folder: Path) -> dict[str, Any]:
    child = subprocess.Popen(["sleep", "1000"])
    (folder / "child").write_text(str(child.pid))
    signal.pause()
    return {}


def skip(_folder: Path) -> dict[str, Any]:
    raise load("gpu_runner").Skipped("bitsandbytes isn't installed")


def make_measurement(measure: Any, seconds: float = 0.5, needs_gpu: bool = False) -> Any:
    return load("gpu_runner").Measurement(measure.__name__, seconds, measure, needs_gpu)


def make_limits(minutes: float) -> Any:
    return load("gpu_runner").Limits(on_gpu=True, end=time.monotonic() + 60 * minutes)


def test_no_measurement_costs_the_result_of_another(tmp_path: Path) -> None:
    measurements = [make_measurement(measure) for measure in (fail, crash, hang, skip, succeed)]
    counts: list[int] = []
    outcomes = load("gpu_runner").run_all(
        measurements, make_limits(10), tmp_path, lambda found: counts.append(len(found))
    )
    assert counts == [1, 2, 3, 4, 5]  # outcomes are saved after each measurement
    assert [(outcome.state, outcome.reason) for outcome in outcomes] == [
        ("failed", "ValueError: no such kernel"),
        ("failed", "ended by SIGSEGV"),
        ("failed", "no result within 2 s"),
        ("skipped", "bitsandbytes isn't installed"),
        ("measured", None),
    ]
    assert outcomes[0].log[0] == "before the failure"
    assert outcomes[0].log[-1] == "kernel"
    assert any("Segmentation fault" in line for line in outcomes[1].log)
    assert outcomes[4].result == {"folder": tmp_path.name, "not finite": "nan"}
    # the processes that a measurement started end with it
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_measurements_that_exceed_the_time_are_skipped(tmp_path: Path) -> None:
    measurements = [make_measurement(succeed, seconds=1000), make_measurement(fail)]
    first, second = load("gpu_runner").run_all(measurements, make_limits(1), tmp_path, lambda _: None)
    assert (first.name, first.state) == ("succeed", "skipped")
    assert first.reason.startswith("no time left: takes about 1000 s, and ")
    assert second.state == "failed"  # a measurement that fits into the time still runs


def make_outcome(name: str, result: dict[str, Any]) -> Any:
    return load("gpu_runner").Outcome(name, "measured", 1.0, result)


def make_speed(speed: float, of_peak: float) -> dict[str, Any]:
    return {
        "tokens_per_second": speed, "of_peak": of_peak, "operations_per_token": 10**10, "parameters": 3 * 10**9,
        "launches": 5000,
    }  # fmt: skip


def test_goals_and_ratios_are_computed_from_the_measurements() -> None:
    report = load("gpu_report")
    outcomes = [
        make_outcome("environment", H100),
        make_outcome("train flan-t5-xl 512 packed", make_speed(45_000, 0.39)),
        make_outcome("train flan-t5-xl 512 trainer", make_speed(30_000, 0.3)),
        make_outcome(
            "train flan-t5-large 512 packed", make_speed(80_000, 0.5) | {"notes": ["attention loops", "other"]}
        ),
        make_outcome("memory of QLoRA flan-t5-xxl", {"memory_mb": 12_001}),
    ]
    summary = report.summarize_speed(outcomes)
    assert summary["goals"] == {
        "flan-t5-xl 512: 1.5 times the Trainer": "met",
        "flan-t5-xl 512: 40% of the peak": "not met",
        "flan-t5-xl 512: NeMo's tokens/s, scaled": "not met",  # 13,800 · 989/312 · 6/4 = 65,616
        "flan-t5-large 512: NeMo's tokens/s, scaled": "met",
        "memory of QLoRA flan-t5-xxl: at most 12,000 MB": "not met",
    }
    assert len(report.list_unmet(summary)) == 3
    packed, trainer, large = summary["training"]
    assert (packed["times_trainer"], trainer["times_trainer"], "times_trainer" in large) == (1.5, 1.0, False)
    assert packed["of_data_sheet"] == 0.455  # 45,000 tokens/s · 1e10 / 989e12
    text = report.format_tables(outcomes, summary)
    assert "| flan-t5-xl 512: 40% of the peak | not met |" in text
    assert "| flan-t5-xl 512 | packed | – | – | 45,000 | 1.5 | 65,616 | 0.39 | 0.455 | 5,000 |" in text
    assert "\n\n- flan-t5-large 512 packed: attention loops\n\n" in text


def test_goals_of_missing_measurements_are_not_met_or_not_measured() -> None:
    report, outcome = load("gpu_report"), load("gpu_runner").Outcome
    outcomes = [
        make_outcome("environment", H100),
        outcome("train flan-t5-xl 512 packed", "failed"),
        outcome("train flan-t5-base 512 packed", "skipped"),
        outcome("train flan-t5-base 512 trainer", "skipped"),
        outcome("memory of QLoRA flan-t5-xxl", "failed"),
    ]
    assert report.summarize_speed(outcomes)["goals"] == {
        "flan-t5-xl 512: 40% of the peak": "not met",
        "flan-t5-base 512: 1.5 times the Trainer": "not measured",
        "memory of QLoRA flan-t5-xxl: at most 12,000 MB": "not met",
    }
    outcomes[0] = make_outcome("environment", {"gpu": "none"})
    assert set(report.summarize_speed(outcomes)["goals"].values()) == {"needs a GPU"}


def make_result(found: Any, relation: Any, bound: Any) -> dict[str, Any]:
    runner = load("gpu_runner")
    return runner.make_check(
        [runner.Comparison("right", 0.001, "<=", 0.1), runner.Comparison("error", found, relation, bound)]
    )


@pytest.mark.parametrize(
    ("found", "relation", "bound", "goal"),
    [
        (0.1, "<=", 0.1, "met"), (0.11, "<=", 0.1, "not met"), (float("nan"), "<=", 0.1, "not met"),
        (float("nan"), ">=", 0.1, "not met"), (0.2, ">=", 0.1, "met"), (["int8"], "==", ["bfloat16"], "not met"),
    ],
)  # fmt: skip
def test_a_check_is_met_if_all_its_comparisons_are(found: Any, relation: Any, bound: Any, goal: str) -> None:
    assert load("gpu_report").judge_check(make_outcome("check", make_result(found, relation, bound))) == goal


def test_a_check_without_a_result_is_not_met() -> None:
    report, outcome = load("gpu_report"), load("gpu_runner").Outcome
    states = {"failed": "not met", "skipped": "not met", "needs a GPU": "needs a GPU"}
    assert {state: report.judge_check(outcome("check", state)) for state in states} == states
    assert report.judge_check(make_outcome("check", {"comparisons": []})) == "not met"


def test_the_table_shows_the_comparison_that_decides() -> None:
    report = load("gpu_report")
    outcomes = [make_outcome("one", make_result(0.01234, "<=", 0.1)), make_outcome("two", make_result(1, "==", 2))]
    summary = report.summarize_checks(outcomes)
    assert report.format_goals(outcomes, summary).splitlines()[2:] == [
        "| one | met | error: 0.0123 <= 0.1 |", "| two | not met | error: 1 == 2 |"
    ]  # fmt: skip


def test_nemos_speed_is_scaled_by_peak_and_operations() -> None:
    scale = load("gpu_report").scale_nemo_speed
    assert scale(3 * 10**9, 312e12) == pytest.approx(13_800 * 6 / 4)
    assert scale(6 * 10**9, 624e12) == pytest.approx(13_800 * 6 / 4)


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10", 125e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A4000", None), ("", None),
    ],
)  # fmt: skip
def test_the_peak_of_the_data_sheet_is_found_by_name(gpu: str, peak: float | None) -> None:
    assert load("gpu_report").find_data_sheet_peak(gpu) == peak


def test_the_table_has_the_reason_for_each_missing_measurement() -> None:
    report, outcome = load("gpu_report"), load("gpu_runner").Outcome
    outcomes = [
        outcome("NF4", "skipped", reason="bitsandbytes isn't installed"),
        outcome("DoRA", "failed", reason="a|b"),
    ]
    summary = report.summarize_checks(outcomes)
    assert (summary["gpu"], summary["goals"]) == (None, {"NF4": "not met", "DoRA": "not met"})
    assert (summary["skipped"], summary["failed"]) == (["NF4"], ["DoRA"])
    text = report.format_tables(outcomes, summary)
    assert "| NF4 | skipped | bitsandbytes isn't installed |\n| DoRA | failed | a\\|b |" in text


def test_nested_results_become_a_table() -> None:
    result = {"notes": ["one", "two"], "norm": {"output": 0.001, "ms": 2.5}, "gate": {"output": 1e-05}}
    assert load("gpu_report").format_result(result).splitlines() == [
        "|  |  |", "| --- | --- |", "| notes | one; two |", "",
        "|  | output | ms |", "| --- | --- | --- |", "| norm | 0.001 | 2.5 |", "| gate | 1e-05 | – |",
    ]  # fmt: skip


def list_names(measurements: list[Any]) -> list[str]:
    return [measurement.name for measurement in measurements]


def test_the_list_has_each_shape_and_length_for_both_contenders() -> None:
    speeds = load("gpu_lists").list_speeds(on_gpu=True, is_tiny=False)
    assert len(set(list_names(speeds))) == len(speeds)
    expected = {
        f"train {size} {longest} {way}"
        for size in ("flan-t5-base", "flan-t5-large", "flan-t5-xl", "t5gemma-2-1b-1b")
        for longest in (512, 2048) for way in ("packed", "trainer")
    }  # fmt: skip
    assert expected < set(list_names(speeds))
    select = load("gpu").select
    assert list_names(select(speeds, ["train flan-t5-base 512 *", "memory of QLoRA*"])) == [
        "train flan-t5-base 512 packed", "train flan-t5-base 512 trainer", "memory of QLoRA flan-t5-xxl"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="--only: nf8: no such measurement"):
        select(speeds, ["nf8"])


def test_all_checks_fit_into_nine_minutes() -> None:
    checks = load("gpu_lists").list_checks(on_gpu=True, is_tiny=False)
    assert len(set(list_names(checks))) == len(checks)
    for_imports = 45
    assert sum(check.seconds for check in checks) <= 9 * 60 - for_imports


def run_main(folder: Path, patch: pytest.MonkeyPatch, measurements: list[Any], *arguments: str) -> int:
    """Run gpu.py in this process, on a CPU, with other measurements; return its exit code."""
    gpu = load("gpu")
    patch.setattr(gpu, "find_gpu_in_fork", lambda _: None)
    patch.setattr(gpu, "import_libraries", lambda: None)
    patch.setattr(gpu, "STARTED", time.monotonic())
    patch.setattr(gpu, "list_measurements", lambda *_: measurements)
    patch.setattr(sys, "argv", ["gpu.py", "--tiny", "--output-dir", str(folder), *arguments])
    patch.setattr(os, "environ", os.environ.copy())
    before = signal.getsignal(signal.SIGTERM)
    try:
        gpu.main()
    except SystemExit as error:
        if isinstance(error.code, str):
            raise
        return error.code or 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def succeed_as_check(_folder: Path) -> dict[str, Any]:
    return make_result(0.0, "<=", 0.1)


def test_the_benchmark_writes_both_files_and_prints_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = load("gpu_runner")
    environment = runner.Measurement(
        "environment", 60, partial(load("gpu").measure_environment, device="cpu", size=512)
    )
    on_gpu = make_measurement(succeed, needs_gpu=True)
    measurements = [environment, *map(make_measurement, (skip, fail, succeed_as_check)), on_gpu]
    assert run_main(tmp_path / "results", monkeypatch, measurements, "--prove") == 1
    output, errors = capsys.readouterr()
    *table, line = output.splitlines()
    goals = {"skip": "not met", "fail": "not met", "succeed_as_check": "met", "succeed": "needs a GPU"}
    assert json.loads(line) == {"gpu": "none", "goals": goals, "skipped": ["skip"], "failed": ["fail"]}
    assert "| skip | not met | bitsandbytes isn't installed |" in table
    assert re.search(r"^fail: failed \(\d+ s\): ValueError: no such kernel$", errors, re.MULTILINE)
    assert errors.splitlines()[-1] == "gpu.py: not met: skip; fail"
    found = json.loads((tmp_path / "results" / "prove.json").read_text())
    first, second, third, *_ = found["measurements"]
    assert first["result"]["bf16 TFLOP/s of a matrix product"] > 0
    assert first["result"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert second["reason"] == "bitsandbytes isn't installed"
    assert third["log"][-1] == "kernel"
    assert "| fail | failed | ValueError: no such kernel |" in (tmp_path / "results" / "prove.md").read_text()
    measurements = [environment, make_measurement(succeed_as_check), on_gpu]
    assert run_main(tmp_path / "results", monkeypatch, measurements, "--prove") == 0


def test_a_further_call_makes_what_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = load("gpu_runner")
    environment = runner.Measurement("environment", 1, lambda _: {"gpu": "none"})
    measurements = [environment, make_measurement(fail), make_measurement(succeed, seconds=1000)]
    assert run_main(tmp_path, monkeypatch, measurements, "--speed") == 1
    assert json.loads(capsys.readouterr()[0].splitlines()[-1])["skipped"] == ["succeed"]
    file = tmp_path / "speed.json"
    continued = [environment, make_measurement(fail), make_measurement(succeed)]
    arguments = ["--speed", "--continue", str(file)]
    assert run_main(tmp_path, monkeypatch, continued, *arguments) == 1  # because of the failure
    assert capsys.readouterr().err.splitlines()[0].startswith("succeed: measured")  # neither of the others
    found = json.loads(file.read_text())
    assert [(one["name"], one["state"]) for one in found["measurements"]] == [
        ("environment", "measured"), ("fail", "failed"), ("succeed", "measured")
    ]  # fmt: skip
    file.write_text(file.read_text().replace('"gpu": "none"', '"gpu": "NVIDIA L4"'))
    with pytest.raises(SystemExit, match="measured on NVIDIA L4, and this is none"):
        run_main(tmp_path, monkeypatch, continued, *arguments)


# what makes a check wrong: a quantized weight, queries, the optimizer of a resumed run, replies, halving, sharing
SCALED_NF4 = """
read_weight = gpu_checks.read_weight
gpu_checks.read_weight = lambda module: read_weight(module) * (1.1 if "4bit" in type(module).__name__ else 1)
"""
MISTAKES = {
    "training: 20 steps with the loop": """
from t5tune.model.attention import segments, t5
right = segments.segment_attention
def scale(query, *others):
    return right(0.9 * query, *others)
for module in list(sys.modules.values()):
    if getattr(module, "segment_attention", None) is right:
        module.segment_attention = scale
""",
    "resuming": "torch.optim.AdamW.load_state_dict = lambda *_: None",
    "generation": "right = gpu_inference.generate; gpu_inference.generate = lambda *a: [x[:-1] for x in right(*a)]",
    "evaluation, and out of memory": """
import t5tune.evaluation.batches as batches
batches.is_out_of_memory = lambda error: False
""",
    "serving with both engines": """
from t5tune.inference.shared_bases import SharedBases
from t5tune.model.load import load_base
SharedBases.load = lambda self, *values, files=None, **options: load_base(*values, **options)
""",
}  # fmt: skip


def run_gpu(folder: Path, *arguments: str, mistake: str = "") -> tuple[int, dict[str, Any], str]:
    """Run gpu.py with tiny shapes and a mistake, without a GPU; return its exit code, last line and stderr."""
    code = f"import sys, torch, gpu, gpu_checks, gpu_inference\n{mistake}\ngpu.main()"
    command = [sys.executable, "-c", code, "--tiny", "--minutes", "60", "--output-dir", str(folder), *arguments]
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "benchmarks")))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_a_wrong_number_makes_a_goal_not_met(tmp_path: Path) -> None:
    names = ["environment", "loading NF4", "loading int8", "kernels: attention, width 64"]
    code, line, errors = run_gpu(tmp_path, "--prove", "--only", *names, mistake=SCALED_NF4)
    assert (code, line["goals"]) == (
        1,
        {
            "kernels: attention, width 64": "needs a GPU",
            "loading NF4": "not met",
            "loading int8": "met",
        },
    ), errors
    assert errors.splitlines()[-1] == "gpu.py: not met: loading NF4"
    assert "| loading NF4 | not met | error of a weight: 0." in (tmp_path / "prove.md").read_text()


@pytest.mark.long
def test_all_checks_that_a_cpu_can_do_are_met(tmp_path: Path) -> None:
    code, line, errors = run_gpu(tmp_path, "--prove")
    assert (code, line["skipped"], line["failed"]) == (0, [], []), errors
    checks = load("gpu_lists").list_checks(on_gpu=False, is_tiny=True)
    assert line["goals"] == {check.name: "needs a GPU" if check.needs_gpu else "met" for check in checks}


@pytest.mark.long
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_by_its_check(name: str, tmp_path: Path) -> None:
    code, line, errors = run_gpu(tmp_path, "--prove", "--only", name, mistake=MISTAKES[name])
    assert (code, line["goals"]) == (1, {name: "not met"}), errors


@pytest.mark.long
def test_all_speeds_that_a_cpu_can_measure_are_measured(tmp_path: Path) -> None:
    code, line, errors = run_gpu(tmp_path, "--speed")
    assert (code, line["skipped"], line["failed"]) == (0, [], []), errors
    assert set(line["goals"].values()) == {"needs a GPU"}
    measured = json.loads((tmp_path / "speed.json").read_text())["measurements"]
    speeds = {one["name"]: one["result"] for one in measured if one["name"].startswith("train ")}
    assert {"train flan-t5-xl 512 packed", "train t5gemma-2-1b-1b 2048 trainer"} <= speeds.keys()
    assert all(speed["tokens_per_second"] > 0 and speed["of_peak"] > 0 for speed in speeds.values())


def test_releases_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "version", lambda package: "5.17.0" if package == "transformers" else "99.0")
    releases = gpu.read_releases()
    assert releases["transformers"].startswith("5.17.0 (t5tune needs 5.")
    assert releases["torch"] == "99.0"


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_measurement_runs_in_each_kind_of_process(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    measurement = load("gpu_runner").Measurement("GPU", 1, load("gpu").find_gpu)
    outcome = load("gpu_runner").run_in_process(measurement, 120, tmp_path, method)
    assert (outcome.state, outcome.result) == ("measured", {"gpu": None}), (tmp_path / "log.txt").read_text()
    assert load("gpu").find_gpu_in_fork(tmp_path) is None
