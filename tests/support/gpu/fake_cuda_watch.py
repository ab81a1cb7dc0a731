"""Watch what a program would do on a GPU, on fake CUDA tensors: kernel launches, waits for the GPU, copies, dtypes.

    with pretend_cuda(), FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        step()
    watch.launches, watch.waits, watch.copies, watch.products

It can't see wrong numbers, kernels that refuse a shape or stride, time, NCCL, or how much memory is really needed.
"""

import collections
import contextlib
import importlib
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t5tune.model.kernels import flex_check, fused
from t5tune.model.kernels.flex_check import KernelCheck
from t5tune.training import attention_choice

CUDA = torch.device("cuda:0")
# the package has a function of the module's name
flex_operators = importlib.import_module("torch._higher_order_ops.flex_attention")
NOT_LAUNCHED = {  # views, and what only allocates
    "view", "_unsafe_view", "transpose", "t", "permute", "slice", "split", "split_with_sizes", "expand", "unsqueeze",
    "squeeze", "select", "detach", "alias", "as_strided", "empty", "empty_like", "new_empty", "device", "unbind",
    "empty_strided", "new_empty_strided", "lift_fresh", "_local_scalar_dense", "reshape", "is_same_size",
    "_reshape_alias", "unfold", "diagonal", "view_as",
}  # fmt: skip
NUM_LAUNCHES = {"constant_pad_nd": 2, "addmm": 2}  # a fill or copy first; everything else counts as one
# kernels around FlexAttention's with dropout, as Inductor fuses them: tests/model/kernels/test_flex_compilation.py
COMPILED_FORWARD, COMPILED_BACKWARD = 1, 5
SYNCHRONIZING = {"nonzero", "masked_select", "_unique2", "unique_dim"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm"}
PACKAGES = ("/t5tune/", "/transformers/", "/accelerate/", "/peft/", "/bitsandbytes/", "/tests/support/")


class Watch(TorchDispatchMode):
    """Counts what would be launched, and notes each wait for the GPU and each copy to or from it.

    Attributes:
        launches: kernel launches by operator. FlexAttention's operators and those of t5tune count as one launch each.
        waits: places that wait for the GPU, and how often.
        copies: places that copy between CPU and GPU, and how often.
        products: matrix products by dtype.
    """

    supports_higher_order_operators = True  # flex_attention and flex_attention_backward

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        self.products: collections.Counter[str] = collections.Counter()
        self._is_paused = False
        self._fused_kernels: int | None = None

    def clear(self) -> None:
        """Forget what was noted so far."""
        for counter in (self.launches, self.waits, self.copies, self.products):
            counter.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return args[0].fake_device
        if self._is_paused:
            return function(*args, **kwargs)
        name = _get_name(function)
        devices = {leaf.device.type for leaf in _find_tensors((args, kwargs))}
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            place = f"{_find_place()} item"
            if devices == {"cuda"}:
                self.waits[place] += 1
            return _invent_value(args[0], is_over="/generation/" in place and self.waits[place] == 3)
        if name in SYNCHRONIZING and devices == {"cuda"}:
            self.waits[f"{_find_place()} {name}"] += 1
        result = _run_norm(*args) if name == "_fused_rms_norm" else function(*args, **kwargs)
        tensors = _find_tensors(result)
        for tensor in tensors:
            if devices and tensor.device.type not in devices:
                blocking = "" if kwargs.get("non_blocking") else "blocking "
                self.copies[f"{_find_place()} {blocking}copy to {tensor.device.type}"] += 1
        if name in PRODUCTS:
            self.products[str(tensors[0].dtype).removeprefix("torch.")] += 1
        if name not in NOT_LAUNCHED and "cuda" in devices | {tensor.device.type for tensor in tensors}:
            if self._fused_kernels is None or isinstance(function, torch._ops.HigherOrderOperator):
                self.launches[name] += 1 if kwargs.get("beta") == 0 else NUM_LAUNCHES.get(name, 1)
            else:
                self.launches["compiled"] += self._fused_kernels
                self._fused_kernels = 0
        return result

    @contextlib.contextmanager
    def fuse(self, num_kernels: int) -> Iterator[None]:
        """Count so many kernels for everything in this block that isn't FlexAttention's."""
        self._fused_kernels = num_kernels
        try:
            yield
        finally:
            self._fused_kernels = None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Watch nothing in this block."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def note_tolist(self, tensor: torch.Tensor) -> Any:
        """Stand in for `tolist`, which copies and waits once; FakeTensor's own does so for each element."""
        self.waits[f"{_find_place()} tolist"] += 1
        value: Any = _invent_value(tensor)
        for size in reversed(tensor.shape):
            value = [value] * size
        return value


def _invent_value(tensor: torch.Tensor, is_over: bool = False) -> bool | float | int:
    """Make up what a program reads from a fake tensor.

    No mask is all true, and no condition is met, except that generation ends after its third token.
    """
    return is_over if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _get_name(function: Any) -> str:
    if isinstance(function, torch._ops.HigherOrderOperator):
        return function.name()
    return str(function._schema.name.split("::")[1])


def _find_tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _find_place() -> str:
    """Find the innermost line of the code of t5tune or of the libraries above torch."""
    for frame in reversed(traceback.extract_stack()):
        for package in PACKAGES:
            if package in frame.filename and frame.filename != __file__:
                return f"{package[1:]}{frame.filename.rpartition(package)[2]}:{frame.lineno}"
    raise AssertionError("fake tensors are used by t5tune and the libraries alone")


def _run_norm(hidden: torch.Tensor, shape: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of the kernel of rms_norm, which a build without CUDA lacks: (output, 1 / root mean square in fp32)."""
    rows = (*hidden.shape[: -len(shape)], *[1] * len(shape))
    return torch.empty_like(hidden), hidden.new_empty(rows, dtype=torch.float32)


@contextlib.contextmanager
def pretend_cuda() -> Iterator[None]:
    """Dispatch as on an H100: torch's and transformers' Python code finds one GPU with bf16 arithmetic."""
    import transformers.masking_utils

    library = torch.library.Library("aten", "IMPL")
    if torch.version.cuda is None:
        # without a kernel for CUDA, torch would decompose rms_norm before the watch sees it
        library.impl("_fused_rms_norm", _run_norm, "CUDA")
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_available", lambda: True),
            (FakeTensorMode, "avoid_device_init", True),  # there is no GPU that could make real tensors
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "set_device", lambda _: None),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            # it spares a fake mask the wait that a real one costs
            (transformers.masking_utils, "is_tracing", lambda *_: False),
            # it would compare values, which fake tensors don't have
            (fused, "find_kernel_problem", lambda _: None),
            (attention_choice, "check_kernel", lambda *_: KernelCheck(None, None)),
            (flex_check, "find_missing_compiler", lambda **_: None),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
            (functional, "scaled_dot_product_attention", _attend),
            (FakeTensor, "tolist", lambda tensor: _get_watch().note_tolist(tensor)),
            # compiled functions run as they are: flex_attention's operators are called with fake tensors
            (torch, "compile", lambda function, **_: partial(_run_compiled, function)),
            (torch._dynamo.config, "error_on_nested_fx_trace", False),
            (flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
            (flex_operators, "create_fw_bw_graph", _trace_unwatched),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _get_watch() -> Watch:
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next(mode for mode in modes if isinstance(mode, Watch))


def _run_compiled(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function that returns one tensor, and count what torch.compile would make of it."""
    return _CompiledFunction.apply(function, args, *args)


class _CompiledFunction(torch.autograd.Function):
    """Runs a function and its backward pass as they are: FlexAttention's operators are called with fake tensors."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], args: tuple[Any, ...], *tensors: Any) -> torch.Tensor:
        is_tensor = [isinstance(arg, torch.Tensor) for arg in args]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, torch.Tensor)))
        ctx.function, ctx.args = (
            function,
            [None if is_one else arg for arg, is_one in zip(args, is_tensor, strict=True)],
        )
        ctx.is_tensor = is_tensor
        with _get_watch().fuse(COMPILED_FORWARD), torch.no_grad():
            output: torch.Tensor = function(*args)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        wants = ctx.needs_input_grad[2:]
        saved = iter(ctx.saved_tensors)
        args = [
            next(saved).detach().requires_grad_(want) if is_tensor else arg
            for arg, is_tensor, want in zip(ctx.args, ctx.is_tensor, wants, strict=True)
        ]
        with _get_watch().pause(), torch.enable_grad():  # only to have a graph
            output = ctx.function(*args)
        with _get_watch().fuse(COMPILED_BACKWARD):
            found = iter(
                torch.autograd.grad(output, [arg for arg, want in zip(args, wants, strict=True) if want], *grads)
            )
        return None, None, *(next(found) if want else None for want in wants)


_create_graphs = flex_operators.create_fw_bw_graph


def _trace_unwatched(*args: Any, **kwargs: Any) -> Any:
    """Trace a score_mod for FlexAttention's backward pass, which happens once, when it is compiled."""
    with _get_watch().pause():
        return _create_graphs(*args, **kwargs)


def _attend(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, **_: Any,
) -> Any:  # fmt: skip
    """Dispatch as torch 2.13 does on CUDA for a call with a bias: to the memory-efficient kernel.

    Like torch's C++ (preprocess_mask in aten/src/ATen/native/transformers/attention.cpp), it pads a bias whose strides
    aren't multiples of 8.
    """
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
        if any(stride % 8 for stride in attn_mask.stride()[:-1]) or attn_mask.stride(-1) != 1:
            width = attn_mask.shape[-1]
            attn_mask = functional.pad(attn_mask, (0, 8 - width % 8))[..., :width]
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale
    )[0]
