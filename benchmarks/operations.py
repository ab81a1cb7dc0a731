"""Part of train.py: the operations of a training step, and how many of them a device can compute per second."""

import argparse
import time
from typing import Any

import numpy as np
import torch

T5GEMMA2_FULL_ATTENTION = 6  # each sixth layer sees the whole text


def count_operations(sources: Any, targets: Any, shape: dict[str, Any]) -> float:
    """Count the floating-point operations of a step with frozen weights.

    4 per weight and token, and in attention 12 per pair of tokens and dimension.
    """
    if shape["model_type"] == "t5gemma2":
        return count_t5gemma2_operations(sources, targets, shape["encoder"]["text_config"], shape["decoder"])
    width, inner, layers = shape["d_model"], shape["d_kv"] * shape["num_heads"], shape["num_layers"]
    projection, feed_forward = (
        width * inner,
        (3 if "gated" in shape["feed_forward_proj"] else 2) * width * shape["d_ff"],
    )
    source_weights = layers * (4 * projection + feed_forward + 2 * projection)  # keys and values for the decoder
    target_weights = layers * (6 * projection + feed_forward) + width * shape["vocab_size"]
    pairs = (sources**2 + targets**2 / 2 + sources * targets).sum() * layers
    return float(4 * (source_weights * sources.sum() + target_weights * targets.sum()) + 12 * inner * pairs)


def count_t5gemma2_operations(sources: Any, targets: Any, encoder: dict[str, Any], decoder: dict[str, Any]) -> float:
    """Count the same for T5Gemma 2, whose decoder's keys and values are the encoder's tokens and its own."""

    def count_weights(stack: dict[str, Any]) -> tuple[int, int, int]:
        width, head_width = stack["hidden_size"], stack["head_dim"]
        keys = 2 * width * head_width * stack["num_key_value_heads"]
        inner = head_width * stack["num_attention_heads"]
        return keys, 2 * width * inner + keys + 3 * width * stack["intermediate_size"], inner

    def count_pairs(lengths: Any, stack: dict[str, Any]) -> Any:
        full = stack["num_hidden_layers"] // T5GEMMA2_FULL_ATTENTION
        in_window = lengths * np.minimum(lengths, stack["sliding_window"])
        return full * lengths**2 + (stack["num_hidden_layers"] - full) * in_window

    (_, of_source, inner), (keys, of_target, _) = count_weights(encoder), count_weights(decoder)
    layers = decoder["num_hidden_layers"]
    source_weights = encoder["num_hidden_layers"] * of_source + layers * keys
    target_weights = layers * of_target + decoder["hidden_size"] * decoder["vocab_size"]
    pairs = count_pairs(sources, encoder) + count_pairs(targets, decoder) / 2 + layers * sources * targets
    return float(4 * (source_weights * sources.sum() + target_weights * targets.sum()) + 12 * inner * pairs.sum())


def read_clock(on_gpu: bool) -> float:
    """Read the process's CPU time, or with a GPU the wall time once it has finished its work."""
    if not on_gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class MatrixProduct:
    """A large matrix product, to measure the operations per second that are possible."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.on_gpu: bool = options.on_gpu
        size = 8192 if self.on_gpu else 2048
        self.operations = 2 * size**3
        self.factor = torch.randn(size, size, device="cuda" if self.on_gpu else "cpu")
        self.factor = self.factor.to(getattr(torch, options.dtype))
        self.seconds: list[float] = []
        self.compute()  # the first product takes longer
        self.seconds.clear()

    def compute(self) -> None:
        begun = read_clock(self.on_gpu)
        self.factor @ self.factor
        self.seconds.append(read_clock(self.on_gpu) - begun)

    def compute_share(self, result: dict[str, Any], seconds: float) -> float:
        """Compute the share of the peak that a way reached, if a product takes this many seconds."""
        speed = result["tokens_per_second"] * result["operations_per_token"]
        return round(speed * seconds / self.operations, 3)


def add_share_of_peak(result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Add the share of the peak that a way has reached; the fastest of five products excludes disturbances."""
    product = MatrixProduct(options)
    for _ in range(5):
        product.compute()
    return {**result, "of_peak": product.compute_share(result, min(product.seconds))}
