"""A patch of PEFT, undone at the end of its block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def gather_in_peft() -> Iterator[None]:
    """Make PEFT gather the parameters that it reads in this block, which ZeRO-3 partitioned.

    PEFT 0.21 gathers a base weight before it computes DoRA's norms, or PiSSA's or OLoRA's initialization from it, if
    transformers knows of a DeepSpeed config with ZeRO-3. The Trainer's arguments would set it, but they are made later.
    PEFT's code that gathers added-token embeddings works "right now only" on GPUs; here it is replaced.
    https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/trainable_tokens/layer.py#L79
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    def collect_rows(_layer: Any, weight: torch.Tensor, rows: Any, _width: int) -> torch.Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=None):
            return weight.detach()[rows].clone()

    original = TrainableTokensLayer._collect_token_weights
    TrainableTokensLayer._collect_token_weights = collect_rows
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # transformers refers to it weakly
    try:
        yield
    finally:
        TrainableTokensLayer._collect_token_weights = original
        unset_hf_deepspeed_config()
        del config
