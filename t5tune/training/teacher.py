"""Distillation: the teacher of a run, and learning its probabilities of each target token.

    teacher = load_teacher(settings, student, files, tokenizer, device, deepspeed, start_id, is_packed, template)
    objective = DistillationObjective(run_plan.objective, teacher)

The teacher runs on the same batches, without dropout. Neither model's logits are ever stored for a whole batch. Under
ZeRO-3 it is partitioned among the ranks, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from t5tune.data.tokens.templates import Template
from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.errors import ModelError, SettingsError, naming_settings
from t5tune.inference.loading import load_for_inference
from t5tune.model.attention.packing import can_pack, use_packing
from t5tune.model.distillation import Distillation
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.loss import CrossEntropy, HeadWeights, read_head_weights
from t5tune.progress import Note, Report, silent
from t5tune.runs.plan import DistillationPlan, ModelPlan
from t5tune.runs.teacher_files import TeacherFiles, make_inference_settings
from t5tune.settings.groups.distillation import TEACHER, DistillationSettings
from t5tune.settings.packaged_templates import get_zero_stage
from t5tune.training.objectives import TargetObjective, widen_mask


@dataclass(frozen=True)
class Teacher:
    """A frozen model.

    Args:
        engine: DeepSpeed's, which gathers the weights of a partitioned model as long as it exists.
    """

    model: Any
    engine: Any

    @torch.no_grad()
    def compute_hidden_states(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute what the teacher's head would multiply with its weight, (N, E), without autocast."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        device = inputs["input_ids"].device
        with torch.autocast(device.type, enabled=False):
            hidden_BTE = self.model(**widen_mask(inputs, self.model.architecture), reduction="hidden", use_cache=False)
        return hidden_BTE.flatten(0, -2)  # type: ignore[no-any-return]

    @contextmanager
    def gather_head(self) -> Iterator[HeadWeights]:
        """Return the weights of the head, which under ZeRO-3 are whole within this block."""
        head = read_head_weights(self.model.get_output_embeddings())
        assert head is not None, "load_teacher has checked it"
        if self.engine is None:
            yield head
            return
        import deepspeed

        parameters = [head.weight_VD] if head.rows_KD is None else [head.weight_VD, head.rows_KD]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            yield head


def load_teacher(
    settings: DistillationSettings,
    student: ModelPlan,
    files: TeacherFiles,
    tokenizer: Tokenizer,
    device: torch.device,
    deepspeed: dict[str, Any] | None,
    start_token_id: int,
    is_packed: bool,
    template: Template,
    report: Report = silent,
) -> Teacher:
    """Load the teacher of a run.

    Args:
        tokenizer: that of the run.
        start_token_id: with which the run's decoder starts.
        is_packed: whether the run's batches are packed.
        template: the run's conversation template; a teacher that was trained with another one gets a note.

    Raises:
        SettingsError: its tokenizer isn't that of the run, or it can't read the run's batches.
        ModelError, CheckpointError: its files can't be used.
    """
    zero3 = deepspeed if deepspeed is not None and get_zero_stage(deepspeed) == 3 else None
    with naming_settings(model_name_or_path=TEACHER, adapter="teacher_adapter"):
        loaded = load_for_inference(make_inference_settings(settings, student, files), device=device, zero3=zero3)
    _check_tokenizer(settings, loaded.tokenizer, tokenizer)
    if (own := loaded.find_template(None)) is not None and own.hash != template.hash:
        problem = "it was trained with another conversation template than that of this run's data"
        report(Note(f"{TEACHER}: {settings.teacher_model_name_or_path}: {problem}", warning=True))
    model = loaded.model.requires_grad_(False)
    if read_head_weights(model.get_output_embeddings()) is None:
        problem = (
            f"{TEACHER}: {settings.teacher_model_name_or_path}: its adapter adapts the head, which isn't supported"
        )
        raise ModelError(problem, hint="merge it into its base first")
    if reason := _find_unreadable(model, start_token_id, is_packed):
        raise SettingsError(f"{TEACHER}: {settings.teacher_model_name_or_path}: {reason}")
    if is_packed:
        use_packing(model)
    use_fused_layers(model, device)
    return Teacher(model, loaded.engine)


def _find_unreadable(model: Any, start_token_id: int, is_packed: bool) -> str | None:
    """Say why the teacher can't read the run's batches; None if it can."""
    own = model.architecture.start_token_id
    if own != start_token_id:
        return f"its decoder starts with the token {own}, that of this run with {start_token_id}"
    if is_packed and not can_pack(model):
        return f"the attention of {model.config.model_type} doesn't support packing; set packing: off"
    return None


def _check_tokenizer(settings: DistillationSettings, teachers: Tokenizer, own: Tokenizer) -> None:
    """Check that every token of the run is the same token of the teacher.

    Raises:
        SettingsError: one isn't.
    """
    theirs, ours = teachers.get_vocab(), own.get_vocab()
    wrong = [token for token, number in ours.items() if theirs.get(token) != number]
    if not wrong and teachers.special_ids == own.special_ids:
        return
    name = settings.teacher_model_name_or_path
    if not wrong:
        raise SettingsError(f"{TEACHER}: {name}: its tokenizer puts other special tokens around a text than the run's")
    token = min(wrong, key=lambda token: ours[token])
    if token in theirs:
        what = f"{token!r} has the id {theirs[token]} there, and {ours[token]} in this run"
    else:
        what = f"it lacks {token!r}, which has the id {ours[token]} in this run"
    hint = "give a teacher that was trained on this data, or set add_tokens none; a teacher must have the same tokens"
    raise SettingsError(f"{TEACHER}: {name}: another tokenizer: {what}", hint=hint)


class DistillationObjective(TargetObjective):
    """The teacher's probabilities of each token, and the cross-entropy of the targets. See model/distillation.py."""

    def __init__(self, objective: DistillationPlan, teacher: Teacher) -> None:
        super().__init__(objective.label_smoothing_factor)
        self.teacher = teacher
        self.settings = objective.teacher

    def compute_total(self, model: Any, architecture: Any, inputs: dict[str, Any]) -> torch.Tensor:
        settings = self.settings
        labels_N = inputs["labels"].flatten()
        hidden_NE = self.teacher.compute_hidden_states(inputs)
        with self.teacher.gather_head() as head:
            criterion = Distillation(
                CrossEntropy(labels_N, self.label_smoothing),
                hidden_NE,
                head,
                self.teacher.model.architecture.logit_cap,
                settings.distillation_alpha,
                settings.distillation_temperature,
                settings.distillation_kl,
            )
            total: torch.Tensor = model(**widen_mask(inputs, architecture), reduction="sum", criterion=criterion)
        self._record(criterion.totals, (labels_N >= 0).sum())
        return total
