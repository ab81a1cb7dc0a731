"""The settings of `trim`."""

from typing import ClassVar

from pydantic import Field

from t5tune.settings.field_types import OptionalCount
from t5tune.settings.groups.base import BaseModelSettings, ReplaceableOutputSettings
from t5tune.settings.groups.data import DataSettings
from t5tune.settings.groups.record_format import SelectionSettings


class TrimSettings(ReplaceableOutputSettings, SelectionSettings, DataSettings, BaseModelSettings):
    command: ClassVar[str] = "trim"
    also_positional: ClassVar[str | None] = "model_name_or_path"
    essential: ClassVar[tuple[str, ...]] = (
        "vocab_size", "source_column", "target_column", "source_prefix", "conversation_template", "model_max_length",
        "overwrite",
    )  # fmt: skip
    panel: ClassVar[str] = "Trimming"

    vocab_size: OptionalCount = Field(
        default=None,
        description="Rows of the new embedding, rounded up to a multiple of 128; default: for all tokens of the data.",
    )
