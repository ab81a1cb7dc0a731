"""benchmarks/gpu.py without a GPU: what runs, what is skipped, what is written, and each measurement on the CPU."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model.kernels.test_flex_attention import without_kernels  # noqa: F401
from tests.support.paths import REPOSITORY
from tests.support.processes.runs import LONG

# torch hides this warning itself, but can't where warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
TINY = {
    "size": "google/flan-t5-small", "num_layers": 1, "longest": 64, "tokens": 512, "batch_size": 4, "steps": 5,
    "on_gpu": False, "dtype": "float32",
}  # fmt: skip
H100 = {"gpu": "NVIDIA H100 80GB HBM3"}


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """The benchmarks import each other from their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield


def load(name: str) -> Any:
    return importlib.import_module(name)


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


def make_measurement(measure: Any, seconds: float = 0.5) -> Any:
    return load("gpu_runner").Measurement(measure.__name__, seconds, measure)


def test_no_measurement_costs_the_result_of_another(tmp_path: Path) -> None:
    measurements = [make_measurement(measure) for measure in (fail, crash, hang, skip, succeed)]
    counts: list[int] = []
    outcomes = load("gpu_runner").run_all(measurements, 10, tmp_path, lambda found: counts.append(len(found)))
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
    first, second = load("gpu_runner").run_all(measurements, 1, tmp_path, lambda _: None)
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
    ]
    summary = report.summarize(outcomes)
    assert summary["goals"] == {
        "flan-t5-xl 512: 1.5 times the Trainer": True,
        "flan-t5-xl 512: 40% of the peak": False,
        "flan-t5-xl 512: NeMo's tokens/s, scaled": False,  # 13,800 · 989/312 · 6/4 = 65,616
        "flan-t5-large 512: NeMo's tokens/s, scaled": True,
    }
    packed, trainer, large = summary["training"]
    assert (packed["times_trainer"], trainer["times_trainer"], "times_trainer" in large) == (1.5, 1.0, False)
    assert packed["of_data_sheet"] == 0.455  # 45,000 tokens/s · 1e10 / 989e12
    text = report.format_tables(outcomes, summary)
    assert "| flan-t5-xl 512: 40% of the peak | not met |" in text
    assert "| flan-t5-xl 512 | packed | – | – | 45,000 | 1.5 | 65,616 | 0.39 | 0.455 | 5,000 |" in text
    assert "\n\n- flan-t5-large 512 packed: attention loops\n\n" in text


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
    summary = report.summarize(outcomes)
    assert (summary["gpu"], summary["goals"]) == (None, {})
    assert (summary["skipped"], summary["failed"]) == (["NF4"], ["DoRA"])
    text = report.format_tables(outcomes, summary)
    assert "| NF4 | skipped | bitsandbytes isn't installed |\n| DoRA | failed | a\\|b |" in text


def test_nested_results_become_a_table() -> None:
    result = {"notes": ["one", "two"], "norm": {"output": 0.001, "ms": 2.5}, "gate": {"output": 1e-05}}
    assert load("gpu_report").format_result(result).splitlines() == [
        "|  |  |", "| --- | --- |", "| notes | one; two |", "",
        "|  | output | ms |", "| --- | --- | --- |", "| norm | 0.001 | 2.5 |", "| gate | 1e-05 | – |",
    ]  # fmt: skip


def test_the_list_has_each_shape_and_length_for_both_contenders() -> None:
    names = [measurement.name for measurement in load("gpu").list_measurements()]
    assert len(set(names)) == len(names)
    expected = {
        f"train flan-t5-{size} {longest} {way}"
        for size in ("base", "large", "xl") for longest in (512, 2048) for way in ("packed", "trainer")
    }  # fmt: skip
    assert expected < set(names)
    selected = load("gpu").select(load("gpu").list_measurements(), ["train * trainer", "NF4"])
    assert {name.rpartition(" ")[2] for name in (measurement.name for measurement in selected)} == {"trainer", "NF4"}
    with pytest.raises(SystemExit, match="--only: nf8: no such measurement"):
        load("gpu").select(load("gpu").list_measurements(), ["nf8"])


def test_t5gemma_2_is_skipped_by_name(tmp_path: Path) -> None:
    with pytest.raises(load("gpu_runner").Skipped, match="T5Gemma 2"):
        load("gpu_training").check_t5gemma2(tmp_path)


def test_the_benchmark_writes_both_files_and_prints_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = load("gpu")
    environment = load("gpu_runner").Measurement(
        "environment", 60, partial(gpu.measure_environment, device="cpu", size=512)
    )
    monkeypatch.setattr(gpu, "sees_gpu", lambda _: True)
    monkeypatch.setattr(gpu, "list_measurements", lambda: [environment, make_measurement(skip), make_measurement(fail)])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output-dir", str(tmp_path / "results")])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = signal.getsignal(signal.SIGTERM)
    gpu.main()
    signal.signal(signal.SIGTERM, before)
    output, errors = capsys.readouterr()
    assert json.loads(output) == {"gpu": "none", "goals": {}, "skipped": ["skip"], "failed": ["fail"]}
    assert re.search(r"^fail: failed \(\d+ s\): ValueError: no such kernel$", errors, re.MULTILINE)
    found = json.loads((tmp_path / "results" / "gpu.json").read_text())
    first, second, third = found["measurements"]
    assert first["result"]["bf16 TFLOP/s of a matrix product"] > 0
    assert first["result"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert second["reason"] == "bitsandbytes isn't installed"
    assert third["log"][-1] == "kernel"
    assert "| fail | failed | ValueError: no such kernel |" in (tmp_path / "results" / "gpu.md").read_text()


def test_releases_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "version", lambda package: "5.17.0" if package == "transformers" else "99.0")
    releases = gpu.read_releases()
    assert releases["transformers"].startswith("5.17.0 (t5tune needs 5.")
    assert releases["torch"] == "99.0"


@pytest.fixture
def shape() -> Any:
    return load("t5tune.model.kernels.flex_check").AttentionShape(2, 16, 128, dropout=0.1)


SMALL_LENGTHS = (150, 1, 61), (40, 3, 90)


def find_largest_error(results: dict[str, Any]) -> float:
    return max(
        error
        for result in results.values()
        if isinstance(result, dict)
        for name, error in result.items()
        if name != "ms"
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
def test_attention_is_compared_with_fp64(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load("gpu_kernels")
    results = kernels.check_attention(shape, SMALL_LENGTHS, "cpu", torch.float32)
    assert set(results) == {
        f"{kind}, dropout {way}" for kind in kernels.KINDS for way in ("0, flex", "0, loop", "0.1, flex")
    }
    assert find_largest_error(results) < 2e-6
    right = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *arguments: right(*arguments[:-1], 0.0))
    wrong = kernels.check_attention(shape, SMALL_LENGTHS, "cpu", torch.float32)
    assert wrong["encoder, dropout 0.1, flex"]["output"] > 0.1


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("without_kernels")
def test_attention_is_timed_and_its_compilations_are_counted(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load("gpu_kernels")
    monkeypatch.setattr(kernels, "REPEATS", 1)
    monkeypatch.setattr(kernels, "WARM_UP", 0)
    times = kernels.time_attention(shape, SMALL_LENGTHS, "cpu", torch.float32)
    assert (times.pop("tokens"), times.pop("segments")) == ([212, 133], 3)
    assert len(times) == 12
    assert min(times.values()) > 0
    torch._dynamo.reset()
    counts = kernels.count_compilations(shape, 2, 16, "cpu", torch.float32)
    assert counts["batches"] == 2
    assert counts["first"] >= 3
    assert counts["later"] <= 3  # at most one compilation per kind, when two equal lengths become different
    assert kernels.time_cudnn(shape, 1, 16, "cpu", torch.float32).keys() == {"batches", "cuDNN on", "cuDNN off"}


@pytest.mark.long
def test_layers_and_loss_are_compared_with_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load("gpu_kernels")
    monkeypatch.setattr(kernels, "REPEATS", 1)
    monkeypatch.setattr(kernels, "WARM_UP", 0)
    results = kernels.check_layers("google/flan-t5-small", 32, "cpu", torch.bfloat16)
    assert results.keys() == {"notes", *(f"{part}, {side}" for part in kernels.LAYERS for side in ("t5tune", "stock"))}
    assert results["LoRA, t5tune"].keys() == {"output", "input", "lora_A", "lora_B", "ms"}
    assert find_largest_error(results) < 0.01
    losses = kernels.check_loss("google/flan-t5-small", 20, "cpu", torch.bfloat16)
    assert find_largest_error(losses) < 0.01
    right = kernels.compute_summed_loss
    monkeypatch.setattr(kernels, "compute_summed_loss", lambda *arguments: right(*arguments) * 1.1)
    assert kernels.check_loss("google/flan-t5-small", 20, "cpu", torch.bfloat16)["t5tune"]["output"] > 0.09


def make_event(name: str, start: float, end: float, is_annotation: bool = False) -> Any:
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=times, is_user_annotation=is_annotation)


def test_launches_and_idle_time_are_read_from_a_profile() -> None:
    summarize = load("gpu_training").summarize_events
    events = [
        make_event("step", 0, 1000, is_annotation=True), make_event("gemm", 10, 50), make_event("norm", 40, 60),
        make_event("Memcpy HtoD", 80, 90), make_event("gemm", 100, 110),
    ]  # fmt: skip
    assert summarize(events) == {"launches": 3, "idle_share": 0.3}  # 30 of 100 µs
    assert summarize([]) == {"launches": 0}


def test_a_batch_that_does_not_fit_is_halved() -> None:
    training = load("gpu_training")
    options, tried = SimpleNamespace(on_gpu=False), list[int]()

    def run(divisor: int) -> dict[str, Any]:
        tried.append(divisor)
        if divisor == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if divisor == 2:
            raise training.OutOfMemory("out of memory: training with tokens_per_batch 16384")
        return {"divisor": divisor}

    assert training.fit_in_memory(run, options) == {"divisor": 4}
    assert tried == [1, 2, 4]


def test_a_profiler_that_fails_loses_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = load("gpu_training").StepProfiler(on_gpu=False)
    monkeypatch.setattr(profiler.profile, "start", fail_to_start)
    profiler()
    assert profiler.result == {"profiler": "RuntimeError: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"}


def fail_to_start() -> None:
    raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load("gpu_training"), "NUM_CONVERSATIONS", 120)
        yield tmp_path_factory.mktemp("gpu")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["packed", "trainer", *(["packed, loop", "packed, no attention dropout"] if LONG else [])]
)
def test_training_is_measured(way: str, shared_folder: Path) -> None:
    result = load("gpu_training").measure_training(shared_folder, way, **TINY)
    assert result["batch"] == ("4 examples" if way == "trainer" else "512 tokens")
    assert result["tokens_per_second"] > 0
    assert result["launches"] > 100
    assert 0 <= result["idle_share"] < 1
    assert result["parameters"] > 2 * 32128 * 512
    row = load("gpu_report").make_training_row(f"train flan-t5-small 64 {way}", result, 989e12)
    assert row["nemo_tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.long
def test_the_timed_steps_exclude_warm_up_and_the_profiled_one(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, batches = load("gpu_training"), list[int]()
    right = load("train").compute_metrics

    def count_batches(clock: Any, sources: Any, targets: Any, found: Any, *others: Any) -> dict[str, Any]:
        batches.append((len(found), clock.done))
        return right(clock, sources, targets, found, *others)

    monkeypatch.setattr(load("train"), "compute_metrics", count_batches)
    training.measure_training(shared_folder, "packed", **TINY)
    assert batches == [(5, 6)]  # one more step is profiled


@pytest.mark.long
@pytest.mark.slow
def test_variants_are_measured_or_skipped(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = load("gpu_training")
    changes = {"q_lora": True, "bf16": False}
    assert training.measure_variant(shared_folder, changes, "bitsandbytes", **TINY)["tokens_per_second"] > 0
    with pytest.raises(load("gpu_runner").Skipped, match="no_such_package isn't installed"):
        training.measure_variant(shared_folder, changes, "no_such_package", **TINY)


@pytest.mark.slow
@pytest.mark.long
def test_a_resumed_run_is_compared_with_an_uninterrupted_one(shared_folder: Path) -> None:
    result = load("gpu_training").measure_resuming(shared_folder, {}, **TINY)
    assert result["resumed from"] in {"checkpoint-2", "checkpoint-3"}
    assert result["resumed"] == result["repeated"] == {"largest difference": 0.0, "bits are equal": True}


def test_adapters_that_differ_are_compared() -> None:
    compare = load("gpu_training").compare_tensors
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.zeros(2)}
    assert compare(expected, found) == {"largest difference": 0.1, "bits are equal": False}


@pytest.mark.slow
@pytest.mark.long
def test_the_memory_of_evaluation_is_measured(shared_folder: Path) -> None:
    result = load("gpu_training").measure_evaluation(shared_folder, **TINY)
    assert result["evaluation"] >= result["training"] > 0
    assert result["loss"] > 0


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_measurement_runs_in_each_kind_of_process(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    measurement = load("gpu_runner").Measurement("GPU", 1, load("gpu").find_gpu)
    outcome = load("gpu_runner").run_in_process(measurement, 120, tmp_path, method)
    assert (outcome.state, outcome.result) == ("measured", {"gpu": None}), (tmp_path / "log.txt").read_text()
    assert not load("gpu").sees_gpu(tmp_path)
