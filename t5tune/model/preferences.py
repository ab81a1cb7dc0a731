"""Losses of preference pairs, from the log-probabilities of their answers.

    policy_P2, lengths_P2 = sum_answers(losses_BT, labels_BT, segments)
    losses_P = compute_dpo_losses(policy_P2, reference_P2, beta=0.1)

P pairs, each with the chosen answer first and then the rejected one. B and T: see model/loss.py.
"""

import torch
from torch import Tensor
from torch.nn import functional

from t5tune.model.attention.segments import Segments
from t5tune.model.loss import IGNORED_LABEL


def sum_answers(losses_BT: Tensor, labels_BT: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Add up the cross-entropies of each answer.

    Args:
        segments: of a packed batch; None: the batch is padded, with a row per answer.

    Returns:
        The log-probabilities of the answers in fp64, and their numbers of tokens: each (P, 2). Dummy pairs have 0.
    """
    is_target_BT = labels_BT != IGNORED_LABEL
    if segments is None:
        sums, counts = losses_BT.double().sum(1), is_target_BT.sum(1)
    else:
        lengths = list(segments.targets)
        # not scatter_add, which on GPUs adds with atomics, in any order
        sums, counts = (
            torch.stack([part.sum() for part in torch.split(values_BT[0, : sum(lengths)], lengths)])
            for values_BT in (losses_BT.double(), is_target_BT)
        )
    return -sums.view(-1, 2), counts.view(-1, 2)


def compute_dpo_losses(policy_P2: Tensor, reference_P2: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute the loss of direct preference optimization (Rafailov et al. 2023, equation 7) of each pair.

    Args:
        label_smoothing: probability that a preference is reversed (Mitchell 2023, conservative DPO).
    """
    logits_P = beta * _compute_margins(policy_P2, reference_P2)
    right, wrong = functional.logsigmoid(logits_P), functional.logsigmoid(-logits_P)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def compute_ipo_losses(policy_P2: Tensor, reference_P2: Tensor, beta: float) -> Tensor:
    """Compute the loss of IPO (Azar et al. 2023, equation 17) of each pair. `beta` is the paper's τ."""
    return (_compute_margins(policy_P2, reference_P2) - 1 / (2 * beta)) ** 2


def _compute_margins(policy_P2: Tensor, reference_P2: Tensor) -> Tensor:
    gains_P2 = policy_P2 - reference_P2
    return gains_P2[:, 0] - gains_P2[:, 1]


def compute_log_odds_ratios(means_P2: Tensor) -> Tensor:
    """Compute log (odds(chosen) / odds(rejected)) of each pair, where odds(p) = p / (1 - p) (Hong et al. 2024).

    Args:
        means_P2: the mean log-probability of a token of each answer.
    """
    means_P2 = means_P2.clamp_max(-torch.finfo(means_P2.dtype).eps)  # the odds of 1 are infinite
    log_odds_P2 = means_P2 - torch.log(-torch.expm1(means_P2))
    return log_odds_P2[:, 0] - log_odds_P2[:, 1]
