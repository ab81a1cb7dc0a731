"""Resuming is exact for all ZeRO stages and methods, with workers, partial steps, packing and evaluations."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune.commands.train import train
from t5tune.errors import Stopped
from t5tune.progress import Advanced, Event
from t5tune.training.callbacks.progress import TRAIN_TASK
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import (
    list_complete_steps,
    make_arguments,
    make_settings,
    read_adapter,
    send_signal,
    start_run,
    stop_at,
)

pytestmark = pytest.mark.slow

STAGES = {"alone": (1,), **{f"zero{stage}": (2, f"--deepspeed=zero{stage}") for stage in (0, 2, 3)}}
STOPPED = 8
METHODS = {"bf16": ("--bf16",), "q_lora": ("--q-lora", "--no-bf16"), "dora": ("--use-dora", "--eval-generate=2")}
DATA = {"examples": (), "tokens": ("--tokens-per-batch=600",), "padded": ("--packing=off",)}
# 43 examples: three epochs whose last steps are partial, with evaluations, and a worker that loads the data
PARTIAL_STEPS_WITH_EVALUATION = (
    "--max-steps=-1", "--num-train-epochs=3", "--gradient-accumulation-steps=3", "--dataloader-num-workers=1",
    "--eval-fraction=0.1", "--eval-steps=4", "--save-steps=1000", "--report-samples=0",
)  # fmt: skip
ALL = [(stage, method, data) for stage in STAGES for method in METHODS for data in DATA]


@pytest.mark.long
@pytest.mark.parametrize(("stage", "method", "data"), ALL)
def test_a_stopped_run_ends_with_the_uninterrupted_bits(
    stage: str, method: str, data: str, fork_server: ForkServer, inputs: list[Path], tmp_path: Path
) -> None:
    ranks, *flags = STAGES[stage]
    more = (*PARTIAL_STEPS_WITH_EVALUATION, *flags, *METHODS[method], *DATA[data])
    stop = f"tests.support.ranks.faults:stop_in_step({STOPPED})"
    for name, calls in (("uninterrupted", ()), ("stopped", (stop,)), ("stopped", ())):
        done = fork_server.run(make_arguments(*inputs, tmp_path / name, *more), ranks, calls)
        assert done.codes == [143 if calls else 0] * ranks, done.log[-3000:]
        if calls:
            assert list_complete_steps(tmp_path / name) == [STOPPED]
    assert read_adapter(tmp_path / "uninterrupted") == read_adapter(tmp_path / "stopped")


@pytest.mark.parametrize("more", [{"packing": "on"}, {"packing": "off", "q_lora": True, "bf16": False}])
@pytest.mark.variants(1)
def test_full_determinism_runs_and_resumes_with_the_same_bits(
    more: dict[str, Any], inputs: list[Path], tmp_path: Path
) -> None:
    """On GPUs it is what makes resuming exact. torch raises an error for an operation that isn't deterministic."""
    seen = []

    def note_mode(_: Event) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())

    more = {**more, "training_args": {"full_determinism": True}, "max_steps": 12, "label_smoothing_factor": 0.1}
    stopped = make_settings(*inputs, tmp_path / "stopped", **more)
    with pytest.raises(Stopped):
        train(stopped, stop_at(Advanced(TRAIN_TASK, 5)))
    train(stopped)
    train(make_settings(*inputs, tmp_path / "uninterrupted", **more), note_mode)
    assert read_adapter(tmp_path / "uninterrupted") == read_adapter(tmp_path / "stopped")
    assert any(seen)
    assert not torch.are_deterministic_algorithms_enabled()  # a notebook continues after the run
    assert not torch.backends.cudnn.deterministic


@pytest.mark.long
def test_a_stopped_run_with_torch_compile_ends_with_equal_bits(inputs: list[Path], tmp_path: Path) -> None:
    """The compiled kernels include dropout, so their random numbers must resume too."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("torch.compile needs a C++ compiler")
    more, kernels = ("--torch-compile", "--lora-target-modules=all-linear"), tmp_path / "kernels"
    for name in ("uninterrupted", "stopped", "stopped"):
        run, cache = tmp_path / name, {"TORCHINDUCTOR_CACHE_DIR": str(kernels)}
        is_stopped = name == "stopped" and not run.exists()
        with start_run(*inputs, run, *more, **cache) as running:
            if is_stopped:
                running.wait_for_step(8)
                send_signal(running.process.pid, signal.SIGTERM)
            assert running.wait() == (143 if is_stopped else 0), running.log.read_text()[-3000:]
    assert read_adapter(tmp_path / "uninterrupted") == read_adapter(tmp_path / "stopped")
    assert any(kernels.glob("**/*.so"))
    assert "are compiled; the first steps take" in (tmp_path / "uninterrupted.log").read_text()
    done = t5tune_in_fork(*make_arguments(*inputs, tmp_path / "stopped", more[1], "--max-steps=30"))
    assert done.code == 2
    assert "torch_compile" in done.stderr


def test_torch_compile_without_a_compiler_is_refused(inputs: list[Path], tmp_path: Path) -> None:
    flags = make_arguments(*inputs, tmp_path / "run", "--torch-compile")
    done = t5tune_in_fork(*flags, env={"PATH": str(tmp_path)})
    assert (done.code, done.stderr.count("error: ")) == (1, 1), done.stderr
    assert "torch_compile: no C++ compiler" in done.stderr
