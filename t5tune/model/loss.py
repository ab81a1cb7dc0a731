"""Cross-entropy over the target tokens of a whole step, without storing all logits.

    loss = HeadLoss(model, label_smoothing=0.0)
    with loss.replace_logits_with_sum(labels_BT):
        total = model(**inputs).logits        # the sum over all labels, instead of the logits
    with loss.replace_logits_with_losses(labels_BT), torch.no_grad():
        losses_N = model(**inputs).logits     # the loss of each label, for evaluation

The loss that transformers' Trainer computes is wrong for T5: it averages each micro-batch in the model's dtype, and
multiplies loss and gradient by the number of accumulation steps times the number of ranks. Here the loss is a sum in
fp32, which the trainer divides by the number of target tokens in the global step.

The logits over 32,000 tokens are by far the largest tensor of a step. Here they are computed for one chunk of target
tokens at a time. The gradient of the hidden states is computed in the forward pass as well: the incoming gradient of a
sum is a scalar, which can be multiplied later. So no tensor of the logits' size is kept.

Shapes: B examples of a micro-batch, T tokens of the longest target, N = B·T tokens, C tokens of a chunk, V vocabulary,
D width, K trained rows of the head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from t5tune.model.lora import TokenRows

IGNORED_LABEL = -100
LOGITS_PER_CHUNK = 2**23  # 32 MiB in fp32: 261 target tokens with T5's vocabulary


class HeadLoss:
    """Make a model's head return the loss instead of the logits, while labels are set.

    The head computes the loss itself, because under ZeRO-3 its weight is gathered only within its own forward.
    """

    def __init__(self, model: Any, label_smoothing: float) -> None:
        head = model.get_output_embeddings()
        self.vocabulary = int(model.config.vocab_size)
        self.label_smoothing = label_smoothing
        self.labels_N: torch.Tensor | None = None
        self.is_summed = True
        self.token_rows = next((part for part in head.modules() if isinstance(part, TokenRows)), None)
        # adapters made by other tools may adapt the head, whose output then isn't that of a single linear layer
        if isinstance(head, LoraLayer):
            head.forward = partial(self._adapted_forward, head.forward)
            return
        linear = next(part for part in head.modules() if isinstance(part, nn.Linear))
        linear.forward = partial(self._forward, linear, linear.forward)  # type: ignore[method-assign]

    @contextmanager
    def replace_logits_with_sum(self, labels: torch.Tensor) -> Iterator[None]:
        """Within this context, the model's `logits` are the summed cross-entropy of these labels."""
        with self._set_labels(labels, is_summed=True):
            yield

    @contextmanager
    def replace_logits_with_losses(self, labels: torch.Tensor) -> Iterator[None]:
        """Within this context, the model's `logits` are the cross-entropies of the labels, flattened, not smoothed."""
        with self._set_labels(labels, is_summed=False):
            yield

    @contextmanager
    def _set_labels(self, labels: torch.Tensor, is_summed: bool) -> Iterator[None]:
        self.labels_N, self.is_summed = labels.flatten(), is_summed
        try:
            yield
        finally:
            self.labels_N = None

    def _forward(self, linear: nn.Linear, original_forward: Any, hidden: torch.Tensor) -> Any:
        if self.labels_N is None:
            return original_forward(hidden)
        rows_KD = ids_K = None
        if self.token_rows is not None:
            (name,) = self.token_rows.trainable_tokens_delta
            rows_KD, ids_K = self.token_rows.get_rows(name, hidden.device)
        hidden_ND = hidden.flatten(0, -2)
        if not self.is_summed:
            return compute_cross_entropies(hidden_ND, linear.weight, self.labels_N, rows_KD, ids_K)
        return compute_summed_cross_entropy(
            hidden_ND, linear.weight, self.labels_N, self.label_smoothing, rows_KD, ids_K
        )

    def _adapted_forward(self, original_forward: Any, hidden: torch.Tensor) -> Any:
        if self.labels_N is None:
            return original_forward(hidden)
        assert not self.is_summed, "t5tune doesn't adapt the head, so it never trains with such an adapter"
        hidden_ND = hidden.flatten(0, -2)
        losses_N = [
            functional.cross_entropy(
                original_forward(hidden_ND[part]).float(),
                self.labels_N[part],
                ignore_index=IGNORED_LABEL,
                reduction="none",
            )
            for part in _slice_into_chunks(len(hidden_ND), self.vocabulary)
        ]
        return torch.cat(losses_N)


def compute_summed_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    label_smoothing: float = 0.0,
    rows_KD: torch.Tensor | None = None,
    ids_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the cross-entropies of `hidden · weightᵀ` over the labels that aren't IGNORED_LABEL, in fp32.

    Args:
        label_smoothing: probability mass spread uniformly over the vocabulary (Szegedy et al. 2016).
        rows_KD, ids_K: trainable rows that replace those of `weight` at `ids`, whether or not `weight` is trained.
    """
    total: torch.Tensor = _SummedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, label_smoothing, rows_KD, ids_K)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def compute_cross_entropies(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    rows_KD: torch.Tensor | None = None,
    ids_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the cross-entropy of each label in fp32, without gradients; 0 for IGNORED_LABEL.

    Args:
        rows_KD, ids_K: rows that replace those of `weight` at `ids`.
    """
    dtype, loss_dtype = _choose_dtypes(hidden_ND, weight_VD)
    losses_N = torch.zeros(len(hidden_ND), dtype=loss_dtype, device=hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        weight_VD = weight_VD.to(dtype)
        rows_KD = None if rows_KD is None else rows_KD.to(loss_dtype)
        for part in _slice_into_chunks(len(hidden_ND), len(weight_VD)):
            logits_CV = _compute_logits(hidden_ND[part].to(dtype), weight_VD, rows_KD, ids_K, loss_dtype)
            losses_N[part] = functional.cross_entropy(
                logits_CV, labels_N[part], ignore_index=IGNORED_LABEL, reduction="none"
            )
    return losses_N


def _choose_dtypes(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Choose (the dtype of the head's product, that of the loss): the latter is fp32, or fp64 if the weight is fp64."""
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    return dtype, torch.promote_types(torch.float32, weight_VD.dtype)


def _slice_into_chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // vocab_size)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _compute_logits(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    rows_KD: torch.Tensor | None,
    ids_K: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    logits_CV = (hidden_CD @ weight_VD.T).to(dtype)
    if rows_KD is not None:
        logits_CV[:, ids_K] = hidden_CD.to(dtype) @ rows_KD.T
    return logits_CV


def _compute_losses_in_place(
    logits_CV: torch.Tensor, labels_C1: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the cross-entropies. Return them, exp(logits - max) in the memory of the logits, and its sums."""
    target_C1 = logits_CV.gather(1, labels_C1)
    smooth_C = smoothing * logits_CV.mean(1) if smoothing else 0.0
    largest_C1 = logits_CV.amax(1, keepdim=True)
    exp_CV = logits_CV.sub_(largest_C1).exp_()
    sum_C1 = exp_CV.sum(1, keepdim=True)
    log_normalizer_C1 = largest_C1 + sum_C1.log()
    return (log_normalizer_C1 - (1 - smoothing) * target_C1).squeeze(1) - smooth_C, exp_CV, sum_C1


def _compute_gradient_in_place(
    exp_CV: torch.Tensor, sum_C1: torch.Tensor, labels_C1: torch.Tensor, is_target_C1: torch.Tensor, smoothing: float
) -> None:
    """Turn exp(logits - max) into the gradient of the summed cross-entropies with respect to the logits."""
    exp_CV.mul_(is_target_C1 / sum_C1)
    if smoothing:
        exp_CV -= smoothing / exp_CV.shape[1] * is_target_C1
    exp_CV.scatter_add_(1, labels_C1, (smoothing - 1) * is_target_C1)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        smoothing: float,
        rows_KD: torch.Tensor | None,
        ids_K: torch.Tensor | None,
    ) -> torch.Tensor:
        dtype, loss_dtype = _choose_dtypes(hidden_ND, weight_VD)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        wants_rows = ctx.needs_input_grad[4]
        total = torch.zeros((), dtype=loss_dtype, device=hidden_ND.device)
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=loss_dtype) if wants_weight else None
        rows_grad_KD = torch.zeros_like(rows_KD, dtype=loss_dtype) if rows_KD is not None and wants_rows else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight_VD = weight_VD.to(dtype)
            rows_KD = None if rows_KD is None else rows_KD.to(loss_dtype)
            for part in _slice_into_chunks(len(hidden_ND), len(weight_VD)):
                hidden_CD = hidden_ND[part].to(dtype)
                logits_CV = _compute_logits(hidden_CD, weight_VD, rows_KD, ids_K, loss_dtype)
                is_target_C = labels_N[part] != IGNORED_LABEL
                labels_C1 = labels_N[part, None].clamp_min(0)
                # in place from here on: the logits become exp(logits - max), and then their gradient
                losses_C, grad_CV, sum_C1 = _compute_losses_in_place(logits_CV, labels_C1, smoothing)
                total += torch.where(is_target_C, losses_C, 0.0).sum()
                if not (wants_hidden or wants_weight or wants_rows):
                    continue
                is_target_C1 = is_target_C[:, None].to(loss_dtype)
                _compute_gradient_in_place(grad_CV, sum_C1, labels_C1, is_target_C1, smoothing)
                grad_CK = None
                if rows_KD is not None:
                    grad_CK = grad_CV[:, ids_K]
                    grad_CV[:, ids_K] = 0  # the rows of `weight` that are replaced don't affect the loss
                    if rows_grad_KD is not None:
                        rows_grad_KD.addmm_(grad_CK.T, hidden_CD.to(loss_dtype))
                if weight_grad_VD is not None:
                    weight_grad_VD.addmm_(grad_CV.T, hidden_CD.to(loss_dtype))
                if hidden_grad_ND is not None:
                    hidden_grad_CD = grad_CV.to(dtype) @ weight_VD
                    if grad_CK is not None and rows_KD is not None:
                        hidden_grad_CD = hidden_grad_CD + grad_CK @ rows_KD
                    hidden_grad_ND[part] = hidden_grad_CD
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD, rows_grad_KD)
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Any) -> Any:
        (scale,) = scales
        hidden, weight, rows = (None if grad is None else grad * scale for grad in ctx.saved_tensors)
        return hidden, weight, None, None, rows, None
