"""Cross-entropy over the target tokens of a whole step, without storing all logits.

    model = make_loss_class(T5ForConditionalGeneration)(config)
    total = model(**inputs, labels=labels_BT, reduction="sum")     # a scalar: the sum over all labels
    losses_BT = model(**inputs, labels=labels_BT, reduction="none")    # the loss of each label

The loss that transformers' Trainer computes is wrong for T5: it averages each micro-batch in the model's dtype, and
multiplies loss and gradient by the number of accumulation steps times the number of ranks. Here the loss is a sum in
fp32, which the trainer divides by the number of target tokens in the global step.

The logits over 32,000 tokens are by far the largest tensor of a step. Here they are computed for one chunk of target
tokens at a time. The gradient of the hidden states is computed in the forward pass as well: the incoming gradient of a
sum is a scalar, which can be multiplied later. So no tensor of the logits' size is kept.

Some architectures cap the logits softly: cap · tanh(logits / cap).

Shapes: B examples of a micro-batch, T tokens of the longest target, N = B·T tokens, C tokens of a chunk, V vocabulary,
D width, K trained rows of the head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import Seq2SeqLMOutput

IGNORED_LABEL = -100
LOGITS_PER_CHUNK = 2**23  # 32 MiB in fp32: 261 target tokens with T5's vocabulary
# On a GPU, larger chunks keep matrix products efficient, and read the head's weight less often: 1,024 target tokens
# with T5's vocabulary, 256 with mT5's.
GPU_LOGITS_PER_CHUNK, GPU_MIN_CHUNK, GPU_TILE = 2**25, 256, 128

Reduction = Literal["sum", "none", "hidden"]
# (part of the target tokens, their logits, whether gradients are wanted) -> (their losses, the gradient of each loss
# with respect to its logits, which may use the memory of the logits)
Criterion = Callable[[slice, Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy; 0 where the label is IGNORED_LABEL.

    Args:
        smoothing: probability mass spread uniformly over the vocabulary (Szegedy et al. 2016).
        is_greedy: gets, chunk after chunk, whether each label has the highest logit; None: not wanted.
    """

    labels_N: Tensor
    smoothing: float = 0.0
    is_greedy: list[Tensor] | None = None

    def __call__(self, part: slice, logits_CV: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        if self.is_greedy is not None:
            self.is_greedy.append(logits_CV.argmax(1) == self.labels_N[part])
        is_target_C = self.labels_N[part] != IGNORED_LABEL
        labels_C1 = self.labels_N[part, None].clamp_min(0)
        # in place from here on: the logits become exp(logits - max), and then their gradient
        losses_C, grad_CV, sum_C1 = _compute_losses_in_place(logits_CV, labels_C1, self.smoothing)
        losses_C = torch.where(is_target_C, losses_C, 0.0)
        if not wants_gradient:
            return losses_C, None
        is_target_C1 = is_target_C[:, None].to(logits_CV.dtype)
        _compute_gradient_in_place(grad_CV, sum_C1, labels_C1, is_target_C1, self.smoothing)
        return losses_C, grad_CV


@cache
def make_loss_class(model_class: Any) -> Any:
    """Extend a T5 class of transformers: with `reduction`, its forward returns the loss of the labels, not the logits.

    `hidden` returns the head's input. A `criterion` replaces the cross-entropy. Without `reduction`, as in generation,
    transformers' forward runs; for a packed row it returns the logits.
    """

    class ModelWithLoss(model_class):  # type: ignore[misc]
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            self.target_loss = TargetLoss()

        @wraps(model_class.forward)  # transformers and PEFT read the names of its arguments
        def forward(
            self,
            *arguments: Any,
            reduction: Reduction | None = None,
            label_smoothing: float = 0.0,
            criterion: Criterion | None = None,
            **inputs: Any,
        ) -> Any:
            given = {name: value for name, value in inputs.items() if value is not None}
            if reduction is None and "packing" not in given:
                return super().forward(*arguments, **inputs)
            labels_BT, _ = given.pop("labels", None), given.pop("use_cache", False)
            hidden_BTD = self.architecture.compute_hidden_states(self, **given)
            head, logit_cap = self.get_output_embeddings(), self.architecture.logit_cap
            if reduction is None:
                logits_BTV = head(hidden_BTD)
                if logit_cap is not None:
                    logits_BTV = logit_cap * torch.tanh(logits_BTV / logit_cap)
                return Seq2SeqLMOutput(logits=logits_BTV)
            if reduction == "hidden":
                return hidden_BTD
            if criterion is None:
                criterion = CrossEntropy(labels_BT.flatten(), label_smoothing)
            return self.target_loss(hidden_BTD, labels_BT.shape, head, reduction, criterion, logit_cap)

    ModelWithLoss.__name__ = ModelWithLoss.__qualname__ = model_class.__name__
    return ModelWithLoss


class TargetLoss(nn.Module):
    """The loss of a batch's labels, from the decoder's hidden states and the head.

    It is a module so that ZeRO-3 gathers the head's weight for this call alone: the weight is registered as an external
    parameter of this module (model/zero3.py).
    """

    def forward(
        self,
        hidden_BTD: Tensor,
        shape: tuple[int, int],
        head: Any,
        reduction: Reduction,
        criterion: Criterion,
        logit_cap: float | None = None,
    ) -> Tensor:
        """Return the sum of the labels' losses (a scalar), or the loss of each label, of this shape (B, T)."""
        hidden_ND = hidden_BTD.flatten(0, -2)
        weights = read_head_weights(head, hidden_BTD.device)
        if weights is None:  # an adapter of a different tool, in an evaluation: t5tune itself doesn't adapt the head
            assert not torch.is_grad_enabled()
            losses = []
            for part in _slice_into_chunks(len(hidden_ND), head.out_features, hidden_ND.device):
                logits_CV = head(hidden_ND[part]).float()
                _cap_in_place(logits_CV, logit_cap)
                losses.append(criterion(part, logits_CV, False)[0])
            return torch.cat(losses).view(shape)
        if reduction == "sum":
            return compute_summed_loss(hidden_ND, criterion, weights, logit_cap)
        return compute_token_losses(hidden_ND, criterion, weights, logit_cap).view(shape)


class HeadWeights(NamedTuple):
    """The head's weight, and trainable rows that replace its rows `ids_K`, whether or not the weight is trained."""

    weight_VD: Tensor
    rows_KD: Tensor | None = None
    ids_K: Tensor | None = None

    def to(self, dtype: torch.dtype, rows_dtype: torch.dtype) -> "HeadWeights":
        rows_KD = None if self.rows_KD is None else self.rows_KD.to(rows_dtype)
        return HeadWeights(self.weight_VD.to(dtype), rows_KD, self.ids_K)

    def compute_logits(self, hidden_CD: Tensor, dtype: torch.dtype) -> Tensor:
        logits_CV = (hidden_CD @ self.weight_VD.T).to(dtype)
        if self.rows_KD is not None:
            logits_CV[:, self.ids_K] = hidden_CD.to(dtype) @ self.rows_KD.T
        return logits_CV


def read_head_weights(head: Any, device: torch.device | None = None) -> HeadWeights | None:
    """Return the weights by which the head computes its logits, whatever PEFT wrapped it in.

    Returns:
        None if it isn't a single linear layer: other tools' adapters may adapt the head with LoRA.
    """
    if isinstance(head, nn.Linear):
        return HeadWeights(head.weight)
    kind = type(head).__name__  # a model without adapters doesn't import PEFT
    if kind == "ModulesToSaveWrapper" and not head.disable_adapters:
        return read_head_weights(head.modules_to_save[head.active_adapters[0]])
    if kind in ("ModulesToSaveWrapper", "TrainableTokensWrapper") and head.disable_adapters:
        return read_head_weights(head.original_module)
    if kind == "TrainableTokensWrapper":
        (name,) = head.token_adapter.trainable_tokens_delta
        weight_VD = head.token_adapter.get_base_layer().weight
        return HeadWeights(weight_VD, *head.token_adapter.get_rows(name, device or weight_VD.device))
    return None


def compute_summed_loss(
    hidden_ND: Tensor, criterion: Criterion, head: HeadWeights, logit_cap: float | None = None
) -> Tensor:
    """Sum a criterion of the logits, `hidden · weightᵀ`, over all N target tokens, in fp32.

    Args:
        logit_cap: logits are cap · tanh(logits / cap) (Gemma Team 2024, "Gemma 2"); None: not capped.

    Returns:
        A scalar with gradients for the hidden states and those head weights that are trained.
    """
    total: Tensor = _ChunkedLoss.apply(True, hidden_ND, criterion, logit_cap, *head)  # type: ignore[no-untyped-call]
    return total


def compute_token_losses(
    hidden_ND: Tensor, criterion: Criterion, head: HeadWeights, logit_cap: float | None = None
) -> Tensor:
    """Compute a criterion for each of N target tokens, in fp32. See `compute_summed_loss`."""
    losses_N: Tensor = _ChunkedLoss.apply(False, hidden_ND, criterion, logit_cap, *head)  # type: ignore[no-untyped-call]
    return losses_N


def choose_dtypes(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Choose the dtypes of the head's product and of the loss: the second is fp32, or fp64 if the weight is fp64."""
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    return dtype, torch.promote_types(torch.float32, weight_VD.dtype)


def _slice_into_chunks(num_tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    size = choose_chunk_size(vocab_size, on_gpu=device.type == "cuda")
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def choose_chunk_size(vocab_size: int, on_gpu: bool) -> int:
    """Choose the number of target tokens whose logits are computed at a time."""
    if not on_gpu:
        return max(1, LOGITS_PER_CHUNK // vocab_size)
    return max(GPU_MIN_CHUNK, GPU_LOGITS_PER_CHUNK // vocab_size) // GPU_TILE * GPU_TILE


@contextmanager
def use_gpu_chunks(vocab_size: int) -> Iterator[None]:
    """Compute chunks of a GPU's size within this block."""
    global LOGITS_PER_CHUNK
    before, LOGITS_PER_CHUNK = LOGITS_PER_CHUNK, vocab_size * choose_chunk_size(vocab_size, on_gpu=True)
    try:
        yield
    finally:
        LOGITS_PER_CHUNK = before


def _cap_in_place(logits_CV: Tensor, cap: float | None, wants_slope: bool = False) -> Tensor | None:
    """Turn logits into cap · tanh(logits / cap), if there is a cap. Return the derivative 1 - tanh² if it is wanted."""
    if cap is None:
        return None
    logits_CV.div_(cap).tanh_()
    slope_CV = 1 - logits_CV.square() if wants_slope else None
    logits_CV.mul_(cap)
    return slope_CV


def _compute_losses_in_place(logits_CV: Tensor, labels_C1: Tensor, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the cross-entropies, exp(logits - max) in the memory of the logits, and its sums."""
    target_C1 = logits_CV.gather(1, labels_C1)
    smooth_C = smoothing * logits_CV.mean(1) if smoothing else 0.0
    largest_C1 = logits_CV.amax(1, keepdim=True)
    exp_CV = logits_CV.sub_(largest_C1).exp_()
    sum_C1 = exp_CV.sum(1, keepdim=True)
    log_normalizer_C1 = largest_C1 + sum_C1.log()
    return (log_normalizer_C1 - (1 - smoothing) * target_C1).squeeze(1) - smooth_C, exp_CV, sum_C1


def _compute_gradient_in_place(
    exp_CV: Tensor, sum_C1: Tensor, labels_C1: Tensor, is_target_C1: Tensor, smoothing: float
) -> None:
    """Turn exp(logits - max) into the gradient of the summed cross-entropies with respect to the logits."""
    exp_CV.mul_(is_target_C1 / sum_C1)
    if smoothing:
        exp_CV -= smoothing / exp_CV.shape[1] * is_target_C1
    # not scatter_add_, which on GPUs adds with atomics, or sorts if algorithms must be deterministic
    exp_CV.scatter_(1, labels_C1, exp_CV.gather(1, labels_C1) + (smoothing - 1) * is_target_C1)


class _Chunks:
    """Computes the logits of one chunk of target tokens after the other, and adds up the gradients.

    Args:
        wants: whether the gradients of hidden states, weight and rows are computed.
        dtypes: of the head's product, and of the loss.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        head: HeadWeights,
        wants: Sequence[bool],
        criterion: Criterion,
        logit_cap: float | None,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self._hidden_ND, self._criterion, self._logit_cap = hidden_ND, criterion, logit_cap
        self._dtype, self._loss_dtype = dtypes
        self._head = head.to(*dtypes)
        self._wants_gradient = any(wants)
        wants_hidden, wants_weight, wants_rows = wants
        weight, rows = head.weight_VD, head.rows_KD
        self.hidden_grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        self.weight_grad_VD = torch.zeros_like(weight, dtype=dtypes[1]) if wants_weight else None
        self.rows_grad_KD = torch.zeros_like(rows, dtype=dtypes[1]) if rows is not None and wants_rows else None

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield (part of the target tokens, their losses, the gradient of each loss by the logits) of each chunk."""
        num_tokens, (vocab_size, _) = len(self._hidden_ND), self._head.weight_VD.shape
        for part in _slice_into_chunks(num_tokens, vocab_size, self._hidden_ND.device):
            logits_CV = self._head.compute_logits(self._hidden_ND[part].to(self._dtype), self._loss_dtype)
            slope_CV = _cap_in_place(logits_CV, self._logit_cap, self._wants_gradient)
            losses_C, grad_CV = self._criterion(part, logits_CV, self._wants_gradient)
            if grad_CV is not None and slope_CV is not None:
                grad_CV *= slope_CV
            yield part, losses_C, grad_CV

    def add_gradients(self, part: slice, grad_CV: Tensor) -> None:
        """Add a chunk's gradients, given the gradient of its logits, whose memory is overwritten."""
        hidden_CD = self._hidden_ND[part].to(self._dtype)
        weight_VD, rows_KD, ids_K = self._head
        grad_CK = None
        if rows_KD is not None:
            grad_CK = grad_CV[:, ids_K]
            grad_CV[:, ids_K] = 0  # the replaced rows of `weight` don't affect the loss
            if self.rows_grad_KD is not None:
                self.rows_grad_KD.addmm_(grad_CK.T, hidden_CD.to(self._loss_dtype))
        if self.weight_grad_VD is not None:
            self.weight_grad_VD.addmm_(grad_CV.T, hidden_CD.to(self._loss_dtype))
        if self.hidden_grad_ND is not None:
            hidden_grad_CD = grad_CV.to(self._dtype) @ weight_VD
            if grad_CK is not None and rows_KD is not None:
                hidden_grad_CD = hidden_grad_CD + grad_CK @ rows_KD
            self.hidden_grad_ND[part] = hidden_grad_CD


class _ChunkedLoss(torch.autograd.Function):
    """The loss of each token, or their sum.

    The incoming gradient, known only in the backward pass, is a factor of each token's gradients. So the gradient of
    the hidden states is computed in the forward pass and multiplied later. The gradients of the head's weights are sums
    over the tokens: this works for them only if all tokens have the same factor, as in a sum. Otherwise the backward
    pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, is_summed: bool, hidden_ND: Tensor, criterion: Criterion, logit_cap: float | None, *head: Any
    ) -> Tensor:
        dtypes = choose_dtypes(hidden_ND, head[0])
        _, wants_hidden, _, _, wants_weight, wants_rows, _ = ctx.needs_input_grad
        ctx.is_summed, ctx.options = is_summed, (criterion, logit_cap, dtypes)
        ctx.wants = wants_hidden, wants_weight, wants_rows
        ctx.computes_again = not is_summed and (wants_weight or wants_rows)
        losses = torch.zeros(() if is_summed else len(hidden_ND), dtype=dtypes[1], device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            wants = (False, False, False) if ctx.computes_again else ctx.wants
            chunks = _Chunks(hidden_ND, HeadWeights(*head), wants, *ctx.options)
            for part, losses_C, grad_CV in chunks:
                if is_summed:
                    losses += losses_C.sum()
                else:
                    losses[part] = losses_C
                if grad_CV is not None:
                    chunks.add_gradients(part, grad_CV)
        if ctx.computes_again:
            ctx.save_for_backward(hidden_ND, *head)
        else:
            ctx.save_for_backward(chunks.hidden_grad_ND, chunks.weight_grad_VD, chunks.rows_grad_KD)
        return losses

    @staticmethod
    def backward(ctx: Any, *factors: Any) -> Any:
        factor = factors[0] if ctx.is_summed else factors[0][:, None]
        if not ctx.computes_again:
            hidden, weight, rows = (
                None if grad is None else (grad * factor).to(grad.dtype) for grad in ctx.saved_tensors
            )
            return None, hidden, None, None, weight, rows, None
        hidden_ND, *head = ctx.saved_tensors
        with torch.autocast(hidden_ND.device.type, enabled=False):
            chunks = _Chunks(hidden_ND, HeadWeights(*head), ctx.wants, *ctx.options)
            for part, _, grad_CV in chunks:
                assert grad_CV is not None
                chunks.add_gradients(part, grad_CV.mul_(factor[part]))
        return None, chunks.hidden_grad_ND, None, None, chunks.weight_grad_VD, chunks.rows_grad_KD, None
