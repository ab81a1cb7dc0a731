"""Fine-tune T5-family encoder-decoders with LoRA and QLoRA.

    from t5tune import TrainSettings, progress_bar, train

    run = train(TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir="run"), progress_bar())
    run.metrics(), run.load()

Imports from here load their libraries at first use, and keep them quiet. See docs/python.md. Type checkers read
__init__.pyi.
"""

from functools import wraps
from importlib import import_module
from typing import Any

from t5tune.version import __version__

_SETTINGS = (
    "ChatSettings", "CompareSettings", "DatasetSettings", "DoctorSettings", "EvaluateSettings", "ExportSettings",
    "InspectSettings", "MergeSettings", "PlanSettings", "PrepareSettings", "PushSettings", "ServeSettings",
    "TrainSettings", "TrimSettings", "load_settings",
)  # fmt: skip
_COMMANDS = (
    "chat", "compare", "doctor", "evaluate", "export", "inspect", "merge", "plan", "prepare", "push", "serve", "train",
    "trim",
)  # fmt: skip
_HOMES = {
    **dict.fromkeys(_SETTINGS, "settings"),
    **{name: f"commands.{name}" for name in _COMMANDS},
    **dict.fromkeys(("Chatter", "Labeler"), "commands.chat"),
    "sweep": "commands.train.sweep",
    "Turn": "data.reading.formats",
    **dict.fromkeys(("SettingsError", "Stopped", "T5TuneError"), "errors"),
    "progress_bar": "progress_bar",
    "read_metrics": "runs.metrics_log",
    "read_result": "runs.result",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 't5tune' has no attribute {name!r}")
    from t5tune.compat.lazy_imports import import_lazily
    from t5tune.compat.quiet import quiet_libraries
    from t5tune.model.device import let_gpu_memory_grow, limit_openmp_spinning

    import_lazily()
    limit_openmp_spinning()
    let_gpu_memory_grow()
    with quiet_libraries():
        found = getattr(import_module(f"t5tune.{_HOMES[name]}"), name)
    value = _make_callable(found) if name in _COMMANDS else found
    globals()[name] = value
    return value


def _make_callable(function: Any) -> Any:
    """Check the arguments of each call to a command's function, and keep the libraries quiet during it."""
    from t5tune.compat.quiet import quiet_libraries
    from t5tune.settings import COMMANDS
    from t5tune.settings.calls import check_call

    name = function.__name__
    model = next(model for model in COMMANDS if model.command == name)

    @wraps(function)
    def call(settings: Any = None, report: Any = None, *more: Any, **options: Any) -> Any:
        report = check_call(name, settings, model, report)
        with quiet_libraries():
            return function(settings, report, *more, **options)

    call.__module__ = __name__  # where pickle finds it again
    return call


def __dir__() -> list[str]:
    return __all__
