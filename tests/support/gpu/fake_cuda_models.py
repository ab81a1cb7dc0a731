"""The model, batches and trainer of a run, as `train` makes them, with fake CUDA tensors in place of the weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from t5tune.commands.train.run_plan import make_run_plan
from t5tune.data.tokens.encoding import Example
from t5tune.distributed.world import World
from t5tune.families.t5 import T5
from t5tune.model import load
from t5tune.model.attention.packing import use_packing
from t5tune.model.batches import PackedCollator, PaddedCollator
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.lora import add_lora
from t5tune.progress import silent
from t5tune.settings import TrainSettings
from t5tune.training.arguments import make_training_arguments
from t5tune.training.non_finite import NonFiniteGuard
from t5tune.training.objectives import TargetObjective
from t5tune.training.steps import StepSampler
from t5tune.training.trainer import T5Trainer, TrainerParts
from tests.support.gpu.fake_cuda_watch import CUDA

FLAN = {
    "model_type": "t5", "vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
ADDED_TOKENS = range(32100, 32119)


def make_settings(folder: Path, **changes: Any) -> TrainSettings:
    """Settings of a run that neither logs nor evaluates in its first two steps."""
    # fake tensors can't be pinned
    never = {"logging_strategy": "no", "logging_first_step": False, "dataloader_pin_memory": False}
    values = {"model_name_or_path": "flan", "data_path": "data", "output_dir": str(folder), "max_steps": 3, **changes}
    values["training_args"] = {**never, **values.get("training_args", {})}
    return TrainSettings(**{"bf16": True, "save_strategy": "no", "report_to": [], **values})


def build_empty_model(shape: dict[str, Any], settings: TrainSettings, deepspeed: bool) -> Any:
    """Build the model to train like `build_model`, on the meta device. Call it outside of FakeTensorMode.

    Args:
        deepspeed: whether the dtypes are those of DeepSpeed: trained weights in bf16.
    """
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    trained_dtype = dtype if deepspeed else torch.float32
    is_full = settings.train_mode == "full"
    with torch.device("meta"):
        model = load.build_empty_model(T5({**FLAN, **shape}), trained_dtype if is_full else dtype, False)
        model.requires_grad_(is_full)
        if settings.q_lora:
            load._replace_linears_with_quantized(model, dtype, settings)
        if not is_full:
            model, _ = add_lora(model, None, settings, list(ADDED_TOKENS), trained_dtype)
    return model


def move_to_fake_gpu(model: Any, settings: TrainSettings, is_set_up: bool = True) -> None:
    """Give the model fake tensors on the GPU, and its layers our forward passes. Call it within FakeTensorMode.

    Args:
        is_set_up: False: the layers keep their forward passes.
    """
    _replace_tensors(model, torch.bfloat16 if settings.bf16 else torch.float32)
    model.to = lambda *_, **__: model  # fake parameters can't be exchanged
    if settings.packing != "off" and is_set_up:
        use_packing(model)
    if is_set_up:
        use_fused_layers(model, CUDA)
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    model.train()


def _replace_tensors(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the meta tensors with fake ones on the GPU; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        registered: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in registered:
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _make_fake(module, tensor, dtype)
                tensors[name] = made[id(tensor)]


def _make_fake(module: Any, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if type(tensor).__name__ == "Params4bit":  # FakeTensor can't be of another subclass, so its state is attached
        return _make_fake_nf4(module.out_features, module.in_features, tensor, dtype)
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _make_fake_nf4(rows: int, columns: int, tensor: Any, dtype: torch.dtype) -> torch.Tensor:
    """A packed weight with double quantization: 64 weights share a scale, and 256 scales share another one."""
    from bitsandbytes.functional import QuantState

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=CUDA)

    blocks = rows * columns // 64
    packed: Any = nn.Parameter(make(rows * columns // (2 * dtype.itemsize), 1, dtype=dtype), requires_grad=False)
    outer = QuantState(absmax=make(-(-blocks // 256)), blocksize=256, code=make(256), dtype=torch.float32)
    packed.quant_state = QuantState(
        absmax=make(blocks, dtype=torch.uint8), shape=torch.Size((rows, columns)), dtype=dtype, blocksize=64,
        code=make(16), quant_type=tensor.quant_type, offset=make(), state2=outer,
    )  # fmt: skip
    return packed


def make_examples(sources: tuple[int, ...], targets: tuple[int, ...]) -> list[Example]:
    """Make examples of these lengths."""
    return [Example(np.full(source, 5), np.full(target, 6)) for source, target in zip(sources, targets, strict=True)]


def make_collator(settings: TrainSettings, flex: bool) -> PackedCollator | PaddedCollator:
    """Make the collator of `train`.

    Args:
        flex: whether attention over packed rows is one kernel, or a loop over the segments.
    """
    return PaddedCollator(0, 0) if settings.packing == "off" else PackedCollator(0, 0, divides_rows=flex)


class Listed(list[Example]):
    """Examples that aren't in a cache."""

    def read(self, index: int, repeat: int) -> Example:
        return self[index]


def make_trainer(model: Any, settings: TrainSettings, examples: list[Example], flex: bool) -> T5Trainer:
    """Make the trainer of `train`. Each of its steps is on all examples."""
    everything = np.arange(len(examples))
    parts = TrainerParts(
        examples=Listed(examples),
        held_out=None,
        sampler=StepSampler(lambda _: (everything, everything), lambda _: [everything] * 3, 3, 1),
        collator=make_collator(settings, flex),
        weights=SimpleNamespace(),
        publisher=SimpleNamespace(last_step=None),
        reshards=False,
        forgets_evaluations=False,
        has_new_held_out=False,
        non_finite=NonFiniteGuard(Path(settings.output_dir), False, 0, silent),
        stop=SimpleNamespace(is_set=False),
        watch=SimpleNamespace(count_batch=lambda: None),
        scorer=None,
        objective=TargetObjective(settings.label_smoothing_factor),
        reference=None,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        metric_names=["loss"],
        evaluation=settings,
        report=silent,
    )
    return T5Trainer(model, make_training_arguments(make_run_plan(settings), None, (), World(), CUDA), parts)
