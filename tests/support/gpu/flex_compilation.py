"""Compile attention over packed rows for an NVIDIA GPU, on a machine without one: torch's graphs, Triton's kernels.

    python -m tests.support.gpu.flex_compilation 90 64        # for compute capability 9.0, with heads of 64
    python -m tests.support.gpu.flex_compilation 89 128 2     # with two stages

Prints a JSON line: for each kind of attention, the kernels of its forward and backward pass with the bytes of shared
memory that they take, or the `error`. They are compiled to machine code, but can't run. Needs triton, which comes with
torch's CUDA builds.
"""

import json
import sys
import types
from typing import Any

from tests.support.gpu.fake_cuda_stubs import StubsUnavailable, load_stubs

HEADS, MAX_DISTANCE = 12, 128
SOURCES, TARGETS = (200, 1, 70, 330), (40, 1, 90, 412)


class _Compiled(Exception):
    """Raised in place of running what was compiled."""


def pretend_gpu(capability: int) -> dict[str, int]:
    """Let Inductor and Triton compile for a GPU of this compute capability.

    Returns:
        The kernels that are compiled from here on: name -> bytes of shared memory.
    """
    import torch
    import torch._dynamo.device_interface as device_interface
    import torch._inductor.config as inductor_config
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    properties = types.SimpleNamespace(
        name="a GPU", major=capability // 10, minor=capability % 10, multi_processor_count=108, warp_size=32,
        total_memory=40 << 30, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=163 << 10,
        shared_memory_per_multiprocessor=164 << 10, gcnArchName="", L2_cache_size=40 << 20,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None,
        "get_device_properties": properties, "_get_device_properties": properties, "is_bf16_supported": True,
        "get_device_capability": (properties.major, properties.minor), "_lazy_init": None, "set_rng_state": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(8)
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    interface: Any = device_interface.CudaInterface
    for owner, name in (
        (interface, "current_device"), (interface.Worker, "current_device"), (interface, "is_available"),
        (interface.Worker, "get_device_properties"), (interface, "synchronize"),
    ):  # fmt: skip
        setattr(owner, name, staticmethod(getattr(torch.cuda, name)))
    interface.get_compute_capability = staticmethod(lambda *_: capability)
    interface.is_triton_capable = staticmethod(lambda *_: True)
    interface.raise_if_triton_unavailable = staticmethod(lambda *_: None)
    interface.get_raw_stream = staticmethod(lambda *_: 0)

    class Driver(DriverBase):  # type: ignore[misc]
        """Triton's view of the GPU."""

        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> Any:
            return torch.device("cuda")

        def get_benchmarker(self) -> None:
            return None

    driver.set_active(Driver())
    kernels: dict[str, int] = {}

    def count(autotuner: Any) -> None:
        kernels[autotuner.fn.__name__] = autotuner.compile_results[0].kernel.shared
        launcher = types.SimpleNamespace(config=autotuner.compile_results[0].config, n_regs=0, n_spills=0, shared=0)
        autotuner.launchers = [launcher]

    def stop(*_: Any, **__: Any) -> None:
        raise _Compiled

    triton_heuristics.CachingAutotuner._make_launchers = count
    triton_helpers.set_driver_to_gpu = lambda: None
    CompiledFxGraph.__call__ = stop
    # patterns and constants are found by computing on the device
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_, **__: None
    inductor_config.joint_graph_constant_folding = False
    inductor_config.fx_graph_cache = False
    inductor_config.compile_threads = 1
    return kernels


def compile_all(capability: int, width: int, num_stages: int | None = None) -> dict[str, Any]:
    """Compile each kind of attention, with and without dropout, for heads of this width."""
    kernels = pretend_gpu(capability)
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
        for kind in ("encoder", "decoder", "cross"):
            blocks = rows.blocks[kind]
            lengths = len(blocks.query_segments), len(blocks.key_segments), len(blocks.key_segments)
            states = [
                torch.empty(1, length, HEADS, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
                for length in lengths
            ]
            table = None if kind == "cross" else torch.empty(HEADS, 2 * MAX_DISTANCE + 1, device="cuda")
            for dropout in (0.1, 0.0):
                kernels.clear()
                name = f"{kind}, dropout {dropout}"
                try:
                    queries_keys_values = [state.transpose(1, 2) for state in states]
                    flex_attention.attend(*queries_keys_values, blocks, table, kind == "decoder", dropout)
                except _Compiled:
                    found[name] = dict(sorted(kernels.items()))
                except Exception as error:
                    found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    return found


def main() -> None:
    """Compile, and print the kernels."""
    try:
        load_stubs()
        import torch
        import triton  # noqa: F401

        if torch.version.cuda is not None:
            raise StubsUnavailable("this is torch's CUDA build: t5tune doctor compiles the kernels on a GPU")
    except (StubsUnavailable, ImportError) as error:
        print(json.dumps({"unavailable": str(error)}))
        return
    print(json.dumps(compile_all(*map(int, sys.argv[1:]))))


if __name__ == "__main__":
    main()
