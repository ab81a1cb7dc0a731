"""The losses of labels, from the logits of texts or tokens."""

from torch import Tensor, where
from torch.nn import functional

from t5tune.data.labels import LabelTask


def compute_label_losses(logits: Tensor, labels: Tensor, task: LabelTask, scale: float) -> Tensor:
    """Compute the loss of each item, as transformers does for a `problem_type`, but without its mean over the items.

    Cross-entropy of one class in nats; the mean binary cross-entropy of several classes; the squared error of numbers,
    which the model predicts in units of `scale`. An item that isn't labeled has no loss.

    Args:
        logits: of shape (…, K) for K classes, or (…, 1) for numbers.
        labels: class numbers or numbers, of shape (…); of several labels 0 or 1, of shape (…, K). NaN: not labeled.

    Returns:
        The losses, of shape (…), in the logits' dtype.
    """
    is_labeled, labels = ~labels.isnan(), labels.nan_to_num()
    if task.objective == "regress":
        losses = (logits.squeeze(-1) - labels.to(logits.dtype) / scale).square()
    elif task.several:
        is_labeled = is_labeled.all(-1)
        labels = labels.to(logits.dtype)
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    else:
        losses = functional.cross_entropy(logits.flatten(0, -2), labels.long().flatten(), reduction="none")
        losses = losses.view(labels.shape)
    return where(is_labeled, losses, 0.0)
