"""Several datasets in one run, each with its path, weight, columns, prefix and conversation template.

    data: [{path: a.jsonl, weight: 2}, {path: b.csv, weight: 1, source_prefix: "summarize: "}]

`--data-path a.jsonl:2 b.jsonl:1` means the same where nothing but the weights differs.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, model_serializer
from pydantic_core import CoreSchema

from t5tune.file_names import (
    COMPRESSED_SUFFIXES,
    JSON_SUFFIXES,
    MIXTURE_FILE,
    TABLE_SUFFIXES,
    TEMPLATE_FILE,
    TEXT_SUFFIXES,
    TRAINING_DATA_FILE,
)
from t5tune.settings.field_types import (
    DataList,
    NoneIfUnset,
    OptionalCount,
    OptionalText,
    exists,
    parse_unset,
    read_data,
)
from t5tune.settings.groups.record_format import ConversationSettings, ReadingSettings, SelectionSettings

PATHS_OF_DATASETS = {"data": "data_path", "eval_data": "eval_data_path"}
"""Setting with datasets -> the setting with the paths of all of them."""
RESERVED_NAMES = {MIXTURE_FILE, TEMPLATE_FILE, TRAINING_DATA_FILE}
MAX_NAME_LENGTH = 64
_WEIGHT = re.compile(r"(.+)(?<!\.xlsx):(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)", re.DOTALL | re.IGNORECASE)
_PORT = re.compile(r"\w+://[^/]*")  # host:8080 of a URL without a path
_USER = re.compile("://[^/]*@")
_STORED = re.compile(r"(^|\.)records-[0-9a-f]{12}(\.table)?$")  # see settings/records_in_memory.py
_NOT_IN_NAME = re.compile("[^A-Za-z0-9._-]+")
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_LENGTH - 1}}}")


def _check_name(name: str) -> str:
    if is_reserved(name):
        raise ValueError("a file next to the datasets has this name; choose a different name")
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected letters, digits, `.`, `_` and `-`, at most {MAX_NAME_LENGTH} of them")
    return name


DatasetName = Annotated[str, AfterValidator(_check_name)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DatasetSettings(ReadingSettings, ConversationSettings, SelectionSettings):
    """A dataset of a mixture. The command's settings apply unless the dataset sets them."""

    panel: ClassVar[str] = "Data"
    is_complete: ClassVar[bool] = False

    path: DataList = Field(min_length=1)
    name: Annotated[DatasetName | None, NoneIfUnset] = None
    weight: Weight = 1.0
    data_subset: OptionalText = None
    data_split: OptionalText = None
    num_data: OptionalCount = None

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Allow a path in place of a dataset, which `combine_datasets` reads."""
        return {"anyOf": [{"type": "string"}, {**handler.resolve_ref_schema(handler(schema))}]}

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, serialize: Any) -> dict[str, Any]:
        """Write only given settings: the command's settings, not the defaults, fill the rest."""
        return {name: value for name, value in serialize(self).items() if name in self.model_fields_set}

    def list_given(self, fields: Collection[str] | None = None) -> dict[str, Any]:
        """Return the settings given for this dataset, or those in `fields`, without its path, name and weight."""
        names = self.model_fields_set - {"path", "name", "weight"}
        names = names if fields is None else names & set(fields)
        return {name: getattr(self, name) for name in DatasetSettings.model_fields if name in names}


def is_reserved(name: str) -> bool:
    """Whether t5tune uses this name for its files in the folder of a mixture."""
    return name.casefold() in RESERVED_NAMES or name.casefold().endswith(".parts")


def split_weight(path: str) -> tuple[str, str | None]:
    """Split `a.jsonl:2` into path and weight; if a file has the whole name, the weight is None."""
    match = _WEIGHT.fullmatch(path)
    if match is None or _PORT.fullmatch(match[1]) or exists(path):
        return path, None
    return match[1], match[2]


def combine_datasets(values: Mapping[str, Any], data: str, data_path: str) -> Mapping[str, Any]:
    """Complete settings before validation: put datasets with weights in `data_path` into `data`, and all paths of
    `data` into `data_path`. A `data_path` without weights is a single dataset, and stays as it is.
    """
    given, paths = parse_unset(values.get(data)), values.get(data_path)
    if given is None:
        found = [split_weight(path) if isinstance(path, str) else (path, None) for path in _list_items(paths)]
        if all(weight is None for _, weight in found):
            return values
        # a path without a weight has the weight 1
        datasets: list[Any] = [{"path": path, "weight": 1 if weight is None else weight} for path, weight in found]
        return {**values, data: datasets, data_path: [path for path, _ in found]}
    datasets = [_read_dataset(item) for item in _list_items(given)]
    flat = [path for dataset in datasets for path in _list_paths(dataset)]
    if paths is not None and list(map(str, _list_items(paths))) != list(map(str, flat)):
        raise ValueError(f"{data}: conflicts with {data_path}; give only one of them")
    # validation of `data` refuses items that aren't datasets
    return {**values, data: datasets, data_path: flat or ["?"]}


def _list_items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


DatasetList = Annotated[
    list[DatasetSettings], BeforeValidator(_list_items, json_schema_input_type=list[DatasetSettings] | DatasetSettings)
]
"""A list of datasets, or a single dataset; `combine_datasets` reads its items."""


def _read_dataset(item: Any) -> Any:
    """Read a text as the path of a dataset, and store records in memory in a file."""
    if isinstance(item, str | os.PathLike):
        path, weight = split_weight(os.fspath(item))
        return {"path": path} if weight is None else {"path": path, "weight": weight}
    if not (isinstance(item, Mapping) and "path" in item):
        return item
    paths = read_data(item["path"])
    found = [split_weight(path) for path in paths or [] if isinstance(path, str)]
    weights = [(path, weight) for path, weight in found if weight is not None]
    if not weights:
        return {**item, "path": paths}
    (path, weight), *_ = weights
    if len(paths) > 1 or "weight" in item:
        raise ValueError(f"data: path: {path}:{weight}: give the weight of the dataset as its `weight`")
    return {**item, "path": [path], "weight": weight}


def _list_paths(dataset: Any) -> list[Any]:
    if isinstance(dataset, DatasetSettings):
        return dataset.path
    return _list_items(dataset.get("path")) if isinstance(dataset, Mapping) else []


def name_datasets(datasets: Sequence[DatasetSettings]) -> list[str]:
    """Return the given names of datasets, or different names made from their first paths.

    name_datasets([DatasetSettings(path="chats.jsonl.gz"), DatasetSettings(path="hf://datasets/owner/chats")])
    # ["chats", "chats-2"]
    """
    given = [dataset.name for dataset in datasets if dataset.name is not None]
    check_names_differ(given)
    taken, names = {name.casefold() for name in given}, list[str]()
    for dataset in datasets:
        name = dataset.name
        if name is None:
            stem = _find_stem(dataset.path[0])
            numbered = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
            name = next(each for each in numbered if each.casefold() not in taken and not is_reserved(each))
            taken.add(name.casefold())
        names.append(name)
    return names


def check_names_differ(names: Sequence[str]) -> None:
    """Raise a ValueError if two datasets have the same name."""
    folded = [name.casefold() for name in names]  # folders get these names, and some disks ignore case
    if twice := [name for name in names if folded.count(name.casefold()) > 1]:
        raise ValueError(f"name: {twice[0]}: two datasets have this name; rename one of them")


def check_weights(weights: Sequence[float]) -> None:
    """Raise a ValueError if every weight is 0."""
    if not any(weights):
        raise ValueError("every weight is 0, so there is nothing to train on")


def _find_stem(path: str) -> str:
    if "://" in path:  # leave out the query and the password, which may be secret
        path = _USER.sub("://", re.split("[?#]", path)[0])
    parts = [part for part in path.partition("@")[0].split("/") if part and "*" not in part]
    last = parts[-1] if parts else ""
    for ends in (COMPRESSED_SUFFIXES, JSON_SUFFIXES | TABLE_SUFFIXES | TEXT_SUFFIXES):
        last = next((last[: -len(end)] for end in ends if last.lower().endswith(end)), last)
    if _STORED.search(last):
        return "records"
    return _NOT_IN_NAME.sub("-", last).strip("-._")[:MAX_NAME_LENGTH] or "data"
