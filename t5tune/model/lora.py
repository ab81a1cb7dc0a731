"""Attach LoRA adapters, and train the rows of added tokens, in PEFT's own format.

The rows of an untied head are indexed in the opposite order of the embedding's. Stock PEFT believes
transformers 5 that every T5 is tied, and drops the rows of an embedding and a head that list the same
indices; lists that differ it keeps apart, so the saved adapter loads right with no line of the user's.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn
from torch.nn import functional

from t5tune.errors import ModelError, SettingsError
from t5tune.settings.lora import LoraSettings

EMBEDDINGS = ("encoder.embed_tokens", "decoder.embed_tokens")
HEAD = "lm_head"


def add_lora(model: Any, settings: LoraSettings, token_ids: list[int], adapter_dtype: torch.dtype) -> Any:
    """Wrap a frozen base; LoRA matrices and token rows are its only parameters that train.

    Args:
        token_ids: rows of the embedding and of the head to train.
        adapter_dtype: of the trained tensors.

    Raises:
        SettingsError: a name among lora_target_modules that no linear layer has.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear.discard(HEAD)
    if unknown := sorted(set(settings.lora_target_modules) - linear):
        raise SettingsError(
            f"lora_target_modules: {', '.join(unknown)}: no such linear layer in this model",
            hint=f"it has {', '.join(sorted(linear))}",
        )
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_target_modules),
        bias=settings.lora_bias,
        task_type=TaskType.SEQ_2_SEQ_LM,
        trainable_token_indices=_token_indices(model, token_ids) if settings.train_token_rows else None,
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    use_token_rows(peft_model)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    return peft_model


def load_adapter(model: Any, folder: Path) -> Any:
    """Put the adapter of a folder on a base, for inference.

    Raises:
        ModelError: it doesn't fit this base.
    """
    try:
        return PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False).eval()
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ModelError(f"{folder}: doesn't fit this base: {' '.join(str(error).split())[:300]}") from error


def _token_indices(model: Any, token_ids: list[int]) -> Any:
    if not token_ids:
        return None
    if model.config.tie_word_embeddings:
        return list(token_ids)
    return {name: list(token_ids) for name in EMBEDDINGS} | {HEAD: list(reversed(token_ids))}


def use_token_rows(peft_model: Any) -> None:
    """Compute token rows as `TokenRows` does, and let encoder and decoder share those of the embedding."""
    base = peft_model.base_model.model
    for module in base.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows
    encoder, decoder = base.encoder.embed_tokens, base.decoder.embed_tokens
    if not base.config.tie_word_embeddings and hasattr(encoder, "token_adapter"):
        decoder.token_adapter.trainable_tokens_delta = encoder.token_adapter.trainable_tokens_delta


class TokenRows(TrainableTokensLayer):  # type: ignore[misc]
    """Trained rows of an embedding or of the head, in place of PEFT's own way to compute them.

    PEFT copies the whole matrix in each forward, and reads it outside of the base layer. The copy costs
    vocabulary × width a forward; under ZeRO-3 the matrix isn't there to read. Here the base layer runs as it
    is, and only the trained rows' places in its output are replaced. K is the number of rows.
    """

    def forward_adapters(self, x: Any, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for name in active_adapters:
            rows_KD = self.trainable_tokens_delta[name]
            ids_K = torch.as_tensor(self.token_indices[name], device=x.device)
            if isinstance(self.base_layer, nn.Embedding):
                is_row_BTK = x.unsqueeze(-1) == ids_K
                replaced_BTD = functional.embedding(is_row_BTK.to(torch.uint8).argmax(-1), rows_KD)
                output = torch.where(is_row_BTK.any(-1, keepdim=True), replaced_BTD.to(output.dtype), output)
            else:
                logits_BTK = functional.linear(x.to(rows_KD.dtype), rows_KD).to(output.dtype)
                output = output.index_copy(-1, ids_K, logits_BTK)
        return output
