"""The built-in model is as documented. Its scripts make its tokenizer and data, and pretraining resumes bit for bit."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t5tune.compat.requirements import is_older
from t5tune.data.tokens.templates import load_template
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.slow

SCRIPTS = REPOSITORY / "examples" / "pocket"
GENERATE = SCRIPTS / "generate.py"
PACKAGED_MODEL = REPOSITORY / "t5tune" / "pocket"
# eight steps instead of thousands; if a step is given, the process dies right after that step's checkpoint
SMALL_RUN = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pretrain
pretrain.STEPS, pretrain.CONSTANT_STEPS, pretrain.SAVE_STEPS, pretrain.POOL = 8, 4, 2, 64
save, last = pretrain.torch.save, int(sys.argv[3])
def save_and_die(state, path):
    save(state, path)
    if state["step"] == last:
        Path(path).replace(Path(path).with_name("state.pt"))
        os._exit(9)
pretrain.torch.save = save_and_die
pretrain.pretrain(Path(sys.argv[2]))
"""


def pretrain(output: Path, last: int = 0) -> int:
    output.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-c", SMALL_RUN, SCRIPTS, output, str(last)], check=False).returncode


@pytest.mark.long
@pytest.mark.skipif(
    is_older(importlib.metadata.version("sentencepiece"), "0.2.3"),
    reason="the packaged tokenizer was trained with sentencepiece 0.2.3; older releases choose other pieces",
)
def test_the_packaged_tokenizer_is_what_its_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPTS / "make_tokenizer.py", "--output", tmp_path], check=True)
    made, packaged = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, PACKAGED_MODEL))
    assert made == packaged


@pytest.mark.long
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_killed_pretraining_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert pretrain(whole) == 0
    assert [pretrain(cut, last=2), pretrain(cut, last=6), pretrain(cut)] == [9, 9, 0]
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    made, packaged = (json.loads((folder / "config.json").read_text()) for folder in (cut, PACKAGED_MODEL))
    assert made | {"transformers_version": None} == packaged | {"transformers_version": None}


def test_pocket_has_the_documented_size_dtype_and_config() -> None:
    import numpy as np

    from t5tune.checkpoints.base import read_config
    from t5tune.checkpoints.base_tensors import Checkpoint
    from t5tune.checkpoints.pocket import pocket_folder

    folder = pocket_folder()
    checkpoint, config = Checkpoint(folder), read_config(folder)
    tensors = [checkpoint.get_tensor(name) for name in checkpoint.list_names()]
    assert {tensor.dtype for tensor in tensors} == {"BF16"}
    assert sum(tensor.array.size for tensor in tensors) == 2_165_248
    assert not checkpoint.is_tied()
    assert config["tie_word_embeddings"] is False
    assert config["scale_decoder_outputs"] is False
    assert config["feed_forward_proj"] == "gated-gelu"
    head, embedding = (checkpoint.get_tensor(name).to_float32() for name in ("lm_head.weight", "shared.weight"))
    assert np.abs(head - embedding).max() > 0.01
    templates = REPOSITORY / "templates" / "conversations"
    assert load_template("turns") == load_template(str(folder / "template.yaml"))
    assert (templates / "turns.yaml").is_file()


def test_pocket_tokenizes_a_word_the_same_after_a_quote() -> None:
    from t5tune.checkpoints.pocket import pocket_folder
    from t5tune.data.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(pocket_folder())
    for word in ("Mira", "croissants", "Tr", "sandwich", "K7-42", "x", "Zoë"):
        marked, quoted = (
            tokenizer.backend.encode(text, add_special_tokens=False).tokens for text in (word, f'"{word}')
        )
        assert [marked[0].removeprefix("▁"), *marked[1:]] == quoted[2:]


@pytest.mark.long
def test_prepare_accepts_every_conversation_of_every_generator_task(tmp_path: Path) -> None:
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
