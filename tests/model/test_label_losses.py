"""The losses of labels: equal to torch's means over the labeled items, and none for items without a label."""

from typing import Any

import torch
from torch.nn import functional

from t5tune.data.labels import LabelTask
from t5tune.model.label_losses import compute_label_losses

NAMES = ("a", "b", "c", "d")


def make_task(**changes: Any) -> LabelTask:
    return LabelTask(
        **{"objective": "tag", "per_token": True, "several": False, "names": NAMES, "source_words": "text"} | changes
    )


def test_the_loss_of_tags_is_the_cross_entropy_of_labeled_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BSK = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    classes_BS = torch.randint(0, 4, (3, 9), generator=generator)
    classes_BS[0, 4:], classes_BS[2] = -100, -100
    labels_BS = classes_BS.float().masked_fill(classes_BS < 0, torch.nan)
    losses_BS = compute_label_losses(logits_BSK, labels_BS, make_task(), 1.0)
    expected = functional.cross_entropy(logits_BSK.flatten(0, 1), classes_BS.flatten())
    assert losses_BS.shape == (3, 9)
    assert losses_BS[2].eq(0).all()
    mean = losses_BS.sum() / (classes_BS >= 0).sum()
    torch.testing.assert_close(mean, expected, rtol=1e-14, atol=0)
    found, wanted = (torch.autograd.grad(each, logits_BSK)[0] for each in (mean, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_the_loss_of_several_labels_is_transformers_binary_cross_entropy() -> None:
    logits_NK, labels_NK = torch.randn(5, 4), torch.randint(0, 2, (5, 4)).float()
    labels_NK[3] = torch.nan
    losses_N = compute_label_losses(
        logits_NK, labels_NK, make_task(objective="classify", per_token=False, several=True), 1.0
    )
    labeled = [0, 1, 2, 4]
    assert losses_N[3] == 0
    expected = torch.nn.BCEWithLogitsLoss()(logits_NK[labeled], labels_NK[labeled])
    torch.testing.assert_close(losses_N.sum() / 4, expected)


def test_the_loss_of_numbers_is_in_units_of_the_scale() -> None:
    logits_N1, labels_N = torch.tensor([[0.5], [2.0], [7.0]]), torch.tensor([8.0, 0.0, torch.nan])
    losses_N = compute_label_losses(logits_N1, labels_N, make_task(objective="regress", per_token=False, names=()), 4.0)
    assert losses_N.tolist() == [(0.5 - 2.0) ** 2, 4.0, 0.0]


def test_a_batch_without_labels_has_a_loss_of_zero_with_gradients() -> None:
    logits_1K = torch.randn(1, 4, requires_grad=True)
    compute_label_losses(logits_1K, torch.tensor([torch.nan]), make_task(per_token=False), 1.0).sum().backward()  # type: ignore[no-untyped-call]
    assert logits_1K.grad is not None
    assert logits_1K.grad.eq(0).all()
