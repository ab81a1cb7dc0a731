"""Configs of common checkpoints, from config.json on the Hugging Face Hub, for `plan` and docs/memory.md.

Checkpoints of an encoder alone, which can only predict labels, are in KNOWN_ENCODERS.
"""

from typing import Any

from t5tune.families import FAMILIES
from t5tune.families.longt5 import TRANSIENT_GLOBAL

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
_MADLAD = {
    "3b": (1024, 128, 8192, 32, 16),
    "7b": (2048, 128, 8192, 48, 16),
    "10b": (2048, 128, 16384, 32, 32),
}
# (hidden_size, layers, heads, heads of keys and values, head_dim, intermediate_size)
_GEMMA_2 = {"2b": (2304, 26, 8, 4, 256, 9216), "9b": (3584, 42, 16, 8, 256, 14336)}
_T5_SIZES_OF_GEMMA_2 = {"s": (512, 8, 8, 8, 64, 1024), "b": (768, 12, 12, 12, 64, 2048)}
_GEMMA_3 = {
    "270m": (640, 18, 4, 1, 256, 2048),
    "1b": (1152, 26, 4, 1, 256, 6912),
    "4b": (2560, 34, 8, 4, 256, 10240),
}
_T5GEMMA_SIZES = ("2b-2b", "9b-2b", "9b-9b", "s-s", "b-b")
T5GEMMA_VARIANTS = ("prefixlm", "ul2", "prefixlm-it", "ul2-it")


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
        **{key: values[0] for key, values in family.identified_by.items()},
    }


def _make_gemma_stack(key: str, shape: tuple[int, ...], window: int) -> dict[str, Any]:
    width, layers, heads, key_heads, head_width, inner = shape
    return {
        "vocab_size": FAMILIES[key].num_rows,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_width,
        "intermediate_size": inner,
        "sliding_window": window,
    }


def _make_t5gemma_config(size: str) -> dict[str, Any]:
    shapes = {**_GEMMA_2, **_T5_SIZES_OF_GEMMA_2}
    encoder, decoder = (_make_gemma_stack("t5gemma", shapes[part], 4096) for part in size.split("-"))
    return {"model_type": "t5gemma", "is_encoder_decoder": True, "encoder": encoder, "decoder": decoder}


def _make_t5gemma2_config(size: str) -> dict[str, Any]:
    stack = _make_gemma_stack("t5gemma2", _GEMMA_3[size], 1024 if size == "4b" else 512)
    encoder = {"text_config": stack}  # the vision tower isn't loaded
    return {"model_type": "t5gemma2", "is_encoder_decoder": True, "encoder": encoder, "decoder": stack}


KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    **{f"google-t5/t5-{size}": _make_config("t5", shape) for size, shape in _T5.items()},
    **{f"google/t5-v1_1-{size}": _make_config("flan-t5", shape) for size, shape in _V11.items()},
    **{f"google/flan-t5-{size}": _make_config("flan-t5", shape) for size, shape in _V11.items()},
    "google/flan-ul2": _make_config("flan-ul2", (4096, 256, 16384, 32, 16)),
    **{f"google/madlad400-{size}-mt": _make_config("madlad400", shape) for size, shape in _MADLAD.items()},
    "CohereForAI/aya-101": _make_config("mt5", _V11["xxl"]),
    **{f"Salesforce/codet5-{size}": _make_config("codet5", _T5[size]) for size in ("small", "base", "large")},
    **{
        f"google/long-t5-{name}-{size}": _make_config("longt5", _V11[size])
        | {"scale_decoder_outputs": False, "encoder_attention_type": attention}
        for name, attention, sizes in (
            ("local", "local", ("base", "large")),
            ("tglobal", TRANSIENT_GLOBAL, ("base", "large", "xl")),
        )
        for size in sizes
    },
    "lmsys/fastchat-t5-3b-v1.0": _make_config("fastchat-t5", (2048, 64, 5120, 24, 32)),
    **{f"google/mt5-{size}": _make_config("mt5", shape) for size, shape in _V11.items()},
    **{f"google/umt5-{size}": _make_config("umt5", _V11[size]) for size in ("small", "base", "xl", "xxl")},
    **{f"google/byt5-{size}": _make_config("byt5", shape) for size, shape in _BYT5.items()},
    **{
        f"google/t5gemma-{size}-{variant}": _make_t5gemma_config(size)
        for size in _T5GEMMA_SIZES
        for variant in T5GEMMA_VARIANTS
    },
    **{f"google/t5gemma-2-{size}-{size}": _make_t5gemma2_config(size) for size in _GEMMA_3},
}

KNOWN_ENCODERS: dict[str, dict[str, Any]] = {
    "Rostlab/prot_t5_xl_half_uniref50-enc": _make_config("t5", _T5["3b"]) | {"vocab_size": 128},
}
