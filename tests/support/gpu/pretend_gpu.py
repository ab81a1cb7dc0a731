"""Let torch's and Triton's compilers make kernels for an NVIDIA GPU, on a machine without one.

load_compilers()     # before torch is imported
pretend_gpu(90)      # compute capability 9.0
"""

import types
from typing import Any

from tests.support.gpu.fake_cuda_stubs import StubsUnavailable, load_stubs

# compute capability: (GPUs, bytes of shared memory that a kernel may take), from the CUDA Programming Guide
GPUS = {
    80: ("A100", 163 << 10),
    86: ("RTX 30, A10", 99 << 10),
    89: ("RTX 40, L4, L40S", 99 << 10),
    90: ("H100, H200", 227 << 10),
    100: ("B200", 227 << 10),
    120: ("RTX 50", 99 << 10),
}


def load_compilers() -> None:
    """Load the stubs for fake CUDA tensors, torch and Triton.

    Raises:
        StubsUnavailable: this machine can't compile for a GPU without one.
    """
    load_stubs()
    import torch
    from torch.nn.attention import flex_attention

    if torch.version.cuda is not None:
        raise StubsUnavailable("this is torch's CUDA build: t5tune doctor tries the kernels on a GPU")
    if not hasattr(flex_attention, "AuxRequest"):
        raise StubsUnavailable(f"the kernel needs torch 2.9 or newer, and this is {torch.__version__}")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise StubsUnavailable("Triton isn't installed: make build/triton/installed") from None


def pretend_gpu(capability: int) -> None:
    """Let Inductor and Triton compile for a GPU of this compute capability."""
    import torch._inductor.config as inductor_config
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import driver

    _answer_as_gpu(capability)
    driver.set_active(_make_driver(capability))
    # patterns and constants are found by computing on the device
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_, **__: None
    triton_helpers.set_driver_to_gpu = lambda: None
    inductor_config.joint_graph_constant_folding = False
    inductor_config.fx_graph_cache = False
    inductor_config.compile_threads = 1


def _answer_as_gpu(capability: int) -> None:
    """Let torch.cuda and Dynamo answer as on a machine with one GPU."""
    import torch
    import torch._dynamo.device_interface as device_interface

    name, shared_memory = GPUS[capability]
    properties = types.SimpleNamespace(
        name=name, major=capability // 10, minor=capability % 10, multi_processor_count=108, warp_size=32,
        total_memory=40 << 30, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=shared_memory,
        shared_memory_per_multiprocessor=shared_memory + 1024, gcnArchName="", L2_cache_size=40 << 20,
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


def _make_driver(capability: int) -> Any:
    """Make Triton's view of the GPU."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):  # type: ignore[misc]
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

    return Driver()
