"""Resuming is exact under every kind of sharding and base, with workers, odd tails, packing and evaluations between."""

import signal
from pathlib import Path

import pytest

from tests.reliability.runs import LONG, adapter, kill, start, whole_steps

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
    more = (*ODD, *STAGES[stage], *BASES[base], *DATA[data])
    for name in ("straight", "stopped"):
        run = tmp_path / name
        if name == "stopped":
            with start(untied_base, conversations, run, *more) as running:
                running.until_step(8)
                kill(running.process.pid, signal.SIGTERM)
                assert running.end() == 143, running.log.read_text()[-3000:]
            assert whole_steps(run)[0] >= 8
        with start(untied_base, conversations, run, *more) as running:
            assert running.end() == 0, running.log.read_text()[-3000:]
    assert adapter(tmp_path / "straight") == adapter(tmp_path / "stopped")
