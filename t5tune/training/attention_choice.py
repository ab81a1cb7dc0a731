"""Choose how a run computes attention over packed rows: in one kernel per layer (flex), or in a loop over the segments.

choice = choose_packed_attention("auto", [shape], device, torch.bfloat16, trains_bias=False, previous=None, report)
choice.implementation, choice.num_stages
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from t5tune.distributed.collectives import all_gather
from t5tune.errors import SettingsError
from t5tune.families.encoder import Encoder
from t5tune.inference.loading import LoadedModel
from t5tune.model.attention.packing import can_pack, use_packing
from t5tune.model.batches import Collator, LabelCollator, make_collator
from t5tune.model.kernels.flex_check import (
    AttentionShape,
    KernelCheck,
    PackedAttention,
    check_kernel,
    find_unmet_requirement,
    read_attention_shape,
)
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.progress import Note, Report


class ChosenAttention(NamedTuple):
    """How attention is computed; `num_stages` is explained in flex_attention.PackedRows."""

    implementation: PackedAttention
    num_stages: int | None = None

    def make_collator(self, model: Any, pad_token_id: int, is_packed: bool) -> Collator:
        """Make the collator of the batches for a model."""
        if isinstance(model.architecture, Encoder):
            uses_flex = self.implementation == "flex"
            return LabelCollator(model.label_task, pad_token_id, is_packed, uses_flex, self.num_stages)
        start_id = model.architecture.start_token_id
        return make_collator(start_id, pad_token_id, is_packed, self.implementation == "flex", self.num_stages)


LOOP = ChosenAttention("loop")


def choose_packed_attention(
    wanted: Literal["auto", "flex", "loop"],
    shapes: Sequence[AttentionShape | None],
    device: torch.device,
    dtype: torch.dtype,
    trains_bias: bool,
    previous: PackedAttention | None,
    report: Report,
) -> ChosenAttention:
    """Choose the implementation, the same on all ranks. Every rank calls this.

    Args:
        shapes: of the attention in each model that reads the batches; None if the kernel can't compute it.
        trains_bias: whether the position bias is trained.
        previous: the choice that the checkpoint records; None for a new run, or a run on a CPU.
    """
    if wanted == "auto" and previous == "loop" and device.type == "cuda":
        again = "as when this run began; --packed-attention flex tries one kernel per layer"
        report(Note(f"attention over packed rows loops over the examples, {again}"))
        return LOOP
    if wanted == "loop":
        return LOOP
    limits = (find_unmet_requirement(shape, device, dtype, trains_bias) for shape in shapes)
    limit, checked = next(filter(None, limits), None), KernelCheck(None, None)
    if limit is None:
        report(Note("compiling attention for this GPU, which can take minutes the first time"))
        checked = check_kernel([shape for shape in shapes if shape is not None], device, dtype)
    reasons = all_gather(limit or checked.problem)
    found = [f"rank {rank}: {reason}" if len(reasons) > 1 else reason for rank, reason in enumerate(reasons) if reason]
    if not found:
        report(Note("attention over packed rows: one kernel per layer"))
        return ChosenAttention("flex", checked.num_stages)
    if wanted == "flex":
        raise SettingsError(f"packed_attention: flex: {found[0]}", hint="set it to auto or loop")
    if device.type == "cuda":
        what = "attention over packed rows loops over the examples, which is slower on a GPU"
        report(Note(f"{what}: {found[0]}", warning=limit is None))
        if previous == "flex":
            report(Note("until now this run used one kernel for them: results may differ by rounding", warning=True))
    return LOOP


def set_up_evaluation(loaded: LoadedModel, report: Report) -> Collator:
    """Set up a loaded model for packed batches, on a GPU with the kernels of training, and make their collator.

    Every rank calls this.
    """
    model, device, attention = loaded.model, loaded.model.device, LOOP
    if device.type == "cuda":
        use_fused_layers(model, device, report)
    if is_packed := can_pack(model):
        use_packing(model)
        shape = read_attention_shape(model, has_dropout=False, is_trained=False)
        dtype = torch.bfloat16 if loaded.precision.bf16 else torch.float32
        attention = choose_packed_attention("auto", [shape], device, dtype, False, None, report)
    return attention.make_collator(model, loaded.tokenizer.pad_token_id, is_packed)
