"""CPU memory for fake tensors on a GPU, in which compiled code can compute.

    memory = FakeMemory()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = memory.move(tensor)            # "cuda"
        output = compiled(fake)               # Triton's interpreter runs the kernels
    memory.read(output)

Import it after `load_stubs` (see fake_cuda_stubs.py).
"""

import contextlib
from typing import Any

import torch
import torch._C._dynamo.guards as guards
from torch import Tensor
from torch._inductor.output_code import CompiledFxGraph
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

ALIGNMENT = 16  # bytes


class FakeMemory:
    """The CPU's memory of each storage on the GPU. Making it lets compiled graphs compute in it.

    Attributes:
        num_unaligned: how many inputs of graphs begin at an unaligned address: kernels that were compiled for aligned
            inputs copy them first.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._fakes: list[Tensor] = []  # a later storage would have the address of one that is freed
        self.num_unaligned = 0
        self.mirror = _Mirror(self)
        CompiledFxGraph.__call__ = lambda graph, inputs: self._run(graph, inputs)
        # the code that Inductor generates imports this
        guards._empty_strided_cuda = guards._empty_strided_cpu
        torch.cuda._DeviceGuard = lambda _: contextlib.nullcontext()

    def move(self, tensor: Tensor) -> Tensor:
        """Make a fake tensor for a dense one."""
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda")
        self.bind(fake, tensor)
        return fake

    def read(self, fake: Tensor) -> Tensor:
        """Return the values of a fake tensor, or of a view."""
        tensor = self._tensors[fake.untyped_storage()._cdata]
        with _disable_current_modes():
            return tensor.as_strided(fake.size(), fake.stride(), tensor.storage_offset() + fake.storage_offset())

    def bind(self, fake: Tensor, tensor: Tensor) -> None:
        self._tensors[fake.untyped_storage()._cdata] = tensor
        self._fakes.append(fake)

    def has(self, fake: Tensor) -> bool:
        return fake.untyped_storage()._cdata in self._tensors

    def _run(self, graph: Any, inputs: list[Any]) -> tuple[Any, ...]:
        given = [self.read(value) if isinstance(value, Tensor) else value for value in inputs]
        inputs.clear()
        self.num_unaligned += sum(value.data_ptr() % ALIGNMENT != 0 for value in given if isinstance(value, Tensor))
        with _disable_current_modes():
            outputs = graph.current_callable(given)
        return tuple(self.move(value) if isinstance(value, Tensor) else value for value in outputs)


class _Mirror(TorchDispatchMode):
    """Computes each operation on fake tensors in their memory, too: autograd's, outside of compiled graphs."""

    def __init__(self, memory: FakeMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        found_args, found_kwargs = tree_map(self._find, (args, kwargs or {}))
        with _disable_current_modes():
            real = function(*found_args, **found_kwargs)
        if isinstance(result, Tensor) and not self._memory.has(result):
            self._memory.bind(result, real)
        return result

    def _find(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._memory.read(value)
        return torch.device("cpu") if isinstance(value, torch.device) else value
