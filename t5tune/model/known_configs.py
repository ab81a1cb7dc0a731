"""Configs of commonly used checkpoints, from their config.json on the Hugging Face Hub.

With them, `plan` and docs/memory.md need no download for these checkpoints.
"""

from typing import Any

from t5tune.families import FAMILIES

# (d_model, d_kv, d_ff, layers, heads)
_T5 = {
    "small": (512, 64, 2048, 6, 8),
    "base": (768, 64, 3072, 12, 12),
    "large": (1024, 64, 4096, 24, 16),
    "3b": (1024, 128, 16384, 24, 32),
    "11b": (1024, 128, 65536, 24, 128),
}
_V11 = {
    "small": (512, 64, 1024, 8, 6),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16),
    "xl": (2048, 64, 5120, 24, 32),
    "xxl": (4096, 64, 10240, 24, 64),
}
# (d_model, d_kv, d_ff, encoder layers, decoder layers, heads): ByT5's encoders are three times as deep as its decoders
_BYT5 = {
    "small": (1472, 64, 3584, 12, 4, 6),
    "base": (1536, 64, 3968, 18, 6, 12),
    "large": (1536, 64, 3840, 36, 12, 16),
    "xl": (2560, 64, 6720, 36, 12, 32),
    "xxl": (4672, 64, 12352, 36, 12, 64),
}


def _make_config(key: str, shape: tuple[int, ...]) -> dict[str, Any]:
    width, head_width, inner, *layers, heads = shape
    family = FAMILIES[key]
    return {
        "model_type": family.model_type,
        "vocab_size": family.num_rows,
        "d_model": width,
        "d_kv": head_width,
        "d_ff": inner,
        "num_layers": layers[0],
        "num_decoder_layers": layers[-1],
        "num_heads": heads,
        "feed_forward_proj": family.feed_forward,
        "tie_word_embeddings": family.tied,
        "dropout_rate": 0.1,
    }


KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    **{f"google-t5/t5-{size}": _make_config("t5", shape) for size, shape in _T5.items()},
    **{f"google/t5-v1_1-{size}": _make_config("flan-t5", shape) for size, shape in _V11.items()},
    **{f"google/flan-t5-{size}": _make_config("flan-t5", shape) for size, shape in _V11.items()},
    "google/flan-ul2": _make_config("flan-ul2", (4096, 256, 16384, 32, 16)),
    "lmsys/fastchat-t5-3b-v1.0": _make_config("fastchat-t5", (2048, 64, 5120, 24, 32)),
    **{f"google/mt5-{size}": _make_config("mt5", shape) for size, shape in _V11.items()},
    **{f"google/umt5-{size}": _make_config("umt5", _V11[size]) for size in ("small", "base", "xl", "xxl")},
    **{f"google/byt5-{size}": _make_config("byt5", shape) for size, shape in _BYT5.items()},
}
