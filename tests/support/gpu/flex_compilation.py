"""Compile attention over packed rows for an NVIDIA GPU, on a machine without one: torch's graphs, Triton's kernels.

    python -m tests.support.gpu.flex_compilation 90 64                  # for compute capability 9.0, with heads of 64
    python -m tests.support.gpu.flex_compilation 89 128 --stages 2 --only "decoder, dropout 0.1" --sizes

Prints a JSON line: for each kind of attention, the kernels of its forward and backward pass with the bytes of shared
memory that they take, or the `error`. They are compiled to machine code, but can't run. With `--sizes`, compilation
ends when the size is known: for B200, LLVM takes minutes.
"""

import argparse
import json
import types
from collections.abc import Collection
from typing import Any

from tests.support.gpu.fake_cuda_stubs import StubsUnavailable
from tests.support.gpu.pretend_gpu import load_compilers, pretend_gpu

HEADS, MAX_DISTANCE = 12, 128
KINDS = [f"{kind}, dropout {dropout}" for kind in ("encoder", "decoder", "cross") for dropout in (0.1, 0.0)]
SOURCES, TARGETS = (200, 1, 70, 330), (40, 1, 90, 412)


class _Compiled(Exception):
    """Raised in place of running what was compiled."""


def count_kernels() -> dict[str, int]:
    """Compile kernels, but don't run them.

    Returns:
        The kernels that are compiled from here on: name -> bytes of shared memory.
    """
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime import triton_heuristics

    kernels: dict[str, int] = {}

    def count(autotuner: Any) -> None:
        kernels[autotuner.fn.__name__] = autotuner.compile_results[0].kernel.shared
        launcher = types.SimpleNamespace(config=autotuner.compile_results[0].config, n_regs=0, n_spills=0, shared=0)
        autotuner.launchers = [launcher]

    def stop(*_: Any, **__: Any) -> None:
        raise _Compiled

    triton_heuristics.CachingAutotuner._make_launchers = count
    CompiledFxGraph.__call__ = stop
    return kernels


def leave_out_machine_code() -> None:
    """Let Triton compile only until the size of the shared memory is known."""
    from triton._C.libtriton import llvm
    from triton.backends.nvidia.compiler import CUDABackend

    def make_ptx(_: Any, source: Any, metadata: dict[str, Any], *options: Any) -> str:
        metadata["name"] = "kernel"
        return ""

    llvm.optimize_module = lambda *_: None
    CUDABackend.make_ptx, CUDABackend.make_cubin = make_ptx, lambda *_: b""
    CUDABackend.hash = lambda _: "without LLVM"  # in Triton's cache


def compile_all(
    capability: int, width: int, num_stages: int | None = None, kinds: Collection[str] = KINDS
) -> dict[str, Any]:
    """Compile these kinds of attention for heads of this width."""
    pretend_gpu(capability)
    kernels = count_kernels()
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from t5tune.model.kernels import flex_attention
    from t5tune.model.kernels.flex_attention import PackedRows, divide_rows

    found: dict[str, Any] = {}
    planned = divide_rows(SOURCES, TARGETS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        size = len(planned.buffer)
        buffer = torch.empty(size, dtype=torch.int32, device="cuda")
        rows = PackedRows(planned.source_length, planned.target_length, buffer, num_stages)
        for name in kinds:
            kind, dropout = name.split(", dropout ")
            blocks = rows.blocks[kind]
            lengths = len(blocks.query_segments), len(blocks.key_segments), len(blocks.key_segments)
            states = [
                torch.empty(1, length, HEADS, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
                for length in lengths
            ]
            table = None if kind == "cross" else torch.empty(HEADS, 2 * MAX_DISTANCE + 1, device="cuda")
            kernels.clear()
            try:
                queries_keys_values = [state.transpose(1, 2) for state in states]
                flex_attention.attend(*queries_keys_values, blocks, table, kind == "decoder", float(dropout))
            except _Compiled:
                found[name] = dict(sorted(kernels.items()))
            except Exception as error:
                found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    return found


def main() -> None:
    """Compile, and print the kernels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("capability", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("--stages", type=int)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--sizes", action="store_true")
    options = parser.parse_args()
    try:
        load_compilers()
    except StubsUnavailable as error:
        print(json.dumps({"unavailable": str(error)}))
        return
    if options.sizes:
        leave_out_machine_code()
    kinds = [options.only] if options.only else KINDS
    print(json.dumps(compile_all(options.capability, options.width, options.stages, kinds)))


if __name__ == "__main__":
    main()
