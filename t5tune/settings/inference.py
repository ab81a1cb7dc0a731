"""Which model answers, and how it searches for the answer."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from t5tune.settings.base_model import BaseModelSettings
from t5tune.settings.fields import Maybe
from t5tune.settings.quantisation import QuantisationSettings


class InferenceSettings(QuantisationSettings, BaseModelSettings):
    panel: ClassVar[str] = "Base model"

    adapter: Annotated[Path | None, Maybe] = Field(
        default=None,
        description="Adapter folder or run folder to put on the base; one that stands for the model itself "
        "brings its base's name.",
    )
    bf16: bool = Field(default=False, description="Compute in bfloat16.")
    use_cpu: bool = Field(default=False, description="Stay on the CPU even where there is a GPU.")
