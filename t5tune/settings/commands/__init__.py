"""One settings model per command, composed of the groups of settings that it uses."""

from t5tune.settings.commands.chat import ChatSettings
from t5tune.settings.commands.evaluate import EvaluateSettings
from t5tune.settings.commands.export import ExportSettings
from t5tune.settings.commands.merge import MergeSettings
from t5tune.settings.commands.plan import PlanSettings
from t5tune.settings.commands.prepare import PrepareSettings
from t5tune.settings.commands.serve import ServeSettings
from t5tune.settings.commands.small import (
    DocsSettings,
    DoctorSettings,
    InspectSettings,
    PushSettings,
    SchemaSettings,
    TemplatesSettings,
)
from t5tune.settings.commands.train import TrainSettings
from t5tune.settings.field_types import Settings

COMMANDS: tuple[type[Settings], ...] = (
    PrepareSettings,
    TrainSettings,
    ExportSettings,
    MergeSettings,
    ChatSettings,
    ServeSettings,
    EvaluateSettings,
    InspectSettings,
    PlanSettings,
    PushSettings,
    DoctorSettings,
    TemplatesSettings,
    SchemaSettings,
    DocsSettings,
)
