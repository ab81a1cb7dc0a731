"""Comparisons of a model's or layer's gradients with those of a second implementation."""

from typing import Any

import numpy as np
import torch

from t5tune.data.tokens.encoding import Example


def make_examples(lengths: list[tuple[int, int]], vocabulary: int, first_id: int = 1) -> list[Example]:
    """Make examples with random tokens, given the lengths of source and target."""
    rng = np.random.default_rng(5)
    return [Example(*(rng.integers(first_id, vocabulary, length) for length in each)) for each in lengths]


def compute_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


def compute_relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm().clamp_min(1e-30))


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float, floor: float = 0.0
) -> None:
    """Compare each gradient relative to its norm, or to the largest norm times `floor` if that is more."""
    assert found.keys() == expected.keys()
    smallest = floor * max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= bound * max(gradient.norm(), smallest), name


def run_layer(layer: Any, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Compute a layer's output, and the gradients of its input and parameters."""
    given = x.clone().requires_grad_()
    output = layer(given)
    return [output.detach(), *torch.autograd.grad(output, [given, *layer.parameters()], grad)]
