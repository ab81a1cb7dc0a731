"""How one dataset is read: its resolved settings, from the dataset's and the command's settings.

spec = complete_dataset("chats", DatasetSettings(path="chats.csv", source_column="q"), {"model_max_length": 512})
spec.source_column, spec.model_max_length, spec.train_on    # "q", 512, "all"
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from t5tune.errors import SettingsError
from t5tune.settings.dataset_list import DatasetName, DatasetSettings
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.record_format import (
    KINDS,
    NOT_OF_PAIRED_LINES,
    NOT_OF_PREFERENCES,
    NOT_OF_RAW_TEXT,
    PAIR_FORMATS,
)

COLUMNS = {"source_column", "target_column", "rejected_column"}
SHARED = DatasetSettings.model_fields.keys() - {"path", "name", "weight", "data_subset", "data_split"}
"""Settings of a command that apply to each of its datasets."""


def _find_kind(own: Mapping[str, Any]) -> str | None:
    return KINDS[own["objective"]] if "objective" in own else None


RULES: tuple[tuple[Callable[[Mapping[str, Any], str], bool], set[str]], ...] = (
    # (whether the dataset's values make settings of the command meaningless, these settings)
    (
        lambda own, _: _find_kind(own) == "raw text",
        {"source_prefix", "target_column", "rejected_column", "data_format", "pair_lines", *NOT_OF_RAW_TEXT},
    ),
    (lambda own, _: _find_kind(own) not in (None, "raw text"), {"denoisers"}),
    (lambda own, _: bool(own.get("pair_lines")), NOT_OF_PAIRED_LINES),
    (lambda own, _: _find_kind(own) == "pairs", {"pair_lines", *NOT_OF_PREFERENCES}),
    (lambda own, _: own.get("data_format") not in (None, *PAIR_FORMATS), {"source_prefix", "pair_lines", *COLUMNS}),
    # a user who names one column describes the whole layout
    (lambda own, _: bool(COLUMNS & own.keys()), {"data_format", "pair_lines", *COLUMNS}),
    (lambda own, data_format: bool(own.get("source_prefix")) and data_format not in PAIR_FORMATS, {"data_format"}),
)
"""The second argument is the command's data_format. `encoding` and `header` have no rule: they apply to files of text
and to tables, and do no harm elsewhere."""


class DatasetSpec(DatasetSettings):
    """A dataset's resolved settings. `model_fields_set` has those that aren't t5tune's defaults.

    Args:
        path: the data to read; with a cache, the given folder.
        cache: the folder of its token cache if it is already prepared.
        made_from: the inputs of this token cache, as in its manifest.
    """

    is_complete: ClassVar[bool] = True

    name: DatasetName
    cache: Path | None = None
    made_from: dict[str, Any] = {}


def list_shared(settings: Settings) -> dict[str, Any]:
    """List the given settings of a command that apply to all of its datasets."""
    names = SHARED & settings.model_fields_set
    return {name: getattr(settings, name) for name in type(settings).model_fields if name in names}


def complete_dataset(name: str, dataset: DatasetSettings, *below: Mapping[str, Any]) -> DatasetSpec:
    """Resolve a dataset's settings: its values win, then the mappings in `below`, in this order.

    Raises:
        SettingsError: settings conflict.
    """
    values = dataset.list_given()
    for defaults in below:
        values = put_over(values, defaults)
    return DatasetSpec(name=name, path=dataset.path, weight=dataset.weight, **values)


def check_objective(dataset: DatasetSpec, objective: str) -> None:
    """Check that a dataset fits the command's objective.

    Raises:
        SettingsError: only one of the objectives learns from preference pairs or labels, or these differ.
    """
    kinds = {dataset.kind, KINDS[objective]}
    if dataset.objective != objective and ("labels" in kinds or ("pairs" in kinds and len(kinds) > 1)):
        problem = f"objective is {dataset.objective} here and {objective} for the run"
        what = "labels" if "labels" in kinds else "preference pairs"
        raise SettingsError(f"{problem}; {what} can't be mixed with other data")


def put_over(own: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Put a dataset's values over other values, leaving out those that its values make meaningless."""
    dropped = set().union(*(names for has_other, names in RULES if has_other(own, below.get("data_format", "auto"))))
    return {**{name: value for name, value in below.items() if name not in dropped}, **own}
