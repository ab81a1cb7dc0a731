"""Each example's script, at a small size: the built-in model, two steps."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
SMALL = {"MODEL": "pocket", "T5TUNE_MAX_STEPS": "2", "T5TUNE_MAX_NEW_TOKENS": "4", "T5TUNE_VERIFY": "false"}


def run(script: str, output: Path, *flags: str, **variables: str) -> str:
    """Run an example, and return what it printed on stdout."""
    # the console script of this environment, wherever the tests were started from
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [EXAMPLES / script / "run.sh", *flags],
        env={**os.environ, **SMALL, "PATH": path, "OUTPUT": str(output), **variables},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["summarise", "extract"])
def test_train_score_and_merge(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert len((tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize(("name", "kind"), [("summarise", "csv"), ("extract", "jsonl")])
def test_the_data_is_what_its_generator_writes(name: str, kind: str, tmp_path: Path) -> None:
    for seed, num, split in (("0", "300", "train"), ("1", "60", "heldout")):
        output = tmp_path / f"{split}.{kind}"
        command = [sys.executable, EXAMPLES / name / "generate.py", "--seed", seed, "--num", num, "--output", output]
        subprocess.run(command, check=True)
        assert output.read_bytes() == (EXAMPLES / name / output.name).read_bytes()


def test_fastchats_run_on_its_own_data(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    data = shared("data/conversations/fastchat_dummy_conversation.json")
    run(
        "fastchat",
        tmp_path,
        "--no-bf16",
        "--model-max-length",
        "128",
        "--gradient-accumulation-steps",
        "1",
        DATA=str(data),
    )
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_xxls_chain_in_four_bits(tmp_path: Path, conversations: Path) -> None:
    run("flan-t5-xxl-24gb", tmp_path, "--gradient-accumulation-steps", "1", DATA=str(conversations))
    assert "q_lora: true" in (tmp_path / "run" / "settings.yaml").read_text()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_zero3_on_two_processes(tmp_path: Path, conversations: Path) -> None:
    flags = ("--no-bf16", "--gradient-accumulation-steps", "1")
    run("zero3", tmp_path, *flags, DATA=str(conversations), PROCESSES="--num-processes 2")
    assert "deepspeed: zero3" in (tmp_path / "run" / "settings.yaml").read_text()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
