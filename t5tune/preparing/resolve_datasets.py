"""Decide how each dataset is read, for prepare, train and evaluate. Nothing else decides it.

The first of these that has a value counts:

1. the dataset's own settings; for a token cache, the settings that it was made with
2. for held-out data of train: how train reads the dataset of the same name
3. the command's settings, where they suit the dataset's own (the rules of settings/dataset_spec.py)
4. for data of evaluate: how the dataset of the same name was read in training, else how the main dataset was read
5. the defaults
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5tune.checkpoints.training_data import DatasetTraining, TrainingData
from t5tune.data.caches.manifest import read_manifest
from t5tune.data.caches.prepared import find_caches, has_examples
from t5tune.data.tokens.templates import Template, load_template
from t5tune.errors import DataError, SettingsError
from t5tune.formatting import shorten
from t5tune.io.reasons import join_first
from t5tune.progress import Note, Report, silent
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_list import DatasetSettings, name_datasets
from t5tune.settings.dataset_spec import SHARED, DatasetSpec, check_objective, complete_dataset, put_over
from t5tune.settings.groups.record_format import KINDS, ReadingSettings

READING = select_settings(ReadingSettings, Affects.INFERENCE)
LAYOUT = {*READING} - {"source_prefix"}
INHERITED = DatasetSettings.model_fields.keys() - {"path", "name", "weight", "num_data", "data_split"}
"""Settings of a training dataset that apply to the evaluation dataset of the same name."""


def resolve_datasets(
    datasets: Sequence[DatasetSettings],
    command: Mapping[str, Any],
    *,
    setting: str = "data",
    trained: Sequence[DatasetSpec] = (),
    recorded: TrainingData | None = None,
    must_match: Mapping[str, Any] | None = None,
    find_template: Callable[[str], Template | None] = load_template,
    allows_several: bool = False,
    report: Report = silent,
) -> tuple[DatasetSpec, ...]:
    """Decide how each dataset is read.

    Args:
        command: the settings that are given for all of them.
        setting: the setting that lists the datasets, for messages.
        trained: the datasets that train reads, if the resolved datasets are its held-out data.
        recorded: how the model's training examples were made, if the resolved datasets evaluate the model.
        must_match: settings of the whole command that can't apply to token caches. If all datasets are token caches,
            these must have been made with the same values.
        find_template: finds the conversation template that a value of the setting means.
        allows_several: whether a dataset may be the folder of several token caches.

    Raises:
        DataError: a token cache is broken, or given together with other data.
        SettingsError: settings conflict with each other, or with the values of a token cache.
    """
    names, caches = name_datasets(datasets), [_find_given_cache(each, setting, allows_several) for each in datasets]
    namesakes = {each.name: each.list_given(INHERITED) for each in trained}
    of_all = (must_match or {}) if all(caches) else {}
    specs, problems = list[DatasetSpec](), dict[str, str]()
    for name, dataset, cache in zip(names, datasets, caches, strict=True):
        if cache is not None:
            specs.append(_describe_cache(name, dataset, cache, command))
            problems = _find_conflicts({**of_all, **dataset.list_given()}, cache, find_template) | problems
            continue
        layers: list[Mapping[str, Any]] = [namesakes.get(name, {}), command]
        try:
            if recorded is not None:
                layers, note = _add_recorded(dataset, command, recorded)
                if note is not None:
                    report(Note(f"dataset {name}: {note}" if len(datasets) > 1 else note))
            specs.append(complete_dataset(name, dataset, *layers))
            trained_labels = None if recorded is None else recorded.labels
            default = "sft" if trained_labels is None else trained_labels.objective
            check_objective(specs[-1], command.get("objective", default))
        except SettingsError as error:
            where = f"{setting}: {name}: " if dataset.name else ""
            raise SettingsError(*(f"{where}{problem}" for problem in error.problems)) from None
    if problems:
        raise SettingsError(*problems.values())
    return tuple(specs)


def _find_given_cache(dataset: DatasetSettings, setting: str, allows_several: bool) -> Path | None:
    """Return the token cache that a dataset names; None if it names data."""
    path, *others = dataset.path
    folder = Path(path)
    if not has_examples(folder):
        return None
    if others:
        problem = f"{setting}: {path}: a token cache can't be combined with other data ({others[0]})"
        raise DataError(problem, hint="give it alone, or give each dataset a weight: cache:1 more.jsonl:1")
    caches = find_caches(folder)
    if len(caches) == 1:
        return caches[0]
    if allows_several:
        return folder
    problem = f"{setting}: {path}: a token cache of several datasets can't be combined with other datasets"
    raise DataError(problem, hint=f"give the caches in it: {join_first(list(map(str, caches)))}")


def _describe_cache(name: str, dataset: DatasetSettings, cache: Path, command: Mapping[str, Any]) -> DatasetSpec:
    """Describe how the examples of a token cache were made; `num_data` is the number of them to use."""
    inputs = read_manifest(find_caches(cache)[0])["inputs"]
    values = {key: inputs[key] for key in SHARED & inputs.keys()}
    if KINDS[inputs["objective"]] == KINDS[command.get("objective", "sft")] == "pairs":  # dpo and orpo read the same
        values["objective"] = command["objective"]
    values["num_data"] = dataset.num_data or command.get("num_data")
    values["conversation_template"] = None  # the cache's template is in its folder
    return DatasetSpec.model_construct(
        name=name, path=dataset.path, weight=dataset.weight, cache=cache, made_from=inputs, **values
    )


def _find_conflicts(
    given: Mapping[str, Any], folder: Path, find_template: Callable[[str], Template | None]
) -> dict[str, str]:
    problems: dict[str, str] = {}
    step = "leave it out, or give the data in place of the cache"
    for cache in find_caches(folder):
        manifest = read_manifest(cache)
        inputs, ignored = manifest["inputs"], {"num_data"}
        # these may have no effect on this cache
        ignored |= {"split_seed"} if not manifest["eval_fraction"] else set()
        ignored |= {"seed"} if KINDS[inputs["objective"]] != "raw text" else set()
        if KINDS[inputs["objective"]] == KINDS[given.get("objective", "sft")] == "pairs":
            ignored |= {"objective"}
        for name in sorted(given.keys() & inputs.keys() - ignored):
            if given[name] != inputs[name]:
                values = (
                    f"{shorten(repr(given[name]), 80)} here, {shorten(repr(inputs[name]), 80)} in the cache {cache}"
                )
                problems.setdefault(name, f"{name}: {values}; {step}")
        name = "conversation_template"
        template = None if given.get(name) is None else find_template(given[name])
        if template is not None and template.hash != inputs.get("template"):
            problems.setdefault(name, f"{name}: {given[name]}: the cache {cache} uses a different template; {step}")
    for name in ("data_subset", "data_split"):
        if (value := given.get(name)) is not None:
            why = f"only for a whole dataset on the Hub, but {folder} is a token cache; leave it out"
            problems.setdefault(name, f"{name}: {value}: {why}")
    return problems


def _add_recorded(
    dataset: DatasetSettings, command: Mapping[str, Any], recorded: TrainingData
) -> tuple[list[Mapping[str, Any]], str | None]:
    """Find the values after a dataset's own: the command's settings, then how training read its data.

    Raw text is read like raw text only, and other records like other records.

    Returns:
        These, and a note that lists the values from training, if there are any.
    """
    namesake = next((each for each in recorded.datasets if each.name == dataset.name), None)
    first: dict[str, Any] = {}
    if (labels := recorded.labels) is not None:
        first = {"objective": labels.objective, "source_words": labels.source_words}
    elif namesake is not None and KINDS[namesake.objective] == "raw text":
        first = {"objective": namesake.objective}
    given = put_over(put_over(dataset.list_given(), first), command)
    by_template = [each for each in recorded.datasets if each.name == given.get("conversation_template")]
    candidates: list[TrainingData | DatasetTraining] = [namesake] if namesake is not None else [*by_template]
    is_raw_text = KINDS[given.get("objective", "sft")] == "raw text"
    candidates = candidates or [recorded, *recorded.datasets]
    found = next((each for each in candidates if (KINDS[each.objective] == "raw text") == is_raw_text), None)
    if found is None:
        return [first, command], None
    left_out = LAYOUT if given.keys() & LAYOUT else set[str]()  # a user who names one column describes the whole layout
    names = [name for name in (*READING, *(["denoisers"] if is_raw_text else [])) if name not in left_out]
    defaults = {name: field.get_default() for name, field in DatasetSpec.model_fields.items()}
    values = {name: value for name in names if (value := getattr(found, name)) != defaults[name]}
    inherited = {name: value for name, value in put_over(given, values).items() if name not in given}
    note = f"as in training: {', '.join(f'{name} {_format(value)}' for name, value in inherited.items())}"
    template = {} if found is not namesake else {"conversation_template": dataset.name}
    return [first, command, {**values, **template}], note if inherited else None


def _format(value: str | list[str] | None) -> str:
    return " ".join(value) if isinstance(value, list) else repr(value)
