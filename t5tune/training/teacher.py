"""Distillation: the teacher of a run, and learning its probabilities of each target token.

    teacher = load_teacher(session, loaded, start_token_id, is_packed)
    objective = DistillationObjective(run_plan.objective, teacher)

The teacher runs on the same batches, without dropout. Neither model's logits are ever stored for a whole batch. Under
ZeRO-3 it is partitioned among the ranks, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.errors import ModelError, SettingsError, naming_settings
from t5tune.inference.loading import load_for_inference
from t5tune.model.attention.packing import can_pack, use_packing
from t5tune.model.distillation import Distillation
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.loss import CrossEntropy, HeadWeights, read_head_weights
from t5tune.progress import Note
from t5tune.runs.plan import DistillationPlan
from t5tune.runs.teacher_files import make_inference_settings
from t5tune.settings.groups.distillation import TEACHER
from t5tune.settings.packaged_templates import get_zero_stage
from t5tune.training.objectives import TargetObjective, widen_mask
from t5tune.training.session import LoadedData, Session


@dataclass(frozen=True)
class Teacher:
    """A frozen model. Under ZeRO-3, DeepSpeed's engine gathers its weights as long as the engine exists."""

    model: Any
    engine: Any

    @torch.no_grad()
    def compute_hidden_states(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the input of the teacher's head, (N, E), without autocast."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        device = inputs["input_ids"].device
        with torch.autocast(device.type, enabled=False):
            hidden_BTE = self.model(**widen_mask(inputs, self.model.architecture), reduction="hidden", use_cache=False)
        return hidden_BTE.flatten(0, -2)  # type: ignore[no-any-return]

    @contextmanager
    def gather_head(self) -> Iterator[HeadWeights]:
        """Yield the weights of the head, gathered in this block under ZeRO-3."""
        head = read_head_weights(self.model.get_output_embeddings())
        assert head is not None, "load_teacher has checked it"
        if self.engine is None:
            yield head
            return
        import deepspeed

        parameters = [head.weight_VD] if head.rows_KD is None else [head.weight_VD, head.rows_KD]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            yield head


def load_teacher(session: Session, loaded: LoadedData, start_token_id: int, is_packed: bool) -> Teacher | None:
    """Load the teacher of a run; None if the run has no teacher.

    Args:
        start_token_id: the first token of the run's decoder.
        is_packed: whether the run's batches are packed.
    """
    settings, files, device = session.plan.teacher, loaded.teacher, session.device
    if settings is None or files is None:
        return None
    name = f"{TEACHER}: {settings.teacher_model_name_or_path}"
    zero3 = loaded.deepspeed if get_zero_stage(loaded.deepspeed) == 3 else None
    with naming_settings(model_name_or_path=TEACHER, adapter="teacher_adapter"):
        inference_settings = make_inference_settings(settings, session.plan.model, files)
        found = load_for_inference(inference_settings, device=device, zero3=zero3)
    _check_tokenizer(name, found.tokenizer, loaded.tokenizer)
    template = found.find_template(None)
    if template is not None and template.hash != loaded.examples.get_template(0).hash:
        problem = "the teacher was trained with a different conversation template"
        session.report(Note(f"{name}: {problem}", warning=True))
    model = found.model.requires_grad_(False)
    if read_head_weights(model.get_output_embeddings()) is None:
        problem = f"{name}: its adapter adapts the head, which isn't supported"
        raise ModelError(problem, hint="merge it into its base first")
    if (start := model.architecture.start_token_id) != start_token_id:
        problem = f"the teacher's decoder starts with token {start}, this run's with token {start_token_id}"
        raise SettingsError(f"{name}: {problem}", hint="choose a teacher with the same decoder_start_token_id")
    if is_packed and not can_pack(model):
        problem = f"the attention of {model.config.model_type} doesn't support packing"
        raise SettingsError(f"{name}: {problem}", hint="set packing: off")
    if is_packed:
        use_packing(model)
    use_fused_layers(model, device)
    return Teacher(model, found.engine)


def _check_tokenizer(name: str, teachers: Tokenizer, runs: Tokenizer) -> None:
    """Check that both have the same tokens with the same ids."""
    theirs, ours = teachers.get_vocab(), runs.get_vocab()
    if wrong := theirs.items() ^ ours.items():
        number, token = min((number, token) for token, number in wrong)
        problem = f"{token!r} has id {number} in the teacher's tokenizer, but this run's lacks it"
        if token in ours:
            found = f"has {theirs[token]} for it" if token in theirs else "lacks it"
            problem = f"{token!r} has id {ours[token]} here, but the teacher's tokenizer {found}"
        hint = "choose a teacher that was trained on this data, with the same add_tokens"
        raise SettingsError(f"{name}: the tokenizers differ: {problem}", hint=hint)
    if teachers.special_ids != runs.special_ids:
        problem = "the teacher's tokenizer puts different special tokens around a text"
        raise SettingsError(f"{name}: {problem}", hint="choose a teacher with this run's tokenizer")


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
