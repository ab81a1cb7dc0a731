"""What makes the built-in model: the tokenizer is its script's, pretraining gives the same bits when it is cut off."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t5tune.compat.requirements import is_older
from tests.conftest import REPOSITORY

MAKING = REPOSITORY / "examples" / "pocket"
FILES = REPOSITORY / "t5tune" / "pocket"
# eight steps instead of thousands; with a step to stop behind, it ends there as a kill ends it
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


def pretrained(output: Path, last: int = 0) -> int:
    output.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-c", SMALL_RUN, MAKING, output, str(last)], check=False).returncode


@pytest.mark.skipif(
    is_older(importlib.metadata.version("sentencepiece"), "0.2.3"),
    reason="the packaged one was trained by sentencepiece 0.2.3, and older ones choose other pieces",
)
def test_the_packaged_tokenizer_is_what_its_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, MAKING / "make_tokenizer.py", "--output", tmp_path], check=True)
    made, packaged = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, FILES))
    assert made == packaged


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_pretraining_gives_the_same_bits_when_it_was_cut_off_before_and_behind_the_untying(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert pretrained(whole) == 0
    assert [pretrained(cut, last=2), pretrained(cut, last=6), pretrained(cut)] == [9, 9, 0]
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    made, packaged = (json.loads((folder / "config.json").read_text()) for folder in (cut, FILES))
    assert made | {"transformers_version": None} == packaged | {"transformers_version": None}
