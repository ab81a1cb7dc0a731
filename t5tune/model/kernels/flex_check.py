"""Compare the two implementations of attention over packed rows: one kernel (flex), and the loop over segments.

    find_unmet_requirement(shape, device, torch.bfloat16, trains_bias=False)    # why it can't be used, or None
    check_kernel([shape], device, torch.bfloat16).problem                       # its wrong results, or None

Several libraries, which change with each release, compile the kernel on the machine on which it runs. So a run uses it
only after a comparison of its outputs and gradients with the loop's (training/attention_choice.py).
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex_attention

from t5tune.formatting import shorten
from t5tune.io.reasons import join_lines
from t5tune.model.attention.segments import segment_attention
from t5tune.model.device import has_bf16
from t5tune.model.kernels.build_tools import find_missing_compiler
from t5tune.model.kernels.flex_attention import (
    MIN_HEAD_WIDTH,
    Blocks,
    attend,
    compute_hash,
    count_kept_hashes,
    divide_rows,
    draw_seeds,
)

PackedAttention = Literal["flex", "loop"]

# lengths for the comparison: with a segment of one token, and a segment that crosses the end of a block
SOURCES, TARGETS = (200, 1, 70, 33), (40, 1, 90, 12)
TIMED_SEGMENTS = tuple(range(40, 500, 8))  # 58 examples, 15,544 tokens
FEWER_STAGES = (2, 1)
OUTPUT, QUERY, KEY, VALUE = "the output", "the query's gradient", "the key's gradient", "the value's gradient"
# how often the kernels round a result and its terms to bf16; with dropout, there are two calls
ROUNDINGS = {OUTPUT: 2, QUERY: 4, KEY: 4, VALUE: 3}
ROUNDING = 2**-8  # the largest relative error of a number that is rounded to bf16


class AttentionShape(NamedTuple):
    """The properties of a model that the kernel depends on.

    Args:
        max_distance: T5's position bias is constant beyond this distance.
        dropout: probability of dropping a key.
        is_trained: whether gradients are computed; a teacher only has a forward pass.
    """

    num_heads: int
    head_width: int
    max_distance: int
    dropout: float
    is_trained: bool = True


class KernelCheck(NamedTuple):
    """The result of comparing kernels with the loop.

    Args:
        problem: in words; None: the results are equal.
        num_stages: the working number of stages; see flex_attention.PackedRows.
    """

    problem: str | None
    num_stages: int | None


def read_attention_shape(model: Any, has_dropout: bool, is_trained: bool = True) -> AttentionShape | None:
    """Read the shape from a model's config; None if the kernel can't compute its attention."""
    if not model.architecture.has_flex_attention:
        return None
    config = model.config
    dropout = config.dropout_rate if has_dropout else 0.0
    return AttentionShape(config.num_heads, config.d_kv, config.relative_attention_max_distance, dropout, is_trained)


def find_unmet_requirement(
    shape: AttentionShape | None, device: torch.device, dtype: torch.dtype, trains_bias: bool
) -> str | None:
    """Return why the kernel isn't for this device or model; None if it is."""
    if shape is None:
        return "the kernel computes only T5's attention"
    if device.type != "cuda":
        return "the kernel needs an NVIDIA GPU"
    if not hasattr(torch_flex_attention, "AuxRequest"):
        return f"the kernel needs torch 2.9 or newer, and this is {torch.__version__}"
    if not has_bf16(device):
        return f"{torch.cuda.get_device_name(device)} is too old for the kernel"
    if dtype != torch.bfloat16:
        return "the kernel computes only in bf16, which --bf16 turns on"
    if trains_bias:
        return "the kernel can't train the position bias, as full training does"
    if off := [name for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE") if os.environ.get(name) == "1"]:
        return f"{off[0]} in the environment turns torch.compile off"
    if shape.head_width < MIN_HEAD_WIDTH:
        return f"the kernel needs heads that are at least {MIN_HEAD_WIDTH} wide; this model's are {shape.head_width}"
    missing = find_missing_compiler(on_gpu=True)
    return None if missing is None else f"{missing.what}; {missing.fix}"


def check_kernel(shapes: Sequence[AttentionShape], device: torch.device, dtype: torch.dtype) -> KernelCheck:
    """Compare outputs and gradients of kernel and loop, for each shape that a run uses.

    Kernels that fail are tried again with fewer stages, which take less shared memory: docs/support.md has a table.

    The comparison takes some milliseconds, and compiles the kernels of training and its evaluations. Training compiles
    again only for layers whose keys or values need no gradient, such as the first layer's keys with LoRA on q and v.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        failures = []
        for num_stages in (None, *FEWER_STAGES):
            torch.manual_seed(0)
            try:
                found = (_find_differences(shape, device, dtype, num_stages) for shape in shapes)
                return KernelCheck(next(chain.from_iterable(found), None), num_stages)
            except Exception as error:  # whatever compilers and kernels raise
                failures.append(f"{type(error).__name__}: {shorten(join_lines(error), 200)}")
        return KernelCheck("; with fewer stages: ".join(dict.fromkeys(failures)), None)


def measure_implementations(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, num_stages: int | None = None
) -> dict[PackedAttention, float]:
    """Measure the seconds of an encoder layer's attention, forward and backward, in a row of TIMED_SEGMENTS."""
    rows = divide_rows(TIMED_SEGMENTS, TIMED_SEGMENTS, num_stages=num_stages).to(device)
    states, layer = _make_layer(shape, "encoder", rows.blocks["encoder"], device, dtype)
    implementations: dict[PackedAttention, Callable[..., Tensor]] = {
        "flex": partial(layer.attend, shape.dropout),
        "loop": partial(layer.loop, TIMED_SEGMENTS, TIMED_SEGMENTS),
    }
    seconds = {}
    for name, compute in implementations.items():
        for started in (_wait_and_read_clock(device) for _ in range(2)):  # the first time compiles
            _run(compute, states, sum(TIMED_SEGMENTS), has_gradients=True)
            seconds[name] = _wait_and_read_clock(device) - started
    return seconds


def _wait_and_read_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _find_differences(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, num_stages: int | None
) -> Iterator[str]:
    rows = divide_rows(SOURCES, TARGETS, num_stages=num_stages).to(device)
    kinds = {"encoder": (SOURCES, SOURCES), "decoder": (TARGETS, TARGETS), "cross": (TARGETS, SOURCES)}
    for kind, (queries, keys) in kinds.items():
        states, layer = _make_layer(shape, kind, rows.blocks[kind], device, dtype)
        # as in training, and then as in its evaluations and in a teacher
        for dropout, has_gradients in ((shape.dropout, True), (0.0, False))[0 if shape.is_trained else 1 :]:
            reference = partial(layer.attend_densely, dropout) if dropout else partial(layer.loop, queries, keys)
            expected = _run(reference, [state.float() for state in states], sum(queries), has_gradients)
            found = _run(partial(layer.attend, dropout), states, sum(queries), has_gradients)
            for name, value in expected.items():
                difference = float((found[name] - value).norm() / value.norm())
                if not difference < compute_bound(name, dropout):  # it may be NaN
                    yield f"with dropout {dropout:g}, {name} of {kind} attention differs by {difference:.1%}"


def compute_bound(name: str, dropout: float) -> float:
    """Compute the largest relative norm of a result's difference that rounding explains.

    Errors of independent roundings add up like the sides of a right angle. Their average is less than half of ROUNDING,
    so the kernels' differences are 0.2% to 0.3%, and up to 0.7% with dropout, whose two calls have gradients that
    nearly cancel each other.
    """
    return ROUNDING * math.sqrt(ROUNDINGS[name] * (2 if dropout else 1))


def _make_layer(
    shape: AttentionShape, kind: str, blocks: Blocks, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], "_Layer"]:
    """Make random queries, keys and values, and a layer with a random bias."""
    heads, width = shape.num_heads, shape.head_width
    table_HR = None if kind == "cross" else torch.randn(heads, 2 * shape.max_distance + 1, device=device)
    lengths = len(blocks.query_segments), len(blocks.key_segments), len(blocks.key_segments)
    states = [torch.randn(1, length, heads, width, device=device, dtype=dtype) for length in lengths]
    states[0] *= width**-0.5  # as T5's initialization of q does
    return states, _Layer(blocks, table_HR, kind == "decoder")


def _run(attend: Callable[..., Tensor], states: list[Tensor], length: int, has_gradients: bool) -> dict[str, Tensor]:
    """Compute the output for the first `length` queries, and its gradients, in fp32. Later queries are padding."""
    leaves = [state.detach().requires_grad_(has_gradients) for state in states]
    torch.manual_seed(1)  # of dropout
    with torch.set_grad_enabled(has_gradients):
        output = attend(*(leaf.transpose(1, 2) for leaf in leaves))[:, :length]
    if not has_gradients:
        return {OUTPUT: output.float()}
    torch.manual_seed(2)
    weights = torch.randn(output.shape, device=output.device).bfloat16()  # the same in both dtypes
    gradients = torch.autograd.grad((output * weights.to(output.dtype)).sum(), leaves)
    names = OUTPUT, QUERY, KEY, VALUE
    return {name: value.float() for name, value in zip(names, (output.detach(), *gradients), strict=True)}


class _Layer(NamedTuple):
    """Three implementations of a layer's attention."""

    blocks: Blocks
    table_HR: Tensor | None
    is_causal: bool

    def attend(self, dropout: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, self.blocks, self.table_HR, self.is_causal, dropout)

    def loop(self, queries: tuple[int, ...], keys: tuple[int, ...], *states_BHLD: Tensor) -> Tensor:
        """Attend to one segment after the other, without the padding."""
        query, key, value = (
            state[:, :, : sum(lengths)] for state, lengths in zip(states_BHLD, (queries, keys, keys), strict=True)
        )
        bias = self._compute_bias(max(queries), max(keys), query.dtype)
        return segment_attention(query, key, value, list(queries), list(keys), bias, 0.0)

    def attend_densely(self, dropout: float, *states_BHLD: Tensor) -> Tensor:
        """Compute softmax and dropout with all scores in memory."""
        seeds_H = draw_seeds(states_BHLD[0])
        query_BHQD, key_BHKD, value_BHKD = states_BHLD
        length, width = query_BHQD.shape[2], key_BHKD.shape[2]
        scores_BHQK = query_BHQD @ key_BHKD.mT
        bias = self._compute_bias(length, width, torch.float32)
        scores_BHQK = scores_BHQK if bias is None else scores_BHQK + bias
        is_other_QK = self.blocks.query_segments[:, None] != self.blocks.key_segments
        probabilities_BHQK = scores_BHQK.masked_fill(is_other_QK, -torch.inf).softmax(-1)
        query, key = (torch.arange(size, device=query_BHQD.device) for size in (length, width))
        kept_HQK = compute_hash(seeds_H[:, None, None], query[:, None], key) < count_kept_hashes(dropout)
        attended_BHQD: Tensor = probabilities_BHQK * kept_HQK / (1 - dropout) @ value_BHKD
        return attended_BHQD.transpose(1, 2)

    def _compute_bias(self, length: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Compute the position bias as a matrix [1, H, length, width]."""
        if self.table_HR is None:
            return None
        device, max_distance = self.table_HR.device, self.table_HR.shape[1] // 2
        distance_QK = torch.arange(width, device=device) - torch.arange(length, device=device)[:, None]
        bias_HQK = self.table_HR[:, distance_QK.clamp(-max_distance, max_distance) + max_distance].to(dtype)
        if self.is_causal:
            bias_HQK = bias_HQK.masked_fill(distance_QK > 0, torch.finfo(dtype).min)
        return bias_HQK[None]
