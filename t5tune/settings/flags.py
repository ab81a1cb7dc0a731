"""Write settings as the words of a command line, which read back as the same settings.

list_flags(settings, ["bf16", "q_lora", "lora_r"])    # [["--no-bf16"], ["--q-lora"], ["--lora-r", "16"]]
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, get_args

from t5tune.settings.dataset_list import PATHS_OF_DATASETS, DatasetSettings
from t5tune.settings.field_types import Settings, get_extra


def list_flags(settings: Settings, names: Iterable[str], given: Collection[str] = ()) -> Iterator[list[str]]:
    """List the words of each of these settings that differs from its default or is `given`, if flags can write it."""
    values, fields = settings.model_dump(mode="json"), type(settings).model_fields
    without = list_without_flags(settings)
    for data, paths in PATHS_OF_DATASETS.items():
        if values.get(data) and data not in without:
            values[paths] = [f"{dataset['path'][0]}:{_format_weight(dataset['weight'])}" for dataset in values[data]]
    for name in names:
        value, flag = values[name], settings.format_option(name)
        is_in_datasets = any(data in without for data, paths in PATHS_OF_DATASETS.items() if paths == name)
        if is_in_datasets or get_extra(fields[name], "yaml_only"):
            continue
        # q_lora turns bf16 on where it isn't set
        is_off = name == "bf16" and value is False and values.get("q_lora", False)
        if value == fields[name].get_default() and name not in given and not is_off:
            continue
        if value is None and bool in get_args(fields[name].annotation):
            continue  # no flag says that a boolean isn't set
        if isinstance(value, bool):
            yield [flag if value else f"--no-{flag.removeprefix('--')}"]
            continue
        texts = [str(item) for item in (value if isinstance(value, list) else ["none" if value is None else value])]
        # a value that begins with a dash would be read as a flag, and an empty list as a flag without its value
        is_attached = not texts or any(text.startswith("-") for text in texts)
        yield [f"{flag}={text}" for text in texts or [""]] if is_attached else [flag, *texts]


def list_without_flags(settings: Settings) -> dict[str, Any]:
    """List the settings that differ from their defaults and can't be written as flags: name -> JSON value."""
    found: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if get_extra(field, "yaml_only") and value != field.get_default():
            # datasets that differ only in their paths and weights can: a.jsonl:2 b.jsonl:1
            are_plain = name in PATHS_OF_DATASETS and all(map(_is_plain, value))
            found |= {} if are_plain else {name: settings.model_dump(mode="json", include={name})[name]}
    return found


def _is_plain(dataset: DatasetSettings) -> bool:
    return len(dataset.path) == 1 and dataset.model_fields_set == {"path", "weight"}


def _format_weight(weight: float) -> str:
    short = f"{weight:g}"
    return short if float(short) == weight else repr(weight)
