"""Small random T5 checkpoints."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.paths import REPOSITORY

if TYPE_CHECKING:
    import torch


def make_base(folder: Path, tied: bool, dtype: "torch.dtype | None" = None, **changes: Any) -> Path:
    """Make a small random T5 with pocket's tokenizer: like Flan-T5, or if `tied` like the original T5.

    It is saved by stock transformers. Its config.json states correctly whether the head is tied, as files on the
    Hugging Face Hub do.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(7)
    shape = {"vocab_size": 1536, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(
        **shape | changes,
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        dropout_rate=0.1,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.2)
            model.config.tie_word_embeddings = False
        for name, parameter in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype or torch.float32).save_pretrained(folder)
    copy_pocket_tokenizer(folder)
    return folder


def copy_pocket_tokenizer(folder: Path) -> None:
    for file in (REPOSITORY / "t5tune" / "pocket").glob("tokenizer*"):
        shutil.copy(file, folder)
