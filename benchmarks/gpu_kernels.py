"""Compare t5tune's kernels with fp64, transformers and PEFT, in outputs, gradients and time.

Errors are norms of the difference, relative to the norm of the exact result. Each run draws new inputs. The bounds are
what rounding explains: t5tune.model.kernels.flex_check.compute_bound for attention, and for layers and loss half as
much again as the error of transformers and PEFT, or one rounding to bf16. Times are for forward and backward together.

H heads, D head width, Q query tokens, K key tokens, R entries of the bias table, N tokens, V vocabulary.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_runner import Comparison, make_check
from torch.nn import functional

from t5tune.model.attention.segments import segment_attention
from t5tune.model.kernels.flex_attention import attend, compute_hash, count_kept_hashes, divide_rows, draw_seeds
from t5tune.model.kernels.flex_check import (
    KEY,
    OUTPUT,
    QUERY,
    ROUNDING,
    VALUE,
    AttentionShape,
    KernelCheck,
    check_kernel,
    compute_bound,
)
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.loss import CrossEntropy, HeadWeights, compute_summed_loss
from t5tune.planning.known_configs import KNOWN_CONFIGS

Tensors = dict[str, torch.Tensor]
Lengths = tuple[tuple[int, ...], tuple[int, ...]]  # of the sources and targets of a packed batch, in tokens

KINDS = ("encoder", "decoder", "cross")
CHECKED_LENGTHS: dict[str, Lengths] = {  # with a segment of one token, and one that is longer than two blocks
    "5 segments": ((200, 1, 390, 33, 128), (40, 1, 90, 300, 128)),
    "300 segments": ((3, 9) * 150, (4, 1) * 150),
}
RESULTS = {"output": OUTPUT, "query": QUERY, "key": KEY, "value": VALUE}
OF_STOCK = 1.5  # how many times stock's error is still rounding
REPEATS, WARM_UP = 10, 3


def check_attention(shape: AttentionShape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compare attention over packed rows with fp64, in one kernel and in the loop.

    The kernel has the number of stages that training chooses for this GPU.
    """
    checked = check_before_run(shape, device, dtype)
    comparisons = [Comparison("problem that t5tune's own check finds", checked.problem, "==", None)]
    for name, lengths in CHECKED_LENGTHS.items():
        for kind in KINDS:
            layer = RandomAttention(kind, shape, lengths, device, dtype, checked.num_stages)
            for dropout in (0.0, shape.dropout):
                comparisons += compare_with_fp64(layer, dropout, dtype, f"{name}, {kind}, dropout {dropout:g}")
    return make_check(comparisons, num_stages=checked.num_stages)


def compare_with_fp64(layer: "RandomAttention", dropout: float, dtype: torch.dtype, name: str) -> list[Comparison]:
    ways = {"kernel": partial(layer.attend, dropout)}
    if not dropout:  # the loop uses torch's dropout, with different random numbers
        ways["loop"] = layer.loop
    seed, comparisons = draw_seed(), []
    exact = layer.compute_gradients(partial(layer.attend_exactly, dropout), torch.float64, seed)
    for way, attend_in_this_way in ways.items():
        errors = compute_errors(layer.compute_gradients(attend_in_this_way, dtype, seed), exact)
        comparisons += [
            Comparison(f"{name}, {way}: {result}", errors[result], "<=", compute_bound(of, dropout))
            for result, of in RESULTS.items()
        ]
    return comparisons


def check_before_run(shape: AttentionShape, device: str, dtype: torch.dtype) -> KernelCheck:
    """Compare the kernel with the loop, as t5tune does before a run, and choose its number of stages for this GPU."""
    return check_kernel([shape], torch.device(device), dtype) if device == "cuda" else KernelCheck(None, None)


def time_attention(shape: AttentionShape, lengths: Lengths, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Measure the milliseconds of a layer's attention over packed rows, in one kernel and in the loop."""
    results: dict[str, Any] = {"tokens": [sum(of) for of in lengths], "segments": len(lengths[0])}
    num_stages = check_before_run(shape, device, dtype).num_stages
    for kind in KINDS:
        layer = RandomAttention(kind, shape, lengths, device, dtype, num_stages)
        for dropout in (0.0, shape.dropout):
            for way in (partial(layer.attend, dropout), partial(layer.loop, dropout=dropout)):
                name = f"{kind}, dropout {dropout:g}, {'loop' if way.func == layer.loop else 'flex'}"
                results[name] = measure_milliseconds(partial(layer.compute_gradients, way, dtype, 0), device)
    return results


def check_compilations(
    shape: AttentionShape, batches: int, longest: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Count how often torch compiles attention for two batches, and then for batches of different lengths.

    Args:
        longest: tokens of the longest example.
    """
    from torch._dynamo.utils import counters

    found, num_stages = [], check_before_run(shape, device, dtype).num_stages
    torch._dynamo.reset()  # forget what that check compiled
    for number in range(2 + batches):
        before = counters["stats"]["unique_graphs"]
        # where two rows of the first batch are equally long, torch compiles again for rows that differ
        lengths = draw_lengths(longest), draw_lengths(longest // 2 if number == 1 else longest)
        for kind in KINDS:
            layer = RandomAttention(kind, shape, lengths, device, dtype, num_stages)
            layer.compute_gradients(partial(layer.attend, shape.dropout), dtype, 0)
        found.append(counters["stats"]["unique_graphs"] - before)
    first = Comparison("compilations for the first batch", found[0], ">=", len(KINDS))
    later = Comparison(f"compilations for {batches} more batches", sum(found[2:]), "==", 0)
    return make_check([first, later], compilations=found)


def time_cudnn(shape: AttentionShape, batches: int, longest: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Measure the milliseconds of the loop for batches of new lengths, with and without cuDNN's attention.

    t5tune switches it off, because cuDNN makes a plan for every new shape.

    Args:
        longest: tokens of the longest example.
    """
    results: dict[str, Any] = {"batches": batches}
    was_on = torch.backends.cuda.cudnn_sdp_enabled()
    for is_on in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        seconds = []
        for _ in range(batches + 1):  # the first call loads the libraries
            lengths = draw_lengths(longest), draw_lengths(longest)
            layers = [RandomAttention(kind, shape, lengths, device, dtype) for kind in KINDS]
            started = read_clock(device)
            for layer in layers:
                layer.compute_gradients(layer.loop, dtype, 0)
            seconds.append(read_clock(device) - started)
        results["cuDNN on" if is_on else "cuDNN off"] = round(1000 * statistics.mean(seconds[1:]), 2)
    torch.backends.cuda.enable_cudnn_sdp(was_on)
    return results


def compare_layers(size: str, tokens: int, device: str, dtype: torch.dtype, is_timed: bool = False) -> dict[str, Any]:
    """Compare norm, gated feed-forward layer and linear layer with LoRA with fp64, as transformers and PEFT do them.

    Returns:
        Layer and side -> errors, or the milliseconds.
    """
    stock = make_lora_model(size, device, dtype)
    ours, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    use_fused_layers(ours, torch.device(device), lambda _: None)
    results: dict[str, Any] = {}
    seed = draw_seed()
    for part, find in LAYERS.items():
        expected = None if is_timed else compute_layer(find(exact), tokens, stock.config.d_model, torch.float64, seed)
        for side, model in (("t5tune", ours), ("stock", stock)):
            run = partial(compute_layer, find(model), tokens, stock.config.d_model, dtype, seed)
            with torch.autocast(device, dtype):
                results[f"{part}, {side}"] = summarize_call(run, expected, device)
    return results


def compare_losses(size: str, tokens: int, device: str, dtype: torch.dtype, is_timed: bool = False) -> dict[str, Any]:
    """Compare the loss in chunks with fp64, as the loss that stores all logits does.

    Returns:
        Side -> errors, or the milliseconds.
    """
    config = KNOWN_CONFIGS[size]
    torch.manual_seed(draw_seed())
    weight_VD = torch.randn(config["vocab_size"], config["d_model"], device=device).to(dtype)
    hidden_ND = (torch.randn(tokens, config["d_model"], device=device) * config["d_model"] ** -0.5).to(dtype)
    labels_N = torch.randint(config["vocab_size"], (tokens,), device=device)
    labels_N[:7] = -100

    def compute(loss: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Tensors:
        leaf = hidden_ND.to(dtype).requires_grad_()
        total = loss(leaf)
        return {"output": total.detach(), "input": torch.autograd.grad(total, leaf)[0]}

    def store_logits(hidden: torch.Tensor) -> torch.Tensor:
        logits_NV = hidden @ weight_VD.to(hidden.dtype).T
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        return functional.cross_entropy(logits_NV.to(wide), labels_N, reduction="sum")

    exact = None if is_timed else compute(store_logits, torch.float64)
    ways = {"t5tune": lambda hidden: compute_summed_loss(hidden, CrossEntropy(labels_N), HeadWeights(weight_VD))}
    ways["stock"] = store_logits
    results = {}
    for way, loss in ways.items():
        with torch.autocast(device, dtype):
            results[f"loss, {way}"] = summarize_call(partial(compute, loss, dtype), exact, device)
    return results


def summarize_call(run: Callable[[], Tensors], exact: Tensors | None, device: str) -> dict[str, float]:
    return {"ms": measure_milliseconds(run, device)} if exact is None else compute_errors(run(), exact)


def check_layers(size: str, tokens: int, targets: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Check that layers and loss have no larger errors than rounding explains."""
    errors = compare_layers(size, tokens, device, dtype) | compare_losses(size, targets, device, dtype)
    comparisons = []
    for name, found in errors.items():
        part, _, side = name.partition(", ")
        stock = errors[f"{part}, stock"]
        if side == "t5tune":
            comparisons += [
                Comparison(f"{part}: {result}", error, "<=", max(OF_STOCK * stock[result], ROUNDING))
                for result, error in found.items()
            ]
    return make_check(comparisons)


def time_layers(size: str, tokens: int, targets: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Measure the milliseconds of layers and loss, and of transformers' and PEFT's."""
    return compare_layers(size, tokens, device, dtype, True) | compare_losses(size, targets, device, dtype, True)


class RandomAttention:
    """A layer's attention over a packed batch, with random queries, keys, values and position bias."""

    def __init__(
        self,
        kind: str,
        shape: AttentionShape,
        lengths: Lengths,
        device: str,
        dtype: torch.dtype,
        num_stages: int | None = None,
    ) -> None:
        torch.manual_seed(draw_seed())
        sources, targets = lengths
        self.is_causal = kind == "decoder"
        self.queries, self.keys = sources if kind == "encoder" else targets, targets if self.is_causal else sources
        self.blocks = divide_rows(sources, targets, num_stages=num_stages).to(device).blocks[kind]
        size = shape.num_heads, 2 * shape.max_distance + 1
        # rounded, so that the loop, whose bias is in bf16, adds the same numbers
        self.table_HR = None if kind == "cross" else torch.randn(size, device=device).to(dtype).float()
        rows = len(self.blocks.query_segments), len(self.blocks.key_segments), len(self.blocks.key_segments)
        heads = shape.num_heads, shape.head_width
        self.states = [torch.randn(1, length, *heads, device=device) for length in rows]
        self.states[0] *= shape.head_width**-0.5  # as T5's initialization of q does
        self.states = [state.to(dtype) for state in self.states]
        # the padding's outputs don't matter
        self.weights = torch.randn(1, sum(self.queries), *heads, device=device).to(dtype)

    def compute_gradients(self, attend: Callable[..., torch.Tensor], dtype: torch.dtype, seed: int) -> Tensors:
        """Compute the output, and the gradients of its product with random weights."""
        leaves = [state.to(dtype).detach().requires_grad_() for state in self.states]
        torch.manual_seed(seed)  # of dropout
        output = attend(*(leaf.transpose(1, 2) for leaf in leaves))[:, : self.weights.shape[1]]
        gradients = torch.autograd.grad(output, leaves, self.weights.to(dtype))
        return dict(zip(("output", "query", "key", "value"), (output.detach(), *gradients), strict=True))

    def attend(self, dropout: float, *states_BHLD: torch.Tensor) -> torch.Tensor:
        query, key, value = states_BHLD
        return attend(query, key, value, self.blocks, self.table_HR, self.is_causal, dropout)

    def loop(self, *states_BHLD: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        lengths = (self.queries, self.keys, self.keys)
        query, key, value = (state[:, :, : sum(of)] for state, of in zip(states_BHLD, lengths, strict=True))
        bias = self._make_bias(max(self.queries), max(self.keys), query.dtype)
        return segment_attention(query, key, value, list(self.queries), list(self.keys), bias, dropout)

    def attend_exactly(self, dropout: float, *states_BHLD: torch.Tensor) -> torch.Tensor:
        """Compute softmax and dropout with all scores in memory."""
        seeds_H = draw_seeds(states_BHLD[0])
        query_BHQD, key_BHKD, value_BHKD = states_BHLD
        scores_BHQK = query_BHQD @ key_BHKD.mT
        bias = self._make_bias(*scores_BHQK.shape[2:], scores_BHQK.dtype)
        scores_BHQK = scores_BHQK if bias is None else scores_BHQK + bias
        is_other_QK = self.blocks.query_segments[:, None] != self.blocks.key_segments
        probabilities_BHQK = scores_BHQK.masked_fill(is_other_QK, -torch.inf).softmax(-1)
        query, key = (torch.arange(size, device=query_BHQD.device) for size in scores_BHQK.shape[2:])
        kept_HQK = compute_hash(seeds_H[:, None, None], query[:, None], key) < count_kept_hashes(dropout)
        attended_BHQD: torch.Tensor = probabilities_BHQK * kept_HQK / (1 - dropout) @ value_BHKD
        return attended_BHQD.transpose(1, 2)

    def _make_bias(self, length: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Make the position bias as a matrix [1, H, length, width]."""
        if self.table_HR is None:
            return None
        device, max_distance = self.table_HR.device, self.table_HR.shape[1] // 2
        distance_QK = torch.arange(width, device=device) - torch.arange(length, device=device)[:, None]
        bias_HQK = self.table_HR[:, distance_QK.clamp(-max_distance, max_distance) + max_distance].to(dtype)
        if self.is_causal:
            bias_HQK = bias_HQK.masked_fill(distance_QK > 0, torch.finfo(dtype).min)
        return bias_HQK[None]


def make_lora_model(size: str, device: str, dtype: torch.dtype) -> Any:
    """Make a T5 with one layer, in `dtype`, and with random adapters in fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(draw_seed())
    values = {**KNOWN_CONFIGS[size], "num_layers": 1, "num_decoder_layers": 1, "vocab_size": 128, "dropout_rate": 0.0}
    values.pop("model_type")
    base = T5ForConditionalGeneration(T5Config(**values)).to(device, dtype)
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q", "v"]))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn_like(value, dtype=torch.float32) * value.shape[1] ** -0.5
    return model.train()


LAYERS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda model: model.base_model.model.encoder.block[0].layer[1].layer_norm,
    "feed-forward": lambda model: model.base_model.model.encoder.block[0].layer[1].DenseReluDense,
    "LoRA": lambda model: model.base_model.model.encoder.block[0].layer[0].SelfAttention.q,
}


def compute_layer(layer: Any, tokens: int, width: int, dtype: torch.dtype, seed: int) -> Tensors:
    """Compute a layer's output for random tokens, and the gradients of its product with random weights."""
    device = next(layer.parameters()).device
    torch.manual_seed(seed)
    # drawn in bf16, so that both precisions get the same numbers
    hidden = torch.randn(1, tokens, width, device=device, dtype=torch.bfloat16).to(dtype).requires_grad_()
    trained = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    output = layer(hidden)
    weights = torch.randn(output.shape, device=device, dtype=torch.bfloat16).to(output.dtype)
    gradients = torch.autograd.grad(output, [hidden, *trained.values()], weights)
    names = "output", "input", *(name.partition(".")[0] for name in trained)
    return dict(zip(names, (output.detach(), *gradients), strict=True))


def compute_errors(found: Tensors, exact: Tensors) -> dict[str, float]:
    """Compute the norm of each difference, relative to the norm of the exact result."""
    return {
        name: float(f"{float((found[name].double() - value).norm() / value.norm()):.2e}")
        for name, value in exact.items()
    }


def measure_milliseconds(run: Callable[[], Any], device: str) -> float:
    """Measure the milliseconds of a call: the median of three means."""
    for _ in range(WARM_UP):
        run()
    seconds = []
    for _ in range(3):
        started = read_clock(device)
        for _ in range(REPEATS):
            run()
        seconds.append((read_clock(device) - started) / REPEATS)
    return round(1000 * statistics.median(seconds), 3)


def read_clock(device: str) -> float:
    """Read the clock once the GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def draw_lengths(longest: int, count: int = 30) -> tuple[int, ...]:
    """Draw the lengths of segments, in tokens."""
    return tuple(1 + int(value) for value in torch.randint(longest, (count,), generator=GENERATOR))


def draw_seed() -> int:
    """Draw a seed that differs each time, also if a measurement is repeated."""
    return int(torch.randint(2**31, (), generator=GENERATOR))


GENERATOR = torch.Generator()
GENERATOR.seed()
