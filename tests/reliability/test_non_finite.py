"""A loss or gradient that is no finite number never reaches a weight."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5tune.settings import dump_settings
from tests.reliability.runs import LONG, settings, whole_steps

WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "zero0": {"deepspeed": "zero0"},
    "zero2-bf16": {"deepspeed": "zero2", "bf16": True},
    "zero3": {"deepspeed": "zero3"},
}
SHORT = [("alone", "stop"), ("zero0", "skip"), ("zero3", "stop")]
CASES = [(way, action) for way in WAYS for action in ("stop", "skip")] if LONG else SHORT


@pytest.mark.parametrize(("way", "action"), CASES)
def test_an_overflow_updates_nothing_and_is_told(
    way: str, action: str, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = {"save_steps": 2, "max_steps": 8, "on_non_finite": action, "report_samples": 0}
    (tmp_path / "settings.yaml").write_text(
        dump_settings(settings(untied_base, conversations, run, **more, **WAYS[way]))
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("overflowing.py")), str(tmp_path / "settings.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    (line,) = map(json.loads, (run / "non_finite.jsonl").read_text().splitlines())
    assert (line["step"], line["action"], line["loss"], len(line["examples"])) == (5, action, None, 2)
    if action == "stop":
        assert done.returncode == 1, done.stderr[-3000:]
        assert "step 5: the loss is inf; no update was made" in done.stderr
        assert f"the last good checkpoint is {run / 'checkpoint-4'}" in done.stderr
        assert whole_steps(run) == [4, 2]
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((run / "result.json").read_text())["train_loss"] > 0
        weights = load_file(run / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(value).all()) for value in weights.values())
        assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)
