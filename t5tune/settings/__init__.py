"""The settings of every command, and how they are loaded.

    settings, notes = load_settings(TrainSettings, file="run.yaml", environment=os.environ, flags={"lora_r": "16"})

Precedence: default < file < environment < flags. All problems are raised together.
"""

from t5tune.settings.commands import COMMANDS
from t5tune.settings.commands.chat import ChatSettings
from t5tune.settings.commands.evaluate import EvaluateSettings
from t5tune.settings.commands.export import ExportSettings
from t5tune.settings.commands.merge import MergeSettings
from t5tune.settings.commands.plan import PlanSettings
from t5tune.settings.commands.prepare import PrepareSettings
from t5tune.settings.commands.serve import ServeSettings
from t5tune.settings.commands.small import (
    CompareSettings,
    DocsSettings,
    DoctorSettings,
    InspectSettings,
    MigrateSettings,
    PushSettings,
    SchemaSettings,
    TemplatesSettings,
)
from t5tune.settings.commands.train import TrainSettings
from t5tune.settings.commands.trim import TrimSettings
from t5tune.settings.dataset_list import DatasetSettings
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.base import QuantizationSettings
from t5tune.settings.groups.data import DataSettings
from t5tune.settings.groups.record_format import ConversationSettings
from t5tune.settings.loading import dump_settings, load_settings, write_settings

__all__ = [
    "COMMANDS", "ChatSettings", "CompareSettings", "ConversationSettings", "DataSettings", "DatasetSettings",
    "DocsSettings", "DoctorSettings", "EvaluateSettings", "ExportSettings", "InspectSettings", "MergeSettings",
    "MigrateSettings", "PlanSettings", "PrepareSettings", "PushSettings", "QuantizationSettings", "SchemaSettings",
    "ServeSettings", "Settings", "TemplatesSettings", "TrainSettings", "TrimSettings", "dump_settings", "load_settings",
    "write_settings",
]  # fmt: skip
