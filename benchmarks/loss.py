"""Compare the cost of the cross-entropy over the vocabulary: torch's loss on whole logits, and t5tune's chunked loss.

    python benchmarks/loss.py
    python benchmarks/loss.py --tokens 8192 --vocabulary 250112 --width 512

The head is frozen and the hidden states need a gradient. Each way runs in its own process, with the same malloc
settings. Prints one JSON line: CPU seconds of forward and backward, the increase of the peak resident memory, and the
relative error of the gradient compared with fp64.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sides import read_process_memory, run_self
from torch.nn import functional


def compute_whole_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    from t5tune.model.loss import CrossEntropy, HeadWeights, compute_summed_loss

    def compute_chunked_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return compute_summed_loss(hidden, CrossEntropy(labels), HeadWeights(weight))

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.width).to(dtype).requires_grad_()
    weight = (torch.randn(options.vocabulary, options.width) * options.width**-0.5).to(dtype)
    labels = torch.randint(0, options.vocabulary, (options.tokens,))
    compute_loss = compute_whole_loss if way == "whole" else compute_chunked_loss
    compute_loss(hidden[:64], weight, labels[:64]).backward()  # warm-up
    hidden.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, started = read_process_memory("VmRSS"), time.process_time()
    loss = compute_loss(hidden, weight, labels)
    loss.backward()
    seconds, peak = time.process_time() - started, read_process_memory("VmHWM") - before
    part = slice(0, 256)
    exact_hidden = hidden.detach()[part].double().requires_grad_()
    functional.cross_entropy(exact_hidden @ weight.double().T, labels[part], reduction="sum").backward()
    grad = hidden.grad
    assert grad is not None
    assert exact_hidden.grad is not None
    off = (grad[part].double() - exact_hidden.grad).norm() / exact_hidden.grad.norm()
    return {"cpu_seconds": round(seconds, 2), "peak_mb": peak >> 20, "gradient_off": float(off)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32128)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--way", choices=["whole", "chunked"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    results: dict[str, Any] = {name: getattr(options, name) for name in ("tokens", "vocabulary", "width", "dtype")}
    for way in ("whole", "chunked"):
        results[way] = run_self(*sys.argv[1:], "--way", way)
    results["memory_share"] = round(results["chunked"]["peak_mb"] / results["whole"]["peak_mb"], 3)
    results["time_share"] = round(results["chunked"]["cpu_seconds"] / results["whole"]["cpu_seconds"], 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
