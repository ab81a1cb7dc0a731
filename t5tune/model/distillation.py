"""The loss of distillation: the divergence from a teacher's probabilities, and the cross-entropy of the targets.

The loss of a token is α · T² · KL + (1 − α) · cross-entropy, where both models' logits are divided by the temperature T
for the divergence. The factor T² makes its gradient as large as that of T = 1 (Hinton et al. 2015).

The teacher's logits are computed like the student's, for one chunk of target tokens at a time.

C tokens of a chunk, V vocabulary, U tokens that both heads have rows for, E width of the teacher.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from t5tune.model.loss import IGNORED_LABEL, CrossEntropy, HeadWeights, choose_dtypes


@dataclass
class Distillation:
    """The criterion of distillation. See model/loss.py.

    Args:
        teacher_hidden_NE: input of the teacher's head.
        teacher_cap: the soft cap of the teacher's logits; None: not capped.
        alpha: share of the divergence in the loss.
        kl: `forward`: Σ p log (p / q), of the model q from the teacher p. `reverse`: Σ q log (q / p) (Gu et al. 2024).

    Attributes:
        totals: sums over the target tokens so far.
    """

    targets: CrossEntropy
    teacher_hidden_NE: Tensor
    teacher_head: HeadWeights
    teacher_cap: float | None
    alpha: float
    temperature: float
    kl: Literal["forward", "reverse"] = "forward"
    totals: dict[str, Any] = field(default_factory=lambda: {"kl": 0.0, "nll": 0.0})

    def __call__(self, part: slice, logits_CV: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        teacher_CV = self._compute_teacher_logits(part, logits_CV.dtype)
        shared = min(logits_CV.shape[1], teacher_CV.shape[1])  # rows after the last token may differ in number
        log_q_CU, log_p_CU = (
            torch.log_softmax(each[:, :shared] / self.temperature, 1) for each in (logits_CV, teacher_CV)
        )
        del teacher_CV
        is_target_C = self.targets.labels_N[part] != IGNORED_LABEL
        divergence_C, grad_CU = self._compare(log_p_CU, log_q_CU, wants_gradient)
        divergence_C = torch.where(is_target_C, divergence_C, 0.0)
        losses_C, grad_CV = self.targets(part, logits_CV, wants_gradient)  # overwrites the logits
        self.totals["kl"] += divergence_C.sum()
        self.totals["nll"] += losses_C.sum()
        losses_C = self.alpha * self.temperature**2 * divergence_C + (1 - self.alpha) * losses_C
        if grad_CV is None or grad_CU is None:
            return losses_C, None
        grad_CV *= 1 - self.alpha
        grad_CV[:, :shared] += grad_CU.mul_(is_target_C[:, None] * (self.alpha * self.temperature))
        return losses_C, grad_CV

    def _compute_teacher_logits(self, part: slice, dtype: torch.dtype) -> Tensor:
        head = self.teacher_head
        product_dtype, loss_dtype = choose_dtypes(self.teacher_hidden_NE, head.weight_VD)
        hidden_CE = self.teacher_hidden_NE[part].to(product_dtype)
        logits_CV = head.to(product_dtype, loss_dtype).compute_logits(hidden_CE, loss_dtype).to(dtype)
        return logits_CV if (cap := self.teacher_cap) is None else cap * torch.tanh(logits_CV / cap)

    def _compare(self, log_p_CU: Tensor, log_q_CU: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Compute the divergence of each token, and its gradient with respect to the model's scaled logits."""
        q_CU = log_q_CU.exp()
        if self.kl == "forward":
            p_CU = log_p_CU.exp()
            divergence_C = (p_CU * (log_p_CU - log_q_CU)).sum(1)
            return divergence_C, q_CU.sub_(p_CU) if wants_gradient else None
        ratio_CU = log_q_CU - log_p_CU
        divergence_C = (q_CU * ratio_CU).sum(1)
        return divergence_C, q_CU.mul_(ratio_CU.sub_(divergence_C[:, None])) if wants_gradient else None
