"""Trained embedding rows of added tokens, computed without PEFT's copy of the whole matrix."""

from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import nn
from torch.nn import functional


def replace_trainable_token_layers(peft_model: Any) -> None:
    """Replace PEFT's layers for trained token rows with `TokenRows`."""
    for module in peft_model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows


class TokenRows(TrainableTokensLayer):  # type: ignore[misc]
    """Trained rows of an embedding or head, computed without PEFT's copy of the whole matrix.

    In each forward, PEFT copies the whole matrix (vocabulary × width values), outside of the base layer's forward.
    Under ZeRO-3 this fails, because the matrix is gathered only within the base layer's forward. Here the base layer
    runs unchanged, and only the trained rows' values in its output are replaced. K is the number of rows.
    """

    def forward_adapters(self, x: Any, active_adapters: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        for name in active_adapters:
            rows_KD, ids_K = self.get_rows(name, x.device)
            if isinstance(self.base_layer, nn.Embedding):
                is_row_BTK = x.unsqueeze(-1) == ids_K
                replaced_BTD = functional.embedding(is_row_BTK.to(torch.uint8).argmax(-1), rows_KD)
                output = torch.where(is_row_BTK.any(-1, keepdim=True), replaced_BTD.to(output.dtype), output)
            else:
                logits_BTK = functional.linear(x.to(rows_KD.dtype), rows_KD).to(output.dtype)
                output = output.index_copy(-1, ids_K, logits_BTK)
        return output

    def get_rows(self, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the trained rows, their token ids)."""
        if self._ids is None or self._ids.device != device:  # cached, because a copy to a GPU synchronizes
            self._ids = torch.tensor(self.token_indices[name], device=device)
        return self.trainable_tokens_delta[name], self._ids

    _ids: torch.Tensor | None = None
