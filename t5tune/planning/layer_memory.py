"""Measure the memory of a model and of a training step, from config.json alone.

    model = build_empty_training_model(architecture, settings, num_token_rows=19, deepspeed=False)
    lengths = BatchLengths(sources=(512,) * 8, targets=(128,) * 8)
    step = measure_step(model, lengths, settings, on_gpu=True, reentrant=False, autocast=True)

The step runs on empty tensors, which have shapes but no data: the real model, adapters, loss and backward pass, while
every live storage is counted. So no per-layer formulas must be kept in sync with the model. An adapter's step runs on
two and on three blocks of encoder and decoder, and each further block is assumed to need as much as the third block.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t5tune.checkpoints.adapter import PEFT_PREFIX
from t5tune.compat.torch_patches import replace_attention_kernel
from t5tune.families.architecture import WEIGHT_KINDS, Architecture
from t5tune.model.attention.packing import can_pack, switch_off_attention_dropout, switch_off_dropout, use_packing
from t5tune.model.attention.segments import Segments
from t5tune.model.kernels import fused
from t5tune.model.load import build_empty_model, find_quantizable_linears
from t5tune.model.lora import add_lora
from t5tune.model.loss import use_gpu_chunks
from t5tune.settings.groups.base import QuantizationSettings
from t5tune.settings.groups.memory import MemorySettings

# bitsandbytes' 4-bit formats: weights per scale, and with double quantization scales per outer scale
BLOCK_SIZE, OUTER_BLOCK_SIZE = 64, 256
# blocks keep nothing for the next block; the first block computes the shared position bias
BLOCKS_WITHOUT_GRADIENTS = 2
MEASURED_BLOCKS = 2  # with fewer blocks, tensors outside of the blocks may take the most memory
MAX_SEGMENTS = 64


@dataclass(frozen=True)
class BatchLengths:
    """Lengths of the examples in a micro-batch, in tokens, including their EOS tokens."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step needs in addition to the weights: gradients, and temporary tensors (activations)."""

    gradients: int
    activations: int


def build_empty_training_model(
    architecture: Architecture, settings: MemorySettings, num_token_rows: int, deepspeed: bool
) -> Any:
    """Build the model that `train` would train, on the meta device.

    Args:
        num_token_rows: number of trained added-token embeddings.
        deepspeed: whether DeepSpeed trains it: its optimizer keeps the fp32 master weights of the adapters.
    """
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    adapter_dtype = dtype if deepspeed else torch.float32
    is_full = settings.train_mode == "full"
    with torch.device("meta"):
        model = build_empty_model(architecture, adapter_dtype if is_full else dtype, architecture.is_tied)
        model.requires_grad_(is_full)
        if not is_full:
            # non-default initializations need the weights' values
            lora_settings = settings.model_copy(update={"init_lora_weights": "default"})
            last = architecture.dimensions.num_rows - 1
            rows = list(range(last - num_token_rows, last)) if architecture.token_row_modules else []
            model, _ = add_lora(model, None, lora_settings, rows, adapter_dtype)
    if settings.packing != "off" and can_pack(model):
        use_packing(model)
    if not settings.has_dropout:
        switch_off_dropout(model)
    if not settings.has_attention_dropout:
        switch_off_attention_dropout(model)
    fused.use_fused_layers(model)
    return model.train()


def count_weight_bytes(model: Any, quantization: QuantizationSettings) -> dict[str, int]:
    """Count the bytes of the base's tensors, by kind, as `load_base` would store them."""
    quantizable = find_quantizable_linears(model, quantization) if quantization.q_lora else {}
    sizes = dict.fromkeys(WEIGHT_KINDS, 0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "trainable_tokens" in name or "modules_to_save" in name:
            continue
        if name.rpartition(".")[0] in quantizable:
            size = count_quantized_bytes(parameter.numel(), parameter.shape[0], quantization)
        else:
            size = parameter.numel() * parameter.element_size()
        sizes[model.architecture.classify(name.removeprefix(PEFT_PREFIX))] += size
    return sizes


def count_quantized_bytes(count: int, rows: int, quantization: QuantizationSettings) -> int:
    """Count the bytes of a matrix of `count` weights in bitsandbytes' format, including scales and code tables."""
    if quantization.quant_type == "int8":
        return count + 4 * rows
    blocks = -(-count // BLOCK_SIZE)
    size = count // 2 + 16 * 4  # the table of the 16 values of 4 bits
    if not quantization.double_quant:
        return size + 4 * blocks
    return size + blocks + 4 * -(-blocks // OUTER_BLOCK_SIZE) + 256 * 4 + 4


def measure_step(
    model: Any, lengths: BatchLengths, settings: MemorySettings, on_gpu: bool, reentrant: bool, autocast: bool
) -> StepMemory:
    """Run the forward and backward pass of a step on empty tensors, and count live memory.

    Args:
        on_gpu: whether attention is a fused kernel that stores no scores; on a CPU with dropout it stores them.
        reentrant: the variant of gradient checkpointing.
        autocast: whether the forward pass uses mixed precision, as it does without DeepSpeed.
    """
    with _use_empty_tensors(model, on_gpu):
        with _EmptyTensors():
            inputs = _make_inputs(model, lengths, settings)
        if model.label_task is None:
            inputs |= {"reduction": "sum", "label_smoothing": settings.label_smoothing_factor, "use_cache": False}
        if settings.gradient_checkpointing:
            model.enable_input_require_grads()
            # transformers 5 renamed the method
            new = hasattr(model, "activation_checkpointing_enable")
            name = "activation_checkpointing" if new else "gradient_checkpointing"
            getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})
        uses_autocast = autocast and settings.bf16
        counts = [len(blocks) for blocks in find_blocks(model)]
        if settings.train_mode == "full":  # the peak may be in the middle of the backward pass
            activations = _measure_activations(model, inputs, uses_autocast)
        else:
            activations = _extrapolate(lambda kept: _measure_activations(model, inputs, uses_autocast, kept), counts)
    return StepMemory(_count_gradients(model), activations + _count_unpacked_bytes(model, settings))


def _extrapolate(measure: Callable[[list[int]], int], counts: list[int]) -> int:
    """Compute `measure(counts)` from its values for few blocks, since it is linear in each count."""
    few = [min(count, MEASURED_BLOCKS) for count in counts]
    total = measured = measure(few)
    if len(set(counts)) == 1:
        missing = {tuple(count + 1 for count in few): counts[0] - few[0]}  # both at once: one fewer measurement
    else:
        missing = {
            (*few[:index], few[index] + 1, *few[index + 1 :]): counts[index] - few[index]
            for index in range(len(counts))
        }
    for more, count in missing.items():
        if count:
            total += count * (measure([*more]) - measured)
    return total


def _measure_activations(model: Any, inputs: dict[str, Any], autocast: bool, kept: list[int] | None = None) -> int:
    """Run a step on the first `kept` blocks of encoder and decoder (None: all blocks).

    Return the peak of live bytes in addition to weights and gradients.
    """
    with _keep_few_blocks(model, kept) if kept else nullcontext():
        with _EmptyTensors(model.parameters()) as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                total = model(**inputs)
            if model.label_task is not None:  # the losses of all labels take as much
                total = total.logsumexp(-1).sum()
            total.backward()
            del total
        peak: int = live.peak - _count_gradients(model)
        return max(0, peak)


def _count_gradients(model: Any) -> int:
    size: int = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return size


def measure_losses_memory(
    model: Any, lengths: BatchLengths, settings: MemorySettings, on_gpu: bool, autocast: bool
) -> int:
    """Run the forward pass of an evaluation on empty tensors; return the peak of live bytes."""
    few = [BLOCKS_WITHOUT_GRADIENTS for _ in find_blocks(model)]
    with _use_empty_tensors(model, on_gpu), _keep_few_blocks(model, few):
        with _EmptyTensors():
            inputs = _make_inputs(model, lengths, settings)
        if model.label_task is None:
            inputs |= {"use_cache": False, "reduction": "none"}
        model.eval()
        live = _EmptyTensors(model.parameters())
        with live, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast and settings.bf16):
            model(**inputs)
        model.train()
    return live.peak + _count_unpacked_bytes(model, settings)


def find_blocks(model: Any) -> list[nn.ModuleList]:
    """Find the blocks of the encoder and of the decoder."""
    names = model.architecture.block_classes
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and all(type(block).__name__.endswith(names) for block in module)
    ]


@contextmanager
def _keep_few_blocks(model: Any, kept: list[int]) -> Iterator[None]:
    """Keep only the first blocks of encoder and decoder: all blocks of a large model would take most of a minute."""
    lists = find_blocks(model)
    before = [list(blocks) for blocks in lists]
    for blocks, count in zip(lists, kept, strict=True):
        del blocks[count:]
    try:
        yield
    finally:
        for blocks, all_blocks in zip(lists, before, strict=True):
            blocks.extend(all_blocks[len(blocks) :])


def _count_unpacked_bytes(model: Any, settings: QuantizationSettings) -> int:
    """Count the bytes of the largest weight that a quantized layer dequantizes to a temporary tensor."""
    layers = find_quantizable_linears(model, settings).values() if settings.q_lora else []
    return max((layer.weight.numel() * layer.weight.element_size() for layer in layers), default=0)


@contextmanager
def _use_empty_tensors(model: Any, on_gpu: bool) -> Iterator[None]:
    """Make the tensors of a model empty in this block, with the operations of a GPU or of a CPU."""
    with ExitStack() as stack:
        _replace_tensors(model)
        if on_gpu:
            stack.enter_context(replace_attention_kernel(_attend))
            stack.enter_context(fused.without_chunks())
            stack.enter_context(use_gpu_chunks(model.architecture.dimensions.num_rows))
        yield


class _EmptyTensor(torch.Tensor):
    """A tensor without data that calls itself a CPU tensor, so that autocast and attention behave as on a CPU.

    Like torch's FakeTensor, but several times as fast, since it trusts the kernels for the meta device.
    """

    meta: torch.Tensor

    @staticmethod
    def __new__(cls, meta: torch.Tensor) -> "_EmptyTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=torch.device("cpu")
        )
        made.meta = meta
        return made

    __torch_dispatch__ = None  # type: ignore[assignment]  # operations need the mode below


def _unwrap(value: Any, given: dict[int, torch.Tensor]) -> Any:
    """Return the meta tensors of empty tensors, and add them to `given`: the meta tensor's id -> the tensor."""
    if isinstance(value, torch.Tensor):
        meta = value.meta if isinstance(value, _EmptyTensor) else torch.empty_like(value, device="meta")
        given[id(meta)] = value
        return meta
    return [_unwrap(each, given) for each in value] if isinstance(value, (list, tuple)) else value


@cache
def _takes_device(function: Any) -> bool:
    return any(argument.name == "device" for argument in function._schema.arguments)


def _describe(value: Any) -> Any:
    """Describe an operation's inputs by all that its results' shapes depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_describe, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _find_repeatable(result: Any, inputs: Any) -> Any:
    """Return the number of the input that an operation has changed, or a copy of a new result; None: neither."""
    for number, each in enumerate(inputs):
        if each is result:
            return number
    if not isinstance(result, torch.Tensor):
        return None
    storage, copied = result.untyped_storage(), _copy_empty(result)
    shared = [each.untyped_storage()._cdata for each in tree_leaves(inputs) if isinstance(each, torch.Tensor)]
    is_view = storage._cdata in shared or storage.nbytes() != copied.untyped_storage().nbytes()
    return None if is_view else copied


def _copy_empty(meta: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="meta")


class _EmptyTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run operations on `_EmptyTensor`s, and track the live bytes that they allocate."""

    # by operation and inputs, the value of `_find_repeatable`: torch computes many results' shapes in Python, which
    # takes up to a millisecond
    _known: ClassVar[dict[Any, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch wraps `__torch_dispatch__`, which takes as long as the rest of it

    def __init__(self, before: Iterable[_EmptyTensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        for tensor in before:
            self._seen[tensor.meta.untyped_storage()] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0  # transformers asks if a mask is all ones: pretend that it isn't
        given: dict[int, torch.Tensor] = {}
        metas = _unwrap(args, given)
        options = {name: _unwrap(value, given) for name, value in (kwargs or {}).items()}
        if "device" in options or (not given and _takes_device(function)):
            options["device"] = "meta"
        inputs = (*metas, *options.values())
        key = (function, *options, _describe(inputs))
        if (known := self._known.get(key)) is not None:
            return self._wrap(inputs[known] if isinstance(known, int) else _copy_empty(known), given)
        result = function(*metas, **options)
        if key not in self._known and key[-1] == _describe(inputs):  # no input is a different view now
            self._known[key] = _find_repeatable(result, inputs)
        return self._wrap(result, given)

    def _wrap(self, value: Any, given: dict[int, torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            self._add(value.untyped_storage())
            return given[id(value)] if id(value) in given else _EmptyTensor(value)
        return type(value)(self._wrap(each, given) for each in value) if isinstance(value, (list, tuple)) else value

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._subtract, size)

    def _subtract(self, size: int) -> None:
        self.live -= size


class _FusedAttention(torch.autograd.Function):
    """Shapes and memory of a fused kernel, which saves its inputs, its output, and one number per row of scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
    return _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]


def _replace_tensors(model: nn.Module) -> None:
    """Replace the meta tensors of a model with empty tensors."""
    made: dict[int, torch.Tensor] = {}  # by the old tensor's id, to keep shared tensors shared
    for module in model.modules():
        registered: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in registered:
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = _EmptyTensor(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    with _EmptyTensors():
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[id(tensor)]


def _make_inputs(model: Any, lengths: BatchLengths, settings: MemorySettings) -> dict[str, Any]:
    sources, targets = lengths.sources, lengths.targets
    if settings.packing != "off" and can_pack(model):
        source, target = (torch.ones(1, sum(each), dtype=torch.int64) for each in (sources, targets))
        more: dict[str, Any] = {"packing": _join_segments(lengths)}
    else:
        source, target = (torch.ones(len(each), max(each), dtype=torch.int64) for each in (sources, targets))
        more = {"attention_mask": source}
    if model.label_task is not None:
        return {"input_ids": source, **more}
    return {"input_ids": source, "decoder_input_ids": target, "labels": target, **more}


def _join_segments(lengths: BatchLengths) -> Segments:
    """Return the segments of a packed row, joined to at most MAX_SEGMENTS: a loop over thousands would take minutes.

    Thousands of segments are short, so that attention takes little of the memory.
    """
    size = -(-len(lengths.sources) // MAX_SEGMENTS)
    # join segments of similar lengths
    pairs = sorted(zip(lengths.sources, lengths.targets, strict=True), key=sum)
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    sources, targets = (tuple(sum(pair[side] for pair in group) for group in groups) for side in (0, 1))
    return Segments(sources, targets)
