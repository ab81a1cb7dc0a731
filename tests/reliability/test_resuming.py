"""Resuming is exact under every kind of sharding and base, with workers, odd tails, packing and evaluations between."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import t5tune
from tests.support.runs import LONG, adapter, arguments, kill, start, whole_steps

STAGES = {"alone": (), **{f"zero{stage}": (f"--deepspeed=zero{stage}", "--num-processes=2") for stage in (0, 2, 3)}}
BASES = {
    "bf16": ("--bf16",),
    "q_lora": ("--q-lora", "--no-bf16"),
    "dora": ("--use-dora", "--eval-generate=2"),
}
DATA = {
    "examples": (),
    "tokens": ("--tokens-per-batch=600",),
    "padded": ("--packing=off",),
}
# 43 examples: three epochs whose last steps are odd, evaluated between, read by another process
ODD = (
    "--max-steps=-1", "--num-train-epochs=3", "--gradient-accumulation-steps=3", "--dataloader-num-workers=1",
    "--eval-fraction=0.1", "--eval-steps=4", "--save-steps=1000", "--report-samples=0",
)  # fmt: skip
ALL = [(stage, base, data) for stage in STAGES for base in BASES for data in DATA]
CASES = ALL if LONG else [("alone", "q_lora", "tokens"), ("zero2", "bf16", "examples")]


@pytest.mark.parametrize(("stage", "base", "data"), CASES)
def test_a_stopped_run_ends_with_the_bits_of_a_straight_one(
    stage: str, base: str, data: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    stop_and_go_on(untied_base, conversations, tmp_path, *ODD, *STAGES[stage], *BASES[base], *DATA[data])


def stop_and_go_on(base: Path, data: Path, tmp_path: Path, *more: str, **environment: str) -> None:
    """The adapter of a run that was stopped and went on is that of a straight one."""
    for name in ("straight", "stopped"):
        run = tmp_path / name
        if name == "stopped":
            with start(base, data, run, *more, **environment) as running:
                running.until_step(8)
                kill(running.process.pid, signal.SIGTERM)
                assert running.end() == 143, running.log.read_text()[-3000:]
            assert whole_steps(run)[0] >= 8
        with start(base, data, run, *more, **environment) as running:
            assert running.end() == 0, running.log.read_text()[-3000:]
    assert adapter(tmp_path / "straight") == adapter(tmp_path / "stopped")


def test_so_does_what_torch_compiles(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    """Its kernels drop out by themselves, too."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("torch.compile makes its kernels with a C++ compiler, and there is none here")
    more, kernels = ("--torch-compile", "--lora-target-modules=all-linear"), tmp_path / "kernels"
    stop_and_go_on(untied_base, conversations, tmp_path, *more, TORCHINDUCTOR_CACHE_DIR=str(kernels))
    assert any(kernels.glob("**/*.so"))
    assert "are compiled: the first steps take" in (tmp_path / "straight.log").read_text()
    done = t5tune(*arguments(untied_base, conversations, tmp_path / "stopped", more[1], "--max-steps=30"))
    assert done.code == 2
    assert "torch_compile" in done.stderr
    done = t5tune(*arguments(untied_base, conversations, tmp_path / "new", *more), env={"PATH": str(tmp_path)})
    assert (done.code, done.stderr.count("error: ")) == (1, 1), done.stderr
    assert "torch_compile: no C++ compiler" in done.stderr
