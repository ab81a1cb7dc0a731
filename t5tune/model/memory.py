"""The bytes that a model and a step of its training take, from config.json alone.

    model = empty_model_of(config, settings)
    step = measure_step(model, Lengths((512,) * 8, (128,) * 8), settings)

The step is run on tensors without data: the real model, adapters, loss and backward, with every storage that lives
counted. So nothing here knows a layer's formula, and what changes in the model changes in the plan.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t5tune.model import fused
from t5tune.model.attention import Segments, can_pack, use_packing
from t5tune.model.load import empty_model, quantised_linears
from t5tune.model.lora import add_lora
from t5tune.model.loss import HeadLoss
from t5tune.settings.quantization import QuantisationSettings

BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale, and scales that share one, in bitsandbytes' 4-bit formats
PARTS = ("embedding", "head", "attention", "feed-forward", "rest")


@dataclass(frozen=True)
class Lengths:
    """A micro-batch: tokens of each example's source and target, end tokens included."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """Bytes that a step takes beside the weights: the gradients that it leaves, and what it needs on the way."""

    gradients: int
    activations: int


def empty_model_of(config: dict[str, Any], settings: Any, num_token_rows: int, deepspeed: bool) -> Any:
    """The model that `train` would train, on no device.

    Args:
        config: what config.json holds, completed (families.py).
        settings: BaseModel, LoRA, quantisation and training settings in one.
        num_token_rows: rows of added tokens that train.
        deepspeed: whether it keeps the adapters' fp32 masters itself.
    """
    tied = bool(config.get("tie_word_embeddings", True))
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    adapter_dtype = dtype if deepspeed else torch.float32
    is_full = settings.train_mode == "full"
    with torch.device("meta"):
        model = empty_model(config, adapter_dtype if is_full else dtype, tied)
        model.requires_grad_(is_full)
        if not is_full:
            plain = settings.model_copy(update={"init_lora_weights": "default"})  # the others need the weights
            last = int(config["vocab_size"]) - 1
            model, _ = add_lora(model, Path(), plain, list(range(last - num_token_rows, last)), adapter_dtype)
    if settings.packing != "off" and can_pack(model):
        use_packing(model)
    fused.use_fused(model)
    return model.train()


def weight_bytes(model: nn.Module, quantisation: QuantisationSettings | None) -> dict[str, int]:
    """Bytes of the model's own tensors, by part, as `load_base` would hold them; adapters and their like left out."""
    quantised = quantised_linears(model, quantisation) if quantisation is not None and quantisation.q_lora else {}
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if _is_added(name):
            continue
        module = name.rpartition(".")[0]
        if module in quantised and quantisation is not None:
            size = quantised_bytes(parameter.numel(), parameter.shape[0], quantisation)
        else:
            size = parameter.numel() * parameter.element_size()
        sizes[_part(name)] += size
    return sizes


def quantised_bytes(count: int, rows: int, quantisation: QuantisationSettings) -> int:
    """Bytes of a matrix of `count` weights in bitsandbytes' format, its scales and code tables included."""
    if quantisation.quant_type == "int8":
        return count + 4 * rows
    blocks = -(-count // BLOCK)
    size = count // 2 + 16 * 4  # the sixteen values that four bits stand for
    if not quantisation.double_quant:
        return size + 4 * blocks
    return size + blocks + 4 * -(-blocks // OUTER_BLOCK) + 256 * 4 + 4


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def measure_step(model: Any, lengths: Lengths, settings: Any, on_gpu: bool, reentrant: bool, autocast: bool) -> Step:
    """Run a step of forward and backward on tensors without data, and count what lives.

    Args:
        on_gpu: attention is a fused kernel that keeps no scores; on a CPU with dropout it keeps them.
        reentrant: the way of gradient checkpointing.
        autocast: whether the forward runs in mixed precision, as without DeepSpeed.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _pass_for_cpu(model)
        if settings.gradient_checkpointing:
            model.enable_input_require_grads()
            # transformers 5 renames it on its way
            new = hasattr(model, "activation_checkpointing_enable")
            name = "activation_checkpointing" if new else "gradient_checkpointing"
            getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})
        head_loss = HeadLoss(model, settings.label_smoothing_factor)
        packs = settings.packing != "off" and can_pack(model)
        inputs, labels = _packed_inputs(lengths) if packs else _padded_inputs(lengths)
        if on_gpu:
            stack.enter_context(_gpu_kernels())
        live = stack.enter_context(_LiveBytes(model.parameters()))
        with head_loss.of(labels), torch.autocast("cpu", torch.bfloat16, enabled=autocast and settings.bf16):
            total = model(**inputs, use_cache=False).logits
        total.backward()
        del total
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    unpacked = 0
    if settings.q_lora:  # a product unpacks its weight first
        layers = quantised_linears(model, settings).values()
        unpacked = max((layer.weight.numel() * layer.weight.element_size() for layer in layers), default=0)
    return Step(gradients, max(0, live.peak - gradients) + unpacked)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, as long as they live, beside those that were there before."""

    def __init__(self, before: Iterator[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        for tensor in before:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:
            return args[0].fake_device  # two of three calls; torch's own way to this answer is long
        if function is torch.ops.aten._local_scalar_dense.default:
            return 0  # asked whether a mask is all ones; it isn't
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


class _FusedAttention(torch.autograd.Function):
    """Shapes and memory of a fused kernel: it keeps its inputs, its output, and a number for each row of scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextmanager
def _gpu_kernels() -> Iterator[None]:
    """Let torch's attention be the fused kernel, and a norm take all rows at once, as on a GPU.

    transformers and model/attention.py look the attention up by its name.
    """
    stock: Any = functional.scaled_dot_product_attention
    elements = fused.ELEMENTS_AT_ONCE

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
        return _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]

    functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    fused.ELEMENTS_AT_ONCE = sys.maxsize
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock
        fused.ELEMENTS_AT_ONCE = elements


def _pass_for_cpu(model: nn.Module) -> None:
    """Give the model tensors that pass for ones on the CPU, so that autocast and attention choose as they do there."""
    made: dict[int, torch.Tensor] = {}  # what is shared stays so
    for module in model.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[id(tensor)]


def _packed_inputs(lengths: Lengths) -> tuple[dict[str, Any], torch.Tensor]:
    target = torch.ones(1, sum(lengths.targets), dtype=torch.int64)
    inputs = {
        "input_ids": torch.ones(1, sum(lengths.sources), dtype=torch.int64),
        "decoder_input_ids": target,
        "packing": Segments(lengths.sources, lengths.targets),
    }
    return inputs, target


def _padded_inputs(lengths: Lengths) -> tuple[dict[str, Any], torch.Tensor]:
    source = torch.ones(len(lengths.sources), max(lengths.sources), dtype=torch.int64)
    target = torch.ones(len(lengths.targets), max(lengths.targets), dtype=torch.int64)
    return {"input_ids": source, "attention_mask": source, "decoder_input_ids": target}, target


def _is_added(name: str) -> bool:
    return ".lora_" in name or "trainable_tokens" in name or "modules_to_save" in name


def _part(name: str) -> str:
    if "lm_head" in name:
        return "head"
    if "shared" in name or "embed_tokens" in name:
        return "embedding"
    if "layer_norm" in name or "relative_attention_bias" in name:
        return "rest"
    return "feed-forward" if "DenseReluDense" in name else "attention"
