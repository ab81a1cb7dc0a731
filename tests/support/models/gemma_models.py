"""Small random T5Gemma and T5Gemma 2 checkpoints, saved by stock transformers, with odd sizes."""

from pathlib import Path
from typing import Any

import torch

VOCABULARY, EOI = 520, 501
# rows of the tests' sources and targets; all windows are shorter than the longest of them
WINDOW = 7
ALTERNATING = ("sliding_attention", "full_attention", "sliding_attention", "sliding_attention")
_STACK = {
    "vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": WINDOW,
    "query_pre_attn_scalar": 24, "max_position_embeddings": 4096, "layer_types": list(ALTERNATING[:3]),
}  # fmt: skip
_NARROW = {
    **_STACK, "hidden_size": 42, "intermediate_size": 50, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 3, "head_dim": 10, "sliding_window": WINDOW - 3, "layer_types": list(ALTERNATING),
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}  # low enough to change what is computed
LINEAR_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
KINDS = ("t5gemma2", "t5gemma2-capped", "t5gemma", "t5gemma-9b-2b")


def make_gemma_config(kind: str, **changes: Any) -> Any:
    """Make the config of a kind. `changes` are those of encoder and decoder."""
    from transformers import T5Gemma2Config, T5GemmaConfig

    if kind.startswith("t5gemma2"):
        caps = CAPS if kind == "t5gemma2-capped" else {}
        # 4B-4B scales the positions of full attention
        text = {**_STACK, **caps, **changes, "rope_parameters": LINEAR_ROPE}
        encoder = {"text_config": text, "vision_config": _VISION, "mm_tokens_per_image": 4, "eoi_token_index": EOI}
        # fewer layers than the encoder
        decoder = {**text, "num_hidden_layers": 2, "layer_types": list(ALTERNATING[:2])}
        return T5Gemma2Config(encoder=encoder, decoder=decoder, image_token_index=500)
    decoder = {**(_STACK if kind == "t5gemma" else _NARROW), **CAPS, **changes}
    return T5GemmaConfig(encoder={**_STACK, **CAPS, **changes}, decoder=decoder)


def make_gemma(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, shard_size: str | None = None, **changes: Any
) -> Path:
    """Save a random model of this kind, without a tokenizer."""
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(7)
    model = AutoModelForSeq2SeqLM.from_config(make_gemma_config(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or not parameter.any():
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 2:
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder, **({} if shard_size is None else {"max_shard_size": shard_size}))
    return folder
