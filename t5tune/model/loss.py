"""Cross-entropy over the target tokens of a whole step, without the whole logits.

    loss = HeadLoss(model, label_smoothing=0.0)
    with loss.of(labels_BT):
        total = model(**inputs).logits        # the sum over the labels, in place of the logits
    with loss.of_each(labels_BT), torch.no_grad():
        losses_N = model(**inputs).logits     # that of each label, for evaluation

Trainer's own way is wrong for T5: it takes the mean of each micro-batch in the model's dtype, and multiplies loss and
gradient by accumulation steps and ranks. Here it is the sum in fp32, which the trainer divides by the number of target
tokens of the global step.

The logits of 32,000 words are the largest tensor of a step by far. They are computed here for some tokens at a time,
and so is the gradient of the hidden states, in the forward: for a sum it needs no more than what is there then. So
nothing of the vocabulary's size is kept. N tokens, V vocabulary, D width, K trained rows of the head.
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
LOGITS_AT_ONCE = 2**23  # 32 MiB in fp32: 261 tokens of T5's vocabulary


class HeadLoss:
    """Makes a model's head give the loss instead of logits while it knows the labels.

    It is the head that computes it because under ZeRO-3 its weight is there inside of its forward alone.
    """

    def __init__(self, model: Any, label_smoothing: float) -> None:
        head = model.get_output_embeddings()
        self.vocabulary = int(model.config.vocab_size)
        self.label_smoothing = label_smoothing
        self.labels_N: torch.Tensor | None = None
        self.sums = True
        self.token_rows = next((part for part in head.modules() if isinstance(part, TokenRows)), None)
        if isinstance(head, LoraLayer):  # of an adapter that was made elsewhere: it adds to what its linear layer gives
            head.forward = partial(self._adapted_forward, head.forward)
            return
        linear = next(part for part in head.modules() if isinstance(part, nn.Linear))
        linear.forward = partial(self._forward, linear, linear.forward)  # type: ignore[method-assign]

    @contextmanager
    def of(self, labels: torch.Tensor) -> Iterator[None]:
        """While it lasts, the model's `logits` are the summed cross-entropy of these labels."""
        with self._with_labels(labels, sums=True):
            yield

    @contextmanager
    def of_each(self, labels: torch.Tensor) -> Iterator[None]:
        """While it lasts, the model's `logits` are each of these labels' cross-entropy, flattened, not smoothed."""
        with self._with_labels(labels, sums=False):
            yield

    @contextmanager
    def _with_labels(self, labels: torch.Tensor, sums: bool) -> Iterator[None]:
        self.labels_N, self.sums = labels.flatten(), sums
        try:
            yield
        finally:
            self.labels_N = None

    def _forward(self, linear: nn.Linear, stock: Any, hidden: torch.Tensor) -> Any:
        if self.labels_N is None:
            return stock(hidden)
        rows_KD = ids_K = None
        if self.token_rows is not None:
            (name,) = self.token_rows.trainable_tokens_delta
            rows_KD, ids_K = self.token_rows.rows(name, hidden.device)
        hidden_ND = hidden.flatten(0, -2)
        if not self.sums:
            return cross_entropies(hidden_ND, linear.weight, self.labels_N, rows_KD, ids_K)
        return summed_cross_entropy(hidden_ND, linear.weight, self.labels_N, self.label_smoothing, rows_KD, ids_K)

    def _adapted_forward(self, stock: Any, hidden: torch.Tensor) -> Any:
        if self.labels_N is None:
            return stock(hidden)
        assert not self.sums, "the head isn't among what t5tune adapts"
        hidden_ND = hidden.flatten(0, -2)
        losses_N = [
            functional.cross_entropy(
                stock(hidden_ND[part]).float(), self.labels_N[part], ignore_index=IGNORED_LABEL, reduction="none"
            )
            for part in _chunks(len(hidden_ND), self.vocabulary)
        ]
        return torch.cat(losses_N)


def summed_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    label_smoothing: float = 0.0,
    rows_KD: torch.Tensor | None = None,
    ids_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of the cross-entropies of `hidden · weightᵀ` and the labels that aren't IGNORED_LABEL, in fp32.

    Args:
        label_smoothing: share of the target's probability that goes to all words alike (Szegedy et al. 2016).
        rows_KD, ids_K: rows that stand in for those of `weight` at `ids`; they train, whether or not `weight` does.
    """
    total: torch.Tensor = _SummedCrossEntropy.apply(hidden_ND, weight_VD, labels_N, label_smoothing, rows_KD, ids_K)  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def cross_entropies(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    rows_KD: torch.Tensor | None = None,
    ids_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cross-entropy of each label, in fp32, 0 where it is IGNORED_LABEL; without a gradient.

    Args:
        rows_KD, ids_K: rows that stand in for those of `weight` at `ids`.
    """
    dtype, exact = _dtypes(hidden_ND, weight_VD)
    losses_N = torch.zeros(len(hidden_ND), dtype=exact, device=hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        weight_VD = weight_VD.to(dtype)
        rows_KD = None if rows_KD is None else rows_KD.to(exact)
        for part in _chunks(len(hidden_ND), len(weight_VD)):
            logits_CV = _logits(hidden_ND[part].to(dtype), weight_VD, rows_KD, ids_K, exact)
            losses_N[part] = functional.cross_entropy(
                logits_CV, labels_N[part], ignore_index=IGNORED_LABEL, reduction="none"
            )
    return losses_N


def _dtypes(hidden_ND: torch.Tensor, weight_VD: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(that of the head's product, that of the loss: fp32, or fp64 where a test computes in it)"""
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    return dtype, torch.promote_types(torch.float32, weight_VD.dtype)


def _chunks(num_tokens: int, num_words: int) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // num_words)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _logits(
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
        dtype, exact = _dtypes(hidden_ND, weight_VD)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        wants_rows = ctx.needs_input_grad[4]
        total = torch.zeros((), dtype=exact, device=hidden_ND.device)
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=exact) if wants_weight else None
        rows_grad_KD = torch.zeros_like(rows_KD, dtype=exact) if rows_KD is not None and wants_rows else None
        num_words = weight_VD.shape[0]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight_VD = weight_VD.to(dtype)
            rows_KD = None if rows_KD is None else rows_KD.to(exact)
            for part in _chunks(len(hidden_ND), num_words):
                hidden_CD = hidden_ND[part].to(dtype)
                logits_CV = _logits(hidden_CD, weight_VD, rows_KD, ids_K, exact)
                is_target_C = labels_N[part] != IGNORED_LABEL
                labels_C1 = labels_N[part, None].clamp_min(0)
                target_C1 = logits_CV.gather(1, labels_C1)
                smooth_C = smoothing * logits_CV.mean(1) if smoothing else 0.0
                largest_C1 = logits_CV.amax(1, keepdim=True)
                # from here on the logits' memory holds the probabilities, and then their gradient
                grad_CV = logits_CV.sub_(largest_C1).exp_()
                sum_C1 = grad_CV.sum(1, keepdim=True)
                normaliser_C1 = largest_C1 + sum_C1.log()
                losses_C = (normaliser_C1 - (1 - smoothing) * target_C1).squeeze(1) - smooth_C
                total += torch.where(is_target_C, losses_C, 0.0).sum()
                if not (wants_hidden or wants_weight or wants_rows):
                    continue
                is_target_C1 = is_target_C[:, None].to(exact)
                grad_CV.mul_(is_target_C1 / sum_C1)
                if smoothing:
                    grad_CV -= smoothing / num_words * is_target_C1
                grad_CV.scatter_add_(1, labels_C1, (smoothing - 1) * is_target_C1)
                grad_CK = None
                if rows_KD is not None:
                    grad_CK = grad_CV[:, ids_K]
                    grad_CV[:, ids_K] = 0
                    if rows_grad_KD is not None:
                        rows_grad_KD.addmm_(grad_CK.T, hidden_CD.to(exact))
                if weight_grad_VD is not None:
                    weight_grad_VD.addmm_(grad_CV.T, hidden_CD.to(exact))
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
