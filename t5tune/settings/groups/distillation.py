"""Learning from the targets, and from a teacher's token probabilities (Hinton et al. 2015)."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from t5tune.settings.affects import Affects
from t5tune.settings.field_types import OptionalPath, OptionalText, PathAsText, Settings

TEACHER = "teacher_model_name_or_path"


class TargetSettings(Settings):
    panel: ClassVar[str] = "Training"

    label_smoothing_factor: Annotated[float, Affects.WEIGHTS] = Field(
        default=0.0, ge=0, lt=1, description="Label smoothing: probability mass spread uniformly over the vocabulary."
    )


class DistillationSettings(Settings):
    panel: ClassVar[str] = "Distillation"

    teacher_model_name_or_path: Annotated[OptionalText, PathAsText, Affects.INPUT] = Field(
        default=None,
        description="Teacher, whose token probabilities the model also learns: a base, a merged checkpoint, a run or "
        "an adapter with the same tokenizer; default: no teacher.",
    )
    teacher_adapter: Annotated[OptionalPath, Affects.INPUT] = Field(
        default=None, description="Adapter to apply to the teacher if teacher_model_name_or_path is a base."
    )
    teacher_q_lora: Annotated[bool, Affects.WEIGHTS] = Field(
        default=False, description="Quantize the teacher to 4 bits (NF4)."
    )
    distillation_alpha: Annotated[float, Affects.WEIGHTS] = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Weight of the teacher in the loss; the targets' cross-entropy gets the rest.",
    )
    distillation_temperature: Annotated[float, Affects.WEIGHTS] = Field(
        default=2.0,
        gt=0,
        description="Temperature T of both models' probabilities; the divergence is multiplied by T² to keep the size "
        "of its gradient.",
    )
    distillation_kl: Annotated[Literal["forward", "reverse"], Affects.WEIGHTS] = Field(
        default="forward",
        description="Kullback–Leibler divergence to minimize: of the model from the teacher (forward), or reverse, as "
        "in MiniLLM (Gu et al. 2024).",
    )

    @model_validator(mode="after")
    def _check_teacher(self) -> Self:
        if self.teacher_model_name_or_path is not None:
            return self
        for name in DistillationSettings.model_fields:
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                shown = "true" if value is True else value
                raise ValueError(f"{name}: {shown}: has no effect without {TEACHER}; set both or neither")
        return self
