"""The built-in model `pocket`: a small T5 of Flan's architecture (gated GELU, untied head), random from a seed."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from t5tune.publish import published_folder, write_json
from t5tune.weights.streaming import write_safetensors
from t5tune.weights.tensors import Tensor, from_float32

SEED = 20261124
WIDTH, HEADS, HEAD_WIDTH, HIDDEN, LAYERS, ROWS, BUCKETS = 128, 4, 32, 384, 3, 256, 32
FILES = Path(__file__).parent.parent / "pocket"
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": ROWS,
    "d_model": WIDTH,
    "d_kv": HEAD_WIDTH,
    "d_ff": HIDDEN,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": BUCKETS,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}


def conversations_file() -> Path:
    """The packaged conversation set that `--data-path pocket` names."""
    packaged = FILES / "train.jsonl"
    return packaged if packaged.is_file() else FILES.parent.parent / "examples" / "quickstart" / "train.jsonl"


def pocket_folder() -> Path:
    """The checkpoint's folder in the user's cache, built there on first use."""
    tokenizer_files = sorted(FILES.glob("tokenizer*.json"))
    digest = hashlib.sha256(json.dumps([SEED, CONFIG]).encode())
    for file in tokenizer_files:
        digest.update(file.read_bytes())
    folder = _cache_folder() / f"pocket-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        with published_folder(folder) as staged:
            for file in tokenizer_files:
                shutil.copy(file, staged)
            write_json(staged / "config.json", CONFIG)
            write_safetensors(staged / "model.safetensors", _random_weights(), {"format": "pt"})
    return folder


def _cache_folder() -> Path:
    """$XDG_CACHE_HOME/t5tune, ~/.cache/t5tune, or a folder for temporary files where neither can be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "t5tune"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"t5tune-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def _random_weights() -> dict[str, Tensor]:
    """bf16 weights with the spreads that T5 starts from (Raffel et al. 2020; Mesh TensorFlow's initialisers)."""
    rng = np.random.default_rng(SEED)
    inner = HEADS * HEAD_WIDTH
    tensors: dict[str, Tensor] = {}

    def normal(name: str, shape: tuple[int, ...], spread: float) -> None:
        values = (rng.standard_normal(shape) * spread).astype(np.float32)
        tensors[f"{name}.weight"] = from_float32(values, "BF16")

    def ones(name: str) -> None:
        tensors[f"{name}.weight"] = from_float32(np.ones(WIDTH, np.float32), "BF16")

    normal("shared", (ROWS, WIDTH), 1.0)
    normal("lm_head", (ROWS, WIDTH), WIDTH**-0.5)
    for stack, attentions in (
        ("encoder", ["SelfAttention"]),
        ("decoder", ["SelfAttention", "EncDecAttention"]),
    ):
        for block in range(LAYERS):
            for layer, attention in enumerate(attentions):
                prefix = f"{stack}.block.{block}.layer.{layer}"
                normal(f"{prefix}.{attention}.q", (inner, WIDTH), (WIDTH * HEAD_WIDTH) ** -0.5)
                normal(f"{prefix}.{attention}.k", (inner, WIDTH), WIDTH**-0.5)
                normal(f"{prefix}.{attention}.v", (inner, WIDTH), WIDTH**-0.5)
                normal(f"{prefix}.{attention}.o", (WIDTH, inner), inner**-0.5)
                if block == 0 and attention == "SelfAttention":
                    normal(f"{prefix}.{attention}.relative_attention_bias", (BUCKETS, HEADS), WIDTH**-0.5)
                ones(f"{prefix}.layer_norm")
            prefix = f"{stack}.block.{block}.layer.{len(attentions)}"
            normal(f"{prefix}.DenseReluDense.wi_0", (HIDDEN, WIDTH), WIDTH**-0.5)
            normal(f"{prefix}.DenseReluDense.wi_1", (HIDDEN, WIDTH), WIDTH**-0.5)
            normal(f"{prefix}.DenseReluDense.wo", (WIDTH, HIDDEN), HIDDEN**-0.5)
            ones(f"{prefix}.layer_norm")
        ones(f"{stack}.final_layer_norm")
    return tensors
