"""A loss or gradient that is no finite number never reaches a weight."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.forks import Forks
from tests.support.runs import LONG, arguments, whole_steps

WAYS = {
    "alone": (1, ()),
    "zero0": (1, ("--deepspeed=zero0",)),
    "zero2-bf16": (1, ("--deepspeed=zero2", "--bf16")),
    "zero3": (1, ("--deepspeed=zero3",)),
    "two ranks": (2, ()),
    "two of zero2": (2, ("--deepspeed=zero2",)),
    "two of zero3": (2, ("--deepspeed=zero3",)),
}
SHORT = [
    ("alone", "stop"), ("zero0", "skip"), ("zero3", "stop"), ("two ranks", "stop"), ("two ranks", "skip"),
    ("two of zero3", "skip"),
]  # fmt: skip
CASES = [(way, action) for way in WAYS for action in ("stop", "skip")] if LONG else SHORT
FEW_STEPS = ("--save-steps=2", "--max-steps=8", "--report-samples=0")


@pytest.mark.parametrize(("way", "action"), CASES)
def test_an_overflow_of_one_rank_updates_nothing_and_is_told(
    way: str, action: str, forks: Forks, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks, more = WAYS[way]
    command = arguments(untied_base, conversations, run, *FEW_STEPS, f"--on-non-finite={action}", *more)
    done = forks.run(command, ranks, [f"tests.support.overflowing:overflow_at([5], {ranks - 1})"])
    (line,) = map(json.loads, (run / "non_finite.jsonl").read_text().splitlines())
    assert (line["step"], line["action"], line["loss"], len(line["examples"])) == (5, action, None, 2 * ranks)
    if action == "stop":
        assert done.codes == [1] * ranks, done.log
        told = [text for text in done.log.splitlines() if text.startswith("error: ")]
        assert len(told) == ranks
        assert all("step 5: the loss is inf; no update was made" in text for text in told)
        assert all(f"the last good checkpoint is {run / 'checkpoint-4'}" in text for text in told)
        assert whole_steps(run) == [4, 2]
        weights = load_file(run / "checkpoint-4" / "adapter_model.safetensors")
    else:
        assert done.codes == [0] * ranks, done.log
        assert json.loads((run / "result.json").read_text())["train_loss"] > 0
        weights = load_file(run / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)


def test_skipped_steps_are_limited_over_all_that_a_run_was_resumed(
    forks: Forks, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = arguments(untied_base, conversations, run, *FEW_STEPS, "--on-non-finite=skip", "--max-skipped-steps=2")
    done = forks.run(command, calls=["tests.support.overflowing:overflow_at([3, 4, 7])"])
    assert done.codes == [1], done.log
    assert "step 7: the loss is inf" in done.log
    assert "max_skipped_steps: 2 were skipped before" in done.log
    assert "(1 of at most 2 skipped)" in done.log
    assert whole_steps(run) == [6, 4, 2]
    with open(run / "non_finite.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a kill leaves it
    done = forks.run(command, calls=["tests.support.overflowing:overflow_at([2])"])
    assert done.codes == [1], done.log
    assert "step 8: the loss is inf" in done.log
    assert "max_skipped_steps: 2 were skipped before" in done.log
    assert forks.run(command).codes == [0]
    lines = (run / "non_finite.jsonl").read_text().splitlines()
    assert [json.loads(line)["action"] for line in lines if line.endswith("}")] == ["skip", "skip", "stop", "stop"]
