"""One settings model per command, composed of the groups of settings that it uses."""

from t5tune.settings.commands import chat, evaluate, export, merge, plan, prepare, serve, small, train, trim
from t5tune.settings.field_types import Settings

COMMANDS: tuple[type[Settings], ...] = (
    prepare.PrepareSettings,
    train.TrainSettings,
    export.ExportSettings,
    merge.MergeSettings,
    trim.TrimSettings,
    chat.ChatSettings,
    serve.ServeSettings,
    evaluate.EvaluateSettings,
    small.InspectSettings,
    small.CompareSettings,
    plan.PlanSettings,
    small.MigrateSettings,
    small.PushSettings,
    small.DoctorSettings,
    small.TemplatesSettings,
    small.SchemaSettings,
    small.DocsSettings,
)
