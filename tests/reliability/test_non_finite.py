"""A non-finite loss or gradient never changes the weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import LONG, list_complete_steps, make_arguments

pytestmark = pytest.mark.slow

SETUPS = {
    "alone": (1, ()),
    "zero0": (1, ("--deepspeed=zero0",)),
    "zero2-bf16": (1, ("--deepspeed=zero2", "--bf16")),
    "zero3": (1, ("--deepspeed=zero3",)),
    "two ranks": (2, ()),
    "zero2 on two ranks": (2, ("--deepspeed=zero2",)),
    "zero3 on two ranks": (2, ("--deepspeed=zero3",)),
}
QUICK_CASES = [
    ("alone", "stop"), ("zero0", "skip"), ("zero3", "stop"), ("two ranks", "stop"), ("two ranks", "skip"),
    ("zero3 on two ranks", "skip"),
]  # fmt: skip
CASES = [(setup, action) for setup in SETUPS for action in ("stop", "skip")] if LONG else QUICK_CASES
FEW_STEPS = ("--save-steps=2", "--max-steps=8", "--report-samples=0")


@pytest.mark.parametrize(("setup", "action"), CASES)
@pytest.mark.variants("two ranks-skip", "alone-stop")
def test_an_overflow_on_one_rank_updates_nothing_and_is_reported(
    setup: str, action: str, fork_server: ForkServer, inputs: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks, more = SETUPS[setup]
    command = make_arguments(*inputs, run, *FEW_STEPS, f"--on-non-finite={action}", *more)
    done = fork_server.run(command, ranks, [f"tests.support.ranks.faults:overflow_at([5], {ranks - 1})"])
    (line,) = map(json.loads, (run / "non_finite.jsonl").read_text().splitlines())
    assert (line["step"], line["action"], line["loss"], len(line["examples"])) == (5, action, None, 2 * ranks)
    if action == "stop":
        assert done.codes == [1] * ranks, done.log
        errors = [text for text in done.log.splitlines() if text.startswith("error: ")]
        assert len(errors) == ranks
        assert all("step 5: the loss is inf; no update was made" in text for text in errors)
        assert all(f"the last complete checkpoint is {run / 'checkpoint-4'}" in text for text in errors)
        assert list_complete_steps(run) == [4, 2]
        weights = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    else:
        assert done.codes == [0] * ranks, done.log
        assert json.loads((run / "result.json").read_text())["train_loss"] > 0
        weights = load_file(run / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)


def test_the_limit_of_skipped_steps_includes_those_before_resuming(
    fork_server: ForkServer, inputs: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = make_arguments(*inputs, run, *FEW_STEPS, "--on-non-finite=skip", "--max-skipped-steps=2")
    done = fork_server.run(command, calls=["tests.support.ranks.faults:overflow_at([3, 4, 7])"])
    assert done.codes == [1], done.log
    assert "step 7: the loss is inf" in done.log
    assert "max_skipped_steps: 2 have been skipped already" in done.log
    assert "(1 of at most 2 skipped)" in done.log
    assert list_complete_steps(run) == [6, 4, 2]
    with open(run / "non_finite.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a line truncated by a kill
    done = fork_server.run(command, calls=["tests.support.ranks.faults:overflow_at([2])"])
    assert done.codes == [1], done.log
    assert "step 8: the loss is inf" in done.log
    assert "max_skipped_steps: 2 have been skipped already" in done.log
    assert fork_server.run(command).codes == [0]
    lines = (run / "non_finite.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines if line.endswith("}")] == ["skip", "skip", "stop", "stop"]
