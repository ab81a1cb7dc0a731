"""The measurements of benchmarks/gpu.py, each on the CPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model.kernels.test_flex_attention import without_kernels  # noqa: F401
from tests.support.gpu.benchmark import benchmarks, load  # noqa: F401

# torch hides this warning itself, but can't where warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture
def shape() -> Any:
    return load("t5tune.model.kernels.flex_check").AttentionShape(2, 16, 128, dropout=0.1)


SMALL_LENGTHS = (150, 1, 61), (40, 3, 90)


def list_unmet(result: dict[str, Any]) -> list[str]:
    return [comparison["what"] for comparison in result["comparisons"] if not comparison["is_met"]]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
def test_attention_is_compared_with_fp64(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load("gpu_kernels")
    monkeypatch.setattr(kernels, "CHECKED_LENGTHS", {"few": SMALL_LENGTHS})
    result = kernels.check_attention(shape, "cpu", torch.float32)
    ways = {one["what"].rpartition(":")[0] for one in result["comparisons"][1:]}
    assert ways == {
        f"few, {kind}, dropout {way}" for kind in kernels.KINDS for way in ("0, kernel", "0, loop", "0.1, kernel")
    }
    assert max(one["found"] for one in result["comparisons"][1:]) < 2e-6
    right = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *arguments: right(0.98 * arguments[0], *arguments[1:]))
    wrong = list_unmet(kernels.check_attention(shape, "cpu", torch.float32))
    assert {"few, encoder, dropout 0, kernel: query", "few, decoder, dropout 0.1, kernel: key"} <= set(wrong)
    assert not any("loop" in what for what in wrong)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("without_kernels")
def test_attention_is_timed_and_its_compilations_are_counted(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load("gpu_kernels")
    monkeypatch.setattr(kernels, "REPEATS", 1)
    monkeypatch.setattr(kernels, "WARM_UP", 0)
    times = kernels.time_attention(shape, SMALL_LENGTHS, "cpu", torch.float32)
    assert (times.pop("tokens"), times.pop("segments")) == ([212, 133], 3)
    assert len(times) == 12
    assert min(times.values()) > 0
    assert list_unmet(kernels.check_compilations(shape, 2, 64, "cpu", torch.float32)) == []
    right = kernels.attend

    def compile_again(*arguments: Any) -> torch.Tensor:
        torch._dynamo.reset()
        attended: torch.Tensor = right(*arguments)
        return attended

    monkeypatch.setattr(kernels, "attend", compile_again)
    assert list_unmet(kernels.check_compilations(shape, 2, 64, "cpu", torch.float32)) == [
        "compilations for 2 more batches"
    ]
    assert kernels.time_cudnn(shape, 1, 16, "cpu", torch.float32).keys() == {"batches", "cuDNN on", "cuDNN off"}


@pytest.mark.long
def test_layers_and_loss_are_compared_with_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load("gpu_kernels")
    monkeypatch.setattr(kernels, "REPEATS", 1)
    monkeypatch.setattr(kernels, "WARM_UP", 0)
    layers = "google/flan-t5-small", 32, 20, "cpu", torch.bfloat16
    result = kernels.check_layers(*layers)
    whats = {f"{part}: {name}" for part in (*kernels.LAYERS, "loss") for name in ("output", "input")}
    assert whats | {"LoRA: lora_A", "LoRA: lora_B"} <= {one["what"] for one in result["comparisons"]}
    assert list_unmet(result) == []
    times = kernels.time_layers(*layers)
    assert min(time["ms"] for time in times.values()) > 0
    right = kernels.compute_summed_loss
    monkeypatch.setattr(kernels, "compute_summed_loss", lambda *arguments: right(*arguments) * 1.01)
    assert list_unmet(kernels.check_layers(*layers)) == ["loss: output", "loss: input"]


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


@pytest.mark.slow
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
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def make_tiny() -> dict[str, Any]:
    return {**load("gpu_training").TINY, "steps": 5, "on_gpu": False, "dtype": "float32"}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("way", ["packed", "trainer", "packed, loop", "packed, no attention dropout"])
def test_training_is_measured(way: str, shared_folder: Path) -> None:
    result = load("gpu_training").measure_training(shared_folder, way, **make_tiny())
    assert result["batch"] == ("4 examples" if way == "trainer" else "512 tokens")
    assert result["tokens_per_second"] > 0
    assert result["launches"] > 100
    assert 0 <= result["idle_share"] < 1
    assert result["parameters"] > 2 * 1504 * 64
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
    training.measure_training(shared_folder, "packed", **make_tiny())
    assert batches == [(5, 6)]  # one more step is profiled


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(load("gpu_runner").Skipped, match="no_such_package isn't installed"):
        load("gpu_checks").check_steps(tmp_path, {}, load("gpu_checks").BF16, "no_such_package")


def test_adapters_that_differ_are_compared() -> None:
    compare = load("gpu_checks").compare_tensors
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    found = {"a": torch.tensor([3.0, 4.5]), "b": torch.zeros(2)}
    assert compare(expected, found) == {"largest difference": 0.1, "bits are equal": False}


@pytest.mark.slow
@pytest.mark.long
def test_the_memory_of_evaluation_is_measured(shared_folder: Path) -> None:
    result = load("gpu_training").measure_evaluation(shared_folder, **make_tiny())
    assert result["evaluation"] >= result["training"] > 0
    assert result["loss"] > 0


STEPS = ([7.8, 7.5, 7.0], [0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("losses", "norms", "unmet"),
    [
        (STEPS[0], STEPS[1], []),
        ([7.801, 7.51, 7.01], [0.601, 0.702, 0.801], []),
        ([7.9, 7.5, 7.0], STEPS[1], ["difference of the first loss", "difference of the losses / fp32's change"]),
        (
            STEPS[0],
            [0.61, 0.7, 0.8],
            ["difference of the first gradient norm", "mean difference of the gradient norms"],
        ),
        (STEPS[0][:2], STEPS[1][:2], ["steps"]),
        ([7.8, 7.8, 7.8], STEPS[1], ["difference of the losses / fp32's change", "change of the losses / fp32's"]),
        (
            [7.8, float("nan"), 7.0],
            STEPS[1],
            ["difference of the losses / fp32's change", "change of the losses / fp32's"],
        ),
    ],
)
def test_wrong_losses_and_gradients_are_found(losses: list[float], norms: list[float], unmet: list[str]) -> None:
    checks = load("gpu_checks")
    untrained = checks.Steps([7.8, 7.8, 7.8], [0.6, 0.6, 0.6])
    found = checks.compare_steps(checks.Steps(losses, norms), checks.Steps(*STEPS), untrained, checks.BF16)
    assert [one.what for one in found if not one.is_met] == unmet
