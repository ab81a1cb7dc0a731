"""Run attention over packed rows as torch compiles it for a GPU: its Triton kernels, in Triton's interpreter on a CPU.

    python -m tests.support.gpu.flex_interpreter encoder "decoder, dropout" --width 128     # some of CASES

Prints a JSON line: for each case the relative norms of the errors of the output and of the gradients, compared with
attention that is computed segment by segment in fp64, and `unaligned` (see FakeMemory).
"""

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from tests.support.gpu.fake_cuda_stubs import StubsUnavailable
from tests.support.gpu.pretend_gpu import load_compilers, pretend_gpu
from tests.support.gpu.triton_interpreter import correct_bf16

CAPABILITY, TILED_WIDTH = 80, 64
MAX_DISTANCE = 32
SEEDS = (0x1234567, -0x7654321)  # a head each


@dataclass(frozen=True)
class Case:
    """A layer's attention over a row.

    Args:
        kind: encoder, decoder or cross.
        targets_per_source: 2 for preference pairs.
    """

    kind: str
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    dropout: float = 0.0
    has_gradients: bool = False
    targets_per_source: int = 1
    dtype: str = "float32"
    width: int = 16

    @property
    def targets_by_source(self) -> tuple[int, ...]:
        step = self.targets_per_source
        return tuple(sum(self.targets[start : start + step]) for start in range(0, len(self.targets), step))


# segments longer than a block or two, short ones, some that cross the end of a block, and padding: three blocks each
LONG = (200, 130, 1, 33), (260, 1, 90, 12)
CHECKED = (200, 1, 70, 33), (40, 1, 90, 12)  # those of the check before a run
MANY = (1,) * 150 + (2,) * 110  # 260 segments
PAIRS = (300, 70), (100, 30, 9, 200)
SHORT = (140, 1, 33), (130, 1, 12)  # likewise, in two blocks each
KINDS = "encoder", "decoder", "cross"
SHORT_CASES = {
    "encoder": Case("encoder", *SHORT),
    "decoder, dropout": Case("decoder", *SHORT, dropout=0.2),
    "cross, pairs": Case("cross", (140, 33), (60, 30, 9, 130), targets_per_source=2),
}
LONG_CASES = {
    f"{kind}, {name}, dropout {dropout}": Case(kind, *rows, dropout, has_gradients=True)
    for kind in KINDS
    for name, rows in (("long", LONG), ("many", (MANY, MANY[::-1])))
    for dropout in (0.0, 0.2)
} | {
    **{f"cross, pairs, dropout {dropout}": Case("cross", *PAIRS, dropout, True, 2) for dropout in (0.0, 0.2)},
    "decoder, wide": Case("decoder", *LONG, dropout=0.2, has_gradients=True, width=64),
}
BF16_CASES = {
    f"{kind}, bf16, dropout {dropout}": Case(kind, *CHECKED, dropout, has_gradients=True, dtype="bfloat16")
    for kind in KINDS
    for dropout in (0.0, 0.2)
}
CASES = SHORT_CASES | LONG_CASES | BF16_CASES


def set_up() -> None:
    """Let torch compile for a GPU, and Triton interpret."""
    pretend_gpu(CAPABILITY)
    import torch
    import triton.language as tl
    from torch._inductor.runtime.triton_helpers import libdevice
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    # the tiles of a run: those of fp32 and of narrow heads are smaller, and take the interpreter ten times as long
    for name in ("get_flex_attn_fwd_configs", "get_flex_attn_bwd_configs"):
        choose = getattr(CUDAConfigHeuristic, name)
        setattr(CUDAConfigHeuristic, name, lambda self, *_, choose=choose: choose(self, TILED_WIDTH, torch.bfloat16))
    libdevice.exp = lambda value: tl.exp(value)  # the interpreter lacks the functions of CUDA's library
    correct_bf16()


def run(case: Case) -> dict[str, float]:
    """Run a case after `set_up`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from t5tune.model.kernels import flex_attention
    from tests.support.gpu.fake_memory import FakeMemory

    torch.manual_seed(0)
    dtype, heads = getattr(torch, case.dtype), len(SEEDS)
    planned = flex_attention.divide_rows(case.sources, case.targets, case.targets_by_source)
    source, target = planned.source_length, planned.target_length
    queries, keys = {"encoder": (source, source), "decoder": (target, target), "cross": (target, source)}[case.kind]
    states = [torch.randn(1, length, heads, case.width) for length in (queries, keys, keys)]
    states[0] *= case.width**-0.5  # as T5's initialization of q does
    states, gradient = [state.to(dtype) for state in states], torch.randn(1, queries, heads, case.width).to(dtype)
    table = None if case.kind == "cross" else torch.randn(heads, 2 * MAX_DISTANCE + 1)
    seeds, buffer = torch.tensor(SEEDS, dtype=torch.int32), planned.buffer.clone()  # in torch's aligned memory
    memory = FakeMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), nullcontext() if case.has_gradients else torch.no_grad():
        flex_attention.draw_seeds = lambda _: memory.move(seeds)
        fakes = [memory.move(state).requires_grad_(case.has_gradients) for state in states]
        fake_table = None if table is None else memory.move(table)
        blocks = replace(planned, buffer=memory.move(buffer)).blocks[case.kind]
        output = flex_attention.attend(
            *(fake.transpose(1, 2) for fake in fakes), blocks, fake_table, case.kind == "decoder", case.dropout
        )
        results = {"output": memory.read(output)}
        if case.has_gradients:
            incoming = memory.move(gradient)
            with memory.mirror:
                found = torch.autograd.grad(output, fakes, incoming)
            results |= dict(zip(("query", "key", "value"), map(memory.read, found), strict=True))
    expected = attend_in_fp64(case, states, table, gradient)
    errors = {name: float((each - expected[name]).norm() / expected[name].norm()) for name, each in results.items()}
    return {**errors, "unaligned": memory.num_unaligned}


def attend_in_fp64(case: Case, states: Sequence[Any], table: Any, gradient: Any) -> dict[str, Any]:
    """Compute the output and the gradients segment by segment. The padding at a row's end is a segment, too."""
    import torch

    query, key, value = leaves = [state.double().requires_grad_() for state in states]
    ends = query.shape[1], key.shape[1]
    lengths = {"encoder": case.sources, "decoder": case.targets, "cross": case.targets_by_source}[case.kind]
    pairs = zip(lengths, case.sources if case.kind == "cross" else lengths, strict=True)
    outputs, first, start = [], 0, 0
    for num_queries, num_keys in (*pairs, (None, None)):
        last = ends[0] if num_queries is None else first + num_queries
        stop = ends[1] if num_keys is None else start + num_keys
        rows, columns = torch.arange(first, last)[:, None], torch.arange(start, stop)
        scores = query[0, first:last].transpose(0, 1) @ key[0, start:stop].permute(1, 2, 0)
        if table is not None:
            scores = scores + table.double()[:, (columns - rows).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]
        if case.kind == "decoder":
            scores = scores.masked_fill(columns > rows, -torch.inf)
        probabilities, kept_hashes = scores.softmax(-1), round((1 - case.dropout) * 2**24)
        if case.dropout:
            is_kept = torch.stack([compute_hash(seed, rows, columns) < kept_hashes for seed in SEEDS])
            probabilities = probabilities * is_kept * 2**24 / kept_hashes
        outputs.append((probabilities @ value[0, start:stop].transpose(0, 1)).transpose(0, 1))
        first, start = last, stop
    output = torch.cat(outputs)[None]
    gradients = torch.autograd.grad(output, leaves, gradient.double())
    return {"output": output.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


def compute_hash(seed: int, rows: Any, columns: Any) -> Any:
    """Compute lowbias32 in 64 bits, as its author defines it for unsigned numbers of 32 bits (Wellons 2018)."""
    mask = 2**32 - 1
    x = (seed + rows * 0x9E3779B1 + columns * 0x85EBCA77) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return (x ^ (x >> 16)) & 0xFFFFFF


def main() -> None:
    """Run cases, and print their errors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--width", type=int)
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    try:
        load_compilers()
    except StubsUnavailable as error:
        print(json.dumps({"unavailable": str(error)}))
        return
    set_up()
    cases = {name: CASES[name] for name in options.names or CASES}
    if options.width is not None:
        cases = {name: replace(case, width=options.width) for name, case in cases.items()}
    print(json.dumps({name: run(case) for name, case in cases.items()}))


if __name__ == "__main__":
    main()
