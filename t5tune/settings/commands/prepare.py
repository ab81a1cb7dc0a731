"""The settings of `prepare`."""

from typing import ClassVar

from t5tune.settings.groups.base import BaseModelSettings, OutputSettings
from t5tune.settings.groups.data import MixingSettings, SplitSettings
from t5tune.settings.groups.record_format import SelectionSettings
from t5tune.settings.groups.shard import ShardSettings


class PrepareSettings(
    OutputSettings, SplitSettings, MixingSettings, SelectionSettings, ShardSettings, BaseModelSettings
):
    command: ClassVar[str] = "prepare"
    essential: ClassVar[tuple[str, ...]] = (
        "source_column", "target_column", "source_prefix", "conversation_template", "model_max_length", "num_data",
        "eval_fraction",
    )  # fmt: skip
