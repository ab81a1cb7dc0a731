"""Models that predict labels: an encoder, and the logits of each text or each token in fp32.

    model = make_label_class(T5ForTokenClassification)(config)    # with the attribute `architecture`
    model(input_ids=row_1S, packing=segments)             # (N, K) for N texts, or (1, S, K) with a label for each token
    model(input_ids=ids_BS, attention_mask=mask_BS)       # (B, K) or (B, S, K)

The logits of a text are the mean over its tokens, </s> included, as sentence-transformers' mean pooling.

B texts of a padded batch, N of a packed row, S source tokens, D width, K classes.
"""

from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from t5tune.model.attention.segments import Segments


class LabelScale(NamedTuple):
    """How numbers are standardized in training: (number - mean) / scale. The scale is a power of two."""

    scale: float = 1.0
    mean: float = 0.0


NOT_SCALED = LabelScale()


class LabelHead(nn.Linear):
    """A linear layer that computes in fp32 whatever its input's dtype is, and under autocast; in fp64 if its weight is.

    Rounded logits would be ties, or numbers with three digits.
    """

    def forward(self, hidden_D: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.float32, self.weight.dtype)
        with torch.autocast(hidden_D.device.type, enabled=False):
            return functional.linear(hidden_D.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


@cache
def make_label_class(model_class: Any) -> Any:
    """Extend a …ForTokenClassification class of transformers: it takes packed rows, and returns the task's logits."""

    class ModelWithLabels(model_class):  # type: ignore[misc]
        @wraps(model_class.forward)  # PEFT reads the names of its arguments
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            packing: Segments | None = None,
            **_unused: Any,  # PEFT's arguments for the stock class: labels, output_attentions, …
        ) -> Tensor:
            architecture, mask = self.architecture, attention_mask
            if mask is not None and architecture.accepts_4d_masks:
                # transformers would check a mask of two dimensions for padding, and wait for the GPU
                mask = mask[:, None, None, :].bool()
            logits = super().forward(**architecture.make_encoder_inputs(input_ids, mask, packing)).logits
            return logits if architecture.task.per_token else _average(logits, attention_mask, packing)

    ModelWithLabels.__name__ = ModelWithLabels.__qualname__ = model_class.__name__
    return ModelWithLabels


def _average(logits_BSK: Tensor, mask_BS: Tensor | None, packing: Segments | None) -> Tensor:
    """Average over the tokens of each text."""
    if packing is not None:
        # not index_add, which on a GPU adds in any order
        texts = torch.split(logits_BSK[0, : sum(packing.sources)], list(packing.sources))
        return torch.stack([text_SK.mean(0) for text_SK in texts])
    if mask_BS is None:
        return logits_BSK.mean(1)
    is_text_BS1 = mask_BS.bool().unsqueeze(-1)
    return torch.where(is_text_BS1, logits_BSK, 0).sum(1) / is_text_BS1.sum(1)
