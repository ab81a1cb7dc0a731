"""The comparison of published checkpoints with stock transformers, with a stand-in for the Hub's cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from tests.support.paths import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "published.py"
CHECKPOINT = "google/byt5-small"

pytestmark = pytest.mark.slow


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A folder like the Hub's cache, with a small random model in place of ByT5."""
    folder = tmp_path / "hub" / f"models--{CHECKPOINT.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    snapshot = folder / "snapshots" / "abc"
    config = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(384, 32) * 0.2)
    model.save_pretrained(snapshot)
    written = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": False}))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125, **special}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tmp_path / "hub"


def run(hub_cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--folder", hub_cache.parent, *options]
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.long
def test_a_checkpoint_is_compared_with_stock_transformers(hub_cache: Path) -> None:
    done = run(hub_cache, "--only", "byt5")
    assert done.returncode == 0, done.stdout + done.stderr
    *_, row = done.stdout.splitlines()
    _, name, checkpoint, tied, base, merged, replies, _ = map(str.strip, row.split("|"))
    assert (name, checkpoint, tied, replies) == ("ByT5", f"`{CHECKPOINT}`", "no / no", "3 of 3")
    assert float(base) < 1e-5
    assert float(merged) < 1e-5
    assert sorted(path.name for path in hub_cache.parent.iterdir()) == ["hub"]


@pytest.mark.long
def test_the_row_of_a_missing_checkpoint_has_the_reason(hub_cache: Path) -> None:
    done = run(hub_cache, "--only", "mt5")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stdout.splitlines()[-1]


@pytest.mark.long
def test_logits_that_differ_are_an_error(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose head the stock model would tie, although the file has a different head."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import published

    snapshot = next(hub_cache.glob("*/snapshots/abc"))
    tensors = load_file(snapshot / "model.safetensors")
    from t5tune.model.load import load_base

    ours = load_base(snapshot, torch.float32, torch.device("cpu"))
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 1.1}, snapshot / "model.safetensors")
    other = T5ForConditionalGeneration.from_pretrained(snapshot)
    assert published.compare_logits(ours, other, [([3, 4, 1], [5, 6, 1])]) > published.MAX_LOGITS_ERROR
