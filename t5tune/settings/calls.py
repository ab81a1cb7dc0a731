"""Check the arguments of a call from Python, which no parser has checked."""

import inspect
from typing import Any

from t5tune.errors import SettingsError
from t5tune.formatting import shorten
from t5tune.progress import Report, silent
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.constraints import CONSTRAINTS
from t5tune.settings.messages import shorten_value

TEXT_SETTINGS = (
    "save_preferences", *CONSTRAINTS, "choices_by", "max_new_tokens", "num_beams", "temperature", "top_p", "seed",
    "metrics", "metric", "compare_base", "add_tokens", "system", "conversation_template",
)  # fmt: skip
"""Settings of inference that only a model that writes texts has."""


def check_call(name: str, settings: Any, model: type[Settings], report: Any) -> Report:
    """Return the report of a call to the function `name`, or `silent` in place of None.

    Raises:
        SettingsError: the settings aren't the function's, or the report isn't a function that takes an event.
    """
    if not isinstance(settings, model):
        raise SettingsError(f"settings: {shorten_value(settings)}", hint=f"call {name}({model.__name__}(…))")
    if report is None:
        return silent
    if not _takes_event(report):
        shown = getattr(report, "__name__", shorten_value(report))
        raise SettingsError(f"report: {shown}: not a function that takes an event", hint="call progress_bar()")
    checked: Report = report
    return checked


def refuse_text_settings(settings: Any, reason: str = "") -> None:
    """Raise SettingsError for the first setting that a model with labels doesn't have, unless it is the default."""
    reason = reason or f"{settings.model_name_or_path} predicts labels, and writes no text"
    for name in TEXT_SETTINGS:
        field, value = type(settings).model_fields.get(name), getattr(settings, name, None)
        if field is not None and value != field.get_default(call_default_factory=True):
            raise SettingsError(f"{name}: {shorten(str(value), 80)}: {reason}", hint="leave it out")


def _takes_event(report: Any) -> bool:
    try:
        inspect.signature(report).bind(None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True
