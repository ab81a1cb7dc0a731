"""Which model generates predictions, and on which device."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from t5tune.settings.base_model import BaseModelSettings
from t5tune.settings.fields import NoneIfUnset
from t5tune.settings.quantization import QuantizationSettings


class InferenceSettings(QuantizationSettings, BaseModelSettings):
    panel: ClassVar[str] = "Base model"

    adapter: Annotated[Path | None, NoneIfUnset] = Field(
        default=None,
        description="Adapter folder or run folder to apply to the base; if model_name_or_path is itself an adapter or "
        "a run, its own base is used.",
    )
    bf16: bool = Field(default=False, description="Compute in bfloat16.")
    use_cpu: bool = Field(default=False, description="Run on the CPU even if there is a GPU.")
    device: Annotated[str | None, NoneIfUnset] = Field(
        default=None, description="Device to run on: cpu, cuda, cuda:1, mps, …; default: a GPU if there is one."
    )

    @model_validator(mode="after")
    def _check_one_device(self) -> "InferenceSettings":
        if self.use_cpu and self.device not in (None, "cpu"):
            raise ValueError(f"device: {self.device} conflicts with use_cpu; give only one of them")
        return self
