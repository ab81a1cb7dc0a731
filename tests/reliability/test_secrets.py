"""Secret tokens are in no file and in no log."""

import sys
from pathlib import Path

import pytest

from tests.support.processes.runs import Running, make_arguments

pytestmark = pytest.mark.slow

CANARY = "canary-5e1f7c"
TOKENS = {"HF_TOKEN": f"hf_{CANARY}", "WANDB_API_KEY": CANARY, "HUGGING_FACE_HUB_TOKEN": CANARY}


def find_canary(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "secret.yaml"]
    return [path for path in files if CANARY.encode() in path.read_bytes()]


@pytest.mark.long
def test_secret_tokens_are_in_no_file_and_no_log(inputs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "t5tune", *make_arguments(*inputs, run, "--max-steps=2")]
    with Running([*command, "--debug"], run, **TOKENS) as running:
        assert running.wait() == 0, running.log.read_text()[-3000:]
    assert len(list(run.rglob("*"))) > 20
    assert not list(run.rglob("training_args*"))
    assert find_canary(tmp_path) == []
    (tmp_path / "secret.yaml").write_text(f"training_args:\n  hub_token: {CANARY}\n")
    other = tmp_path / "other"
    command = [sys.executable, "-m", "t5tune", *make_arguments(*inputs, other)]
    with Running([*command, f"--config={tmp_path / 'secret.yaml'}"], other, **TOKENS) as running:
        assert running.wait() == 2
    assert "training_args.hub_token: secrets don't belong in settings" in running.log.read_text()
    assert find_canary(tmp_path) == []
