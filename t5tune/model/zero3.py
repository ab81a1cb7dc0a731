"""ZeRO-3: partition a model's parameters among the ranks while it is loaded (Rajbhandari et al. 2020).

    partitioner = Zero3Partitioner(deepspeed_config, torch.bfloat16)
    model = load_base(base, torch.bfloat16, device, settings, partitioner=partitioner)
    model, _ = add_lora(model, base, settings, token_ids, torch.bfloat16, partitioner)
    partitioner.partition_model(model)

Rank 0 reads a tensor; DeepSpeed broadcasts it, keeps each rank's partition and frees the rest. Only then does rank 0
read the next tensor. So a rank needs memory for no more than its share of the base and the largest tensor. Sharding in
`from_pretrained`, as transformers does with DeepSpeed, replaces Flan-T5's untied head with its embedding.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from t5tune.compat.peft_patches import gather_in_peft
from t5tune.errors import T5TuneError
from t5tune.model.device import get_free_memory
from t5tune.model.loss import TargetLoss, read_head_weights

Value = TypeVar("Value")
HOLDER = -1  # in place of the number of a module that uses a parameter
LARGE_WEIGHT_BYTES = 8 << 20  # a transfer of this size takes far longer than its start


class Zero3Partitioner:
    """Partitions parameters among the ranks of the process group. Every rank must call it in the same order.

    Args:
        configuration: a DeepSpeed config with ZeRO stage 3.
        dtype: dtype of the model.
    """

    def __init__(self, configuration: dict[str, Any], dtype: torch.dtype) -> None:
        import deepspeed

        zero = {key: value for key, value in configuration["zero_optimization"].items() if value != "auto"}
        # Otherwise DeepSpeed permanently replaces torch.nn.functional.linear in this process with a function that keeps
        # the input of every frozen layer for the backward pass, which _release_gathered_weights makes needless. Only
        # the config can turn this off: in 0.19, the argument of Init with the same name has no effect.
        zero["memory_efficient_linear"] = False
        self._configuration = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        first = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=dtype))])
        # not entered as a context, which would patch the constructors of all modules
        deepspeed.zero.Init(module=first, config_dict_or_path=self._configuration, dtype=dtype)
        self._convert = first[0].convert_to_zero_parameters
        self.is_rank_0 = dist.get_rank() == 0

    def ask_rank_0(self, question: Callable[[], bool]) -> bool:
        """Return rank 0's answer on every rank. All ranks raise a T5TuneError that `question` raises."""
        answer = torch.tensor(int(self.run_only_on_rank_0(question) or False))
        dist.broadcast(answer, 0)
        return bool(answer)

    def run_only_on_rank_0(self, act: Callable[[], Value]) -> Value | None:
        """Call `act` on rank 0, and return its result there, and None on other ranks.

        All ranks raise a T5TuneError that `act` raises, so that they don't wait for a failed rank 0.
        """
        found: Value | None = None
        failure: list[T5TuneError | None] = [None]
        if self.is_rank_0:
            try:
                found = act()
            except T5TuneError as error:
                failure = [error]
        dist.broadcast_object_list(failure, 0)
        if failure[0] is not None:
            raise failure[0]
        return found

    def broadcast(self, values: torch.Tensor) -> None:
        """Copy rank 0's values to all ranks, in place."""
        dist.broadcast(values, 0)

    def partition(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace whole parameters by this rank's partitions of rank 0's values, in place."""
        self._convert(list(parameters))

    def gather(self, parameters: Iterable[nn.Parameter]) -> Any:
        """Make these parameters whole on every rank for a block. Changes to them are lost."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    def prepare_peft(self) -> AbstractContextManager[None]:
        """Let PEFT add adapters in this block: it gathers the weights that it needs, one layer at a time."""
        return gather_in_peft()

    def partition_model(self, model: Any) -> None:
        """Partition the parameters that are still whole, and set up how ZeRO-3 gathers the model's parameters."""
        import deepspeed

        self.partition(model.parameters())
        # Gather a block's weights at once. Otherwise DeepSpeed runs hooks in Python for each of PEFT's small modules.
        names = model.architecture.block_classes
        blocks = {type(module) for module in model.modules() if type(module).__name__.endswith(names)}
        deepspeed.utils.set_z3_leaf_modules(model, sorted(blocks, key=str))
        _register_external_parameters(model)
        _release_gathered_weights(model)
        for parameter in model.parameters():
            parameter.all_gather_coalesced = partial(_gather_large_weights_alone, parameter.all_gather_coalesced)

    def set_up_inference(self, model: nn.Module) -> Any:
        """Let the forward passes of a partitioned model gather its weights. For training, the Trainer does this.

        Returns:
            DeepSpeed's engine, which must exist as long as the model is used.
        """
        import deepspeed

        with redirect_stdout(io.StringIO()):  # stdout is for results only
            return deepspeed.initialize(model=model, config=self._configuration)[0]


@contextmanager
def gather_decoder(model: Any) -> Iterator[None]:
    """Keep the decoder's weights gathered for this block, if all ranks have enough memory. Every rank calls this.

    Otherwise ZeRO-3 gathers them again for each token.
    """
    named = model.named_parameters(remove_duplicate=False)  # the decoder may share its embedding with the encoder
    encoder = f".{model.architecture.encoder_module}."
    in_decoder = {id(value): value for name, value in named if hasattr(value, "ds_id") and encoder not in f".{name}"}
    parameters: list[Any] = list(in_decoder.values())
    if not parameters or not _have_room(parameters):
        yield
        return
    import deepspeed  # only where there are partitioned parameters: it isn't installed everywhere

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        for parameter in parameters:  # DeepSpeed frees parameters that no module uses
            parameter.ds_active_sub_modules.add(HOLDER)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(HOLDER)


def _have_room(parameters: list[Any]) -> bool:
    """Whether the whole parameters take at most half of each rank's free memory."""
    device = parameters[0].device
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = get_free_memory() // dist.get_world_size()
    needed = sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
    has_room = torch.tensor(int(2 * needed <= free))
    dist.all_reduce(has_room, dist.ReduceOp.MIN)
    return bool(has_room)


def _register_external_parameters(model: Any) -> None:
    """Make ZeRO-3 gather parameters that are used outside of the forward pass of the module that owns them."""
    import deepspeed

    head = read_head_weights(model.get_output_embeddings())
    for module in model.modules():
        if isinstance(module, TargetLoss) and head is not None:
            if head.weight_VD.requires_grad:
                deepspeed.zero.register_external_parameter(module, head.weight_VD)
            else:  # the backward pass rarely reads it; _read_saved gathers it then
                module.forward = partial(_forward_with, model, head.weight_VD, module.forward)  # type: ignore[method-assign]
            if head.rows_KD is not None:
                deepspeed.zero.register_external_parameter(module, head.rows_KD)
        # the ParameterDict with the embedding rows of added tokens has no forward, so ZeRO-3 has no hook to gather them
        rows = getattr(module, "trainable_tokens_delta", None)
        if isinstance(rows, nn.ParameterDict):
            for row in rows.values():
                deepspeed.zero.register_external_parameter(module, row)
        # DoRA's module owns only the magnitudes, but its forward reads the weights of three other modules
        for name, norms in getattr(module, "lora_magnitude_vector", {}).items():
            for read in (module.get_base_layer(), module.lora_A[name], module.lora_B[name]):
                deepspeed.zero.register_external_parameter(norms, read.weight)


def _forward_with(model: Any, weight: Any, original_forward: Callable[..., Any], *arguments: Any) -> Any:
    """Call a forward while one weight more is gathered."""
    with _gather_again(model, weight):
        return original_forward(*arguments)


def _gather_large_weights_alone(gather: Callable[..., Any], parameters: Iterable[Any], **options: Any) -> Any:
    """Begin to gather several partitioned parameters; return DeepSpeed's handle to wait for them.

    DeepSpeed gathers several parameters into one buffer, and then copies each out of it. A parameter alone is gathered
    into its own memory, so the embedding, and the matrices of wide models, aren't copied.
    """
    from deepspeed.runtime.zero.partition_parameters import MultipleAllGatherHandles

    groups: dict[int, list[Any]] = {}
    for parameter in sorted(parameters, key=lambda each: each.ds_id):  # all ranks gather in the same order
        is_large = parameter.ds_numel * parameter.element_size() >= LARGE_WEIGHT_BYTES
        groups.setdefault(parameter.ds_id if is_large else HOLDER, []).append(parameter)
    return MultipleAllGatherHandles([gather(group, **options) for group in groups.values()])


class _SavedWeight(NamedTuple):
    """A view of a partitioned parameter that the backward pass needs, without its values.

    The offset is relative to the parameter, whose place in a buffer differs between gathers.
    """

    parameter: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _release_gathered_weights(model: Any) -> None:
    """Let the forward pass keep no gathered weights for the backward pass, which gathers them again.

    torch's operations save views of the weights that they read. DeepSpeed frees a block's weights after its forward
    pass, but a saved view keeps them in memory, so that each rank would have the whole model before the backward pass.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and isinstance(module, nn.Linear):  # bitsandbytes', not PEFT's
            module.forward = partial(_forward_4bit, module, module.forward)  # type: ignore[method-assign]
    original_forward, read_saved = model.forward, partial(_read_saved, model)

    @wraps(original_forward)  # transformers and PEFT read the names of its arguments
    def forward(*arguments: Any, **inputs: Any) -> Any:
        with saved_tensors_hooks(_save_without_weights, read_saved):
            return original_forward(*arguments, **inputs)

    model.forward = forward


def _save_without_weights(tensor: torch.Tensor) -> torch.Tensor | _SavedWeight:
    parameter = tensor if tensor._base is None else tensor._base
    if hasattr(parameter, "ds_id"):
        offset = int(tensor.storage_offset()) - int(parameter.storage_offset())
        return _SavedWeight(parameter, tensor.size(), tensor.stride(), offset)
    return tensor.detach()  # an output refers to its operation, which would refer to this output: both would stay


def _read_saved(model: Any, saved: torch.Tensor | _SavedWeight) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    # DeepSpeed's hooks gather a block's weights before its backward pass, but not if its output has no gradient
    with _gather_again(model, saved.parameter) as values:
        return values.as_strided(saved.size, saved.stride, values.storage_offset() + saved.offset)


def _gather_now(parameter: Any) -> None:
    """Gather a parameter. On a CPU, gloo's all-gather needs its memory twice, but a broadcast writes in place."""
    if parameter.device.type != "cpu":
        parameter.all_gather()
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    part = parameter.ds_tensor
    whole = torch.empty(part.ds_numel * dist.get_world_size(), dtype=part.dtype)
    for rank, share in enumerate(whole.view(-1, part.ds_numel)):
        if rank == dist.get_rank():
            share.copy_(part)
        dist.broadcast(share, rank)
    parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
    parameter.ds_status = ZeroParamStatus.AVAILABLE


@contextmanager
def _gather_again(model: Any, parameter: Any) -> Iterator[torch.Tensor]:
    """Gather a parameter for this block, unless DeepSpeed has already gathered it; yield its whole values."""
    is_partitioned = parameter.ds_status.name == "NOT_AVAILABLE"
    if is_partitioned:
        _gather_now(parameter)
    elif parameter.ds_status.name == "INFLIGHT":  # DeepSpeed began to gather it for a later block
        model.ds_inflight_param_registry.pop(parameter).wait()
    try:
        yield parameter.data
    finally:
        if is_partitioned:
            parameter.partition()


def _forward_4bit(
    module: Any, original_forward: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> torch.Tensor:
    """Forward of bitsandbytes' Linear4bit, whose autograd function would keep the packed weight."""
    if module.bias is not None or not torch.is_grad_enabled():
        return original_forward(hidden)
    output: torch.Tensor = _Linear4bit.apply(  # type: ignore[no-untyped-call]
        hidden.to(module.compute_dtype), module.weight, module.weight.quant_state
    )
    return output.to(hidden.dtype)


class _Linear4bit(torch.autograd.Function):
    """A product with a frozen weight in 4 bits, as bitsandbytes computes it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: Any, state: Any) -> torch.Tensor:
        import bitsandbytes

        ctx.save_for_backward(weight)
        ctx.state = state
        output: torch.Tensor = bitsandbytes.matmul_4bit(hidden, weight, quant_state=state)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        from bitsandbytes.functional import dequantize_4bit

        (weight,) = ctx.saved_tensors
        return grads[0] @ dequantize_4bit(weight.view(-1, 1), ctx.state).to(grads[0].dtype), None, None
