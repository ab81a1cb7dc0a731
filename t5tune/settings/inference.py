"""Which model answers, and how it searches for the answer."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from t5tune.settings.base_model import BaseModelSettings
from t5tune.settings.fields import Maybe
from t5tune.settings.quantization import QuantisationSettings


class InferenceSettings(QuantisationSettings, BaseModelSettings):
    panel: ClassVar[str] = "Base model"

    adapter: Annotated[Path | None, Maybe] = Field(
        default=None,
        description="Adapter folder or run folder to put on the base; one that stands for the model itself "
        "brings its base's name.",
    )
    bf16: bool = Field(default=False, description="Compute in bfloat16.")
    use_cpu: bool = Field(default=False, description="Stay on the CPU even where there is a GPU.")
    device: Annotated[str | None, Maybe] = Field(
        default=None, description="Where to compute: cpu, cuda, cuda:1, mps, …; default: a GPU if there is one."
    )

    @model_validator(mode="after")
    def _one_device(self) -> "InferenceSettings":
        if self.use_cpu and self.device not in (None, "cpu"):
            raise ValueError(f"device: {self.device} beside use_cpu; give one")
        return self
