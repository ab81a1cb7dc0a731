"""Every file under templates/ and examples/ does what it is there for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t5tune.data.templates import load_template
from t5tune.settings import TrainSettings, load_settings, packaged_templates
from tests.conftest import REPOSITORY

ZERO3_KEYS = {"stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"}


@pytest.mark.parametrize("name", packaged_templates.names("runs"))
def test_run_is_a_whole_set_of_train_settings(name: str) -> None:
    settings, notes = load_settings(TrainSettings, file=name)
    assert settings.output_dir.parts[0] == "runs"
    assert notes == ["q_lora turns bf16 on: the 4-bit base computes in it"] * (settings.q_lora and not settings.bf16)


@pytest.mark.parametrize("name", packaged_templates.names("conversations"))
def test_layout_loads(name: str) -> None:
    assert "{text}" in load_template(name).assistant


@pytest.mark.parametrize("name", packaged_templates.names("deepspeed"))
def test_deepspeed_configuration_is_of_the_stage_in_its_name(name: str) -> None:
    zero = packaged_templates.read_deepspeed(name)["zero_optimization"]
    assert zero["stage"] == int(name.removeprefix("zero")[0])
    assert ("offload_optimizer" in zero) is name.endswith("offload")
    assert (set(zero) >= ZERO3_KEYS) is (zero["stage"] == 3)


def test_quickstart_runs_the_whole_chain_and_shows_what_it_made(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "quickstart" / "quickstart.py"
    half_made = tmp_path / "quickstart" / "before" / "predictions.jsonl"
    half_made.parent.mkdir(parents=True)
    half_made.write_text("")
    done = subprocess.run(
        [sys.executable, script, "--output-dir", tmp_path / "quickstart", "--max-steps", "3"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "T5TUNE_MAX_NEW_TOKENS": "4", "T5TUNE_NUM_DATA": "20"},
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart was interrupted, and goes on" in done.stderr
    for word in ("token cache", "run", "adapter", "merged model", "exact match", "before", "after", "you:", "model:"):
        assert word in done.stdout
    assert (tmp_path / "quickstart" / "merged" / "model.safetensors").is_file()


GENERATE = REPOSITORY / "examples" / "pocket" / "generate.py"


@pytest.mark.parametrize(("split", "num"), [("train", 400), ("heldout", 200)])
def test_quickstart_data_is_what_its_generator_writes(split: str, num: int, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    subprocess.run([sys.executable, GENERATE, "--split", split, "--num", str(num), "--output", output], check=True)
    assert output.read_bytes() == (REPOSITORY / "examples" / "quickstart" / f"{split}.jsonl").read_bytes()


def test_quickstart_splits_share_no_conversation() -> None:
    train, held_out = (
        {json.dumps(json.loads(line)["conversations"]) for line in path.read_text().splitlines()}
        for path in (REPOSITORY / "examples" / "quickstart" / f"{name}.jsonl" for name in ("train", "heldout"))
    )
    assert len(train) == 400
    assert len(held_out) == 200
    assert not train & held_out


def test_every_task_of_the_generator_writes_conversations_that_prepare_takes_whole(tmp_path: Path) -> None:
    from t5tune.commands.prepare import prepare
    from t5tune.settings import PrepareSettings

    help_text = subprocess.run([sys.executable, GENERATE, "--help"], capture_output=True, text=True, check=True).stdout
    tasks = help_text.rpartition("--task TASK")[2].partition("--split")[0].replace("\n", " ").split(",")
    tasks = [task.strip() for task in tasks]
    assert {"quickstart", "pretraining", "disfluency", "slots", "spelling", "spans"} <= set(tasks)
    for task in tasks:
        output = tmp_path / f"{task}.jsonl"
        arguments = ["--task", task, "--split", "heldout", "--seed", "5", "--num", "20", "--output", output]
        subprocess.run([sys.executable, GENERATE, *arguments], check=True)
    values = {"model_name_or_path": "pocket", "data_path": str(tmp_path), "output_dir": tmp_path / "cache"}
    made = prepare(PrepareSettings(**values))
    assert made.conversations == 20 * len(tasks)
    assert (made.rejected, made.unknown_tokens, made.truncated_sources) == (0, 0, 0)


def test_pocket_is_what_it_says() -> None:
    import numpy as np

    from t5tune.checkpoints.base import read_config
    from t5tune.checkpoints.pocket import pocket_folder
    from t5tune.checkpoints.safetensors import Checkpoint

    folder = pocket_folder()
    checkpoint, config = Checkpoint(folder), read_config(folder)
    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    assert {tensor.dtype for tensor in tensors} == {"BF16"}
    assert sum(tensor.array.size for tensor in tensors) < 4_000_000
    assert not checkpoint.is_tied()
    assert config["tie_word_embeddings"] is False
    assert config["scale_decoder_outputs"] is False
    assert config["feed_forward_proj"] == "gated-gelu"
    head, embedding = (checkpoint.tensor(name).to_float32() for name in ("lm_head.weight", "shared.weight"))
    assert np.abs(head - embedding).max() > 0.01
    templates = REPOSITORY / "templates" / "conversations"
    assert load_template("turns") == load_template(str(folder / "template.yaml"))
    assert (templates / "turns.yaml").is_file()


def test_pocket_writes_a_word_in_the_same_pieces_wherever_it_stands() -> None:
    from t5tune.checkpoints.pocket import pocket_folder
    from t5tune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(pocket_folder())
    for word in ("Mira", "croissants", "Tr", "sandwich", "K7-42", "x", "Zoë"):
        marked, quoted = (
            tokenizer.backend.encode(text, add_special_tokens=False).tokens for text in (word, f'"{word}')
        )
        assert [marked[0].removeprefix("▁"), *marked[1:]] == quoted[2:]
