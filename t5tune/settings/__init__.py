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
    PlanSettings,
    PrepareSettings,
    PushSettings,
    SchemaSettings,
    TemplatesSettings,
    TrainSettings,
)
from t5tune.settings.data import DataSettings
from t5tune.settings.datasets import DatasetSettings
from t5tune.settings.fields import Settings
from t5tune.settings.loading import dump_settings, load_settings, write_settings
from t5tune.settings.merge import MergeSettings
from t5tune.settings.reading import ConversationSettings
from t5tune.settings.serve import ServeSettings
from t5tune.settings.shared import QuantizationSettings

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
