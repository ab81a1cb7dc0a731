"""Every file under templates/ and examples/ does what it is there for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from t5tune import presets
from t5tune.data.templates import load_template
from t5tune.settings import TrainSettings, load_settings
from tests.conftest import REPOSITORY

ZERO3_KEYS = {"stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"}


@pytest.mark.parametrize("name", presets.names("runs"))
def test_run_is_a_whole_set_of_train_settings(name: str) -> None:
    settings, notes = load_settings(TrainSettings, file=name)
    assert settings.output_dir.parts[0] == "runs"
    assert notes == ["q_lora turns bf16 on: the 4-bit base computes in it"] * (settings.q_lora and not settings.bf16)


@pytest.mark.parametrize("name", presets.names("conversations"))
def test_layout_loads(name: str) -> None:
    assert "{text}" in load_template(name).assistant


@pytest.mark.parametrize("name", presets.names("deepspeed"))
def test_deepspeed_configuration_is_of_the_stage_in_its_name(name: str) -> None:
    zero = presets.read_deepspeed(name)["zero_optimization"]
    assert zero["stage"] == int(name.removeprefix("zero")[0])
    assert ("offload_optimizer" in zero) is name.endswith("offload")
    assert (set(zero) >= ZERO3_KEYS) is (zero["stage"] == 3)


def test_quickstart_runs_the_whole_chain_and_shows_what_it_made(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "quickstart" / "quickstart.py"
    done = subprocess.run(
        [sys.executable, script, "--output-dir", tmp_path / "quickstart", "--max-steps", "3"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for word in ("token cache", "run", "adapter", "merged model", "you:", "model:"):
        assert word in done.stdout
    assert (tmp_path / "quickstart" / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(("split", "num"), [("train", 400), ("heldout", 200)])
def test_quickstart_data_is_what_its_generator_writes(split: str, num: int, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    script = REPOSITORY / "examples" / "pocket" / "generate.py"
    subprocess.run([sys.executable, script, "--split", split, "--num", str(num), "--output", output], check=True)
    assert output.read_bytes() == (REPOSITORY / "examples" / "quickstart" / f"{split}.jsonl").read_bytes()


def test_quickstart_splits_share_no_conversation() -> None:
    train, held_out = (
        {json.dumps(json.loads(line)["conversations"]) for line in path.read_text().splitlines()}
        for path in (REPOSITORY / "examples" / "quickstart" / f"{name}.jsonl" for name in ("train", "heldout"))
    )
    assert len(train) == 400
    assert len(held_out) == 200
    assert not train & held_out
