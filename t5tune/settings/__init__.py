"""The settings of every command, and how they are loaded.

    settings, notes = load_settings(TrainSettings, file="run.yaml", environment=os.environ, flags={"lora_r": "16"})

Precedence: default < file < environment < flags. All problems are raised together.
"""

from t5tune.settings.commands import (
    COMMANDS,
    ChatSettings,
    DocsSettings,
    DoctorSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    MergeSettings,
    PlanSettings,
    PrepareSettings,
    PushSettings,
    SchemaSettings,
    ServeSettings,
    TemplatesSettings,
    TrainSettings,
)
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.base import QuantizationSettings
from t5tune.settings.groups.data import DataSettings
from t5tune.settings.groups.record_format import ConversationSettings
from t5tune.settings.loading import dump_settings, load_settings, write_settings

__all__ = [
    "COMMANDS",
    "ChatSettings",
    "ConversationSettings",
    "DataSettings",
    "DatasetSettings",
    "DocsSettings",
    "DoctorSettings",
    "EvaluateSettings",
    "ExportSettings",
    "InspectSettings",
    "MergeSettings",
    "PlanSettings",
    "PrepareSettings",
    "PushSettings",
    "QuantizationSettings",
    "SchemaSettings",
    "ServeSettings",
    "Settings",
    "TemplatesSettings",
    "TrainSettings",
    "dump_settings",
    "load_settings",
    "write_settings",
]
