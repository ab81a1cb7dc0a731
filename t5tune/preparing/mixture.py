"""Prepare several datasets for one run: a token cache of each, with a common tokenizer, in the folder of a mixture.

manifest, facts = prepare_mixture(settings, report, Origin())
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import find_base
from t5tune.checkpoints.training_data import DatasetTraining, TrainingData, read_training_data, write_training_data
from t5tune.data.cache import is_cache, open_cache
from t5tune.data.cache_reuse import make_resume_error
from t5tune.data.formats import Conversation
from t5tune.data.mixing import Mixing, choose_mixing
from t5tune.data.mixture import SUMMED, Dataset, Mixture, describe_shares, is_mixture, list_caches
from t5tune.data.sources import is_dataset_name
from t5tune.data.vocabulary import ExtendedTokenizer
from t5tune.errors import DataError
from t5tune.file_names import MIXTURE_FILE, TEMPLATE_FILE, TRAINING_DATA_FILE
from t5tune.io.atomic import write_file, write_json
from t5tune.io.reasons import join_first
from t5tune.io.yaml_file import to_yaml
from t5tune.preparing.dataset import Origin, choose_vocabulary, prepare_dataset, read_sample
from t5tune.progress import Note, Report
from t5tune.settings import PrepareSettings
from t5tune.settings.datasets import DatasetSettings, name_datasets

MIXTURE_FILES = {MIXTURE_FILE, TEMPLATE_FILE, TRAINING_DATA_FILE}
NOT_INHERITED = ("data", "mixing", "mixing_temperature", "mixing_cap")


def prepare_mixture(settings: PrepareSettings, report: Report, origin: Origin) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the token cache of each dataset that isn't one already, unless it is up to date, and mixture.json.

    Returns:
        The manifest of the mixture, and what the result says about this call.

    Raises:
        DataError, ModelError, SettingsError: see `prepare`; they name the dataset.
    """
    datasets = list(settings.data or [])
    names = name_datasets(datasets)
    folder = settings.output_dir
    _check_folder(folder, names, origin)
    before = list_caches(folder) if is_mixture(folder) else {}
    vocabulary = _choose_common_vocabulary(settings, datasets, origin)
    places: dict[str, Path] = {}
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for name, dataset in zip(names, datasets, strict=True):
        if (given := find_given_cache(dataset)) is not None:
            places[name] = given
            continue
        places[name] = folder / name
        report(Note(f"dataset {name}: {join_first(dataset.path)}"))
        own = _make_settings(settings, dataset, places[name])
        source = _find_source(origin, name)
        found.append(prepare_dataset(own, report, replace(origin, tokenizer_source=source, vocabulary=vocabulary)))
    facts: dict[str, Any] = {
        "up_to_date": all(fact["up_to_date"] for _, fact in found),
        "shard": next((fact["shard"] for _, fact in found), None),
        "joined": None if not settings.join and settings.shard is None else all(fact["joined"] for _, fact in found),
    }
    if facts["joined"] is False:  # other parts are still missing
        counts = {name: sum(manifest.get(name, 0) for manifest, _ in found) for name in SUMMED}
        return {**found[0][0], **counts}, facts
    mixing = choose_mixing(settings) or Mixing()
    parts = [Dataset(name, open_cache(places[name]), each.weight) for name, each in zip(names, datasets, strict=True)]
    mixture = Mixture(folder, parts, mixing)
    _check_tokenizers(mixture, origin.setting)
    training, _ = mixture.split_as_prepared()
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / TEMPLATE_FILE, to_yaml(dict(vars(parts[0].cache.template))).encode())
    write_training_data(folder, _join_training_data(training))
    write_json(folder / MIXTURE_FILE, manifest := {**mixture.manifest, "datasets": training.manifest["datasets"]})
    for name, cache in before.items():
        if name not in names and cache.parent == folder and is_cache(cache):
            shutil.rmtree(cache)
            report(Note(f"{cache}: removed, since this dataset is no longer among the data"))
    if not origin.is_for_run:
        for note in describe_shares(training):
            report(note)
    return manifest, {**facts, "datasets": {part.name: len(part.cache) for part in parts}}


def find_given_cache(dataset: DatasetSettings) -> Path | None:
    """Return the token cache that a dataset names; None if it names data."""
    path = Path(dataset.path[0])
    return path if is_cache(path) else None


def _check_folder(folder: Path, names: Sequence[str], origin: Origin) -> None:
    """Check that the folder can get the caches of these datasets.

    Raises:
        DataError: it has other content.
        SettingsError: a run uses the mixture in it, which has other datasets.
    """
    if is_mixture(folder):
        if origin.in_use and (before := list(list_caches(folder))) != list(names):
            line = f"data: the datasets {', '.join(before)} before, {', '.join(names)} now"
            raise make_resume_error(folder, {"data": line})
        return
    if is_cache(folder) and origin.in_use:
        raise make_resume_error(folder, {"data": "data: one dataset before, several now"})
    if folder.exists() and not folder.is_dir():
        raise DataError(f"output_dir: {folder}: is a file", hint="choose another output_dir")
    # what an earlier call that was interrupted has left: caches, and the folders in which they are written
    others = [] if not folder.is_dir() else [
        path.name for path in folder.iterdir()
        if not (is_cache(path) or path.name in MIXTURE_FILES or path.name.startswith(".") or path.suffix == ".parts")
    ]  # fmt: skip
    if is_cache(folder) or others:
        what = (
            "is the token cache of a single dataset" if is_cache(folder) else f"contains {join_first(sorted(others))}"
        )
        raise DataError(f"output_dir: {folder}: {what}, not a mixture of datasets", hint="choose another output_dir")


def _make_settings(settings: PrepareSettings, dataset: DatasetSettings, folder: Path) -> PrepareSettings:
    """Make the settings that prepare one dataset: what it gives itself, and otherwise those of all."""
    names = settings.model_fields_set - {*NOT_INHERITED, "data_path", "output_dir"}
    values = {name: getattr(settings, name) for name in names}
    if not any(map(is_dataset_name, dataset.path)):  # a part of a dataset on the Hub, which this isn't
        values |= {"data_subset": None, "data_split": None}
    return PrepareSettings(**{**values, **dataset.list_given(), "data_path": dataset.path, "output_dir": folder})


def _choose_common_vocabulary(
    settings: PrepareSettings, datasets: Sequence[DatasetSettings], origin: Origin
) -> ExtendedTokenizer:
    """Take the tokenizer of a token cache among the datasets, or extend the base's with what all of them need."""

    def read_all() -> Iterator[Conversation]:
        for dataset in datasets:
            yield from read_sample(_make_settings(settings, dataset, settings.output_dir), origin.setting)

    caches = [given for dataset in datasets if (given := find_given_cache(dataset)) is not None]
    source = next(iter(caches), origin.tokenizer_source)
    return choose_vocabulary(settings, find_base(settings), source, read_all())


def _find_source(origin: Origin, name: str) -> Path | None:
    """Return where a dataset's conversation template comes from: of a mixture, the dataset of the same name."""
    source = origin.tokenizer_source
    if source is None or not is_mixture(source):
        return source
    return list_caches(source).get(name, source)


def _check_tokenizers(mixture: Mixture, setting: str) -> None:
    """Check that all caches were made with the same tokenizer: otherwise the same id means different tokens.

    Raises:
        DataError: two differ.
    """
    first, *others = mixture.datasets
    for other in others:
        if other.cache.manifest["inputs"]["tokenizer"] != first.cache.manifest["inputs"]["tokenizer"]:
            problem = f"{setting}: {other.cache.folder}: its tokenizer isn't that of {first.cache.folder}"
            hint = "give the data of both in place of the caches, or prepare both with the same --add-tokens"
            raise DataError(problem, hint=hint)


def _join_training_data(mixture: Mixture) -> TrainingData:
    """Make the description of how the examples of all datasets were made; at its top level is the first dataset."""
    made = [read_training_data(dataset.cache.folder) for dataset in mixture.datasets]
    datasets = [
        DatasetTraining(dataset.name, round(share, 6), dict(vars(dataset.cache.template)), **own.list_reading())
        for dataset, own, share in zip(mixture.datasets, made, mixture.shares, strict=True)
        if own is not None
    ]
    first = next(each for each in made if each is not None)
    has_earlier_turns = any(each.has_earlier_turns for each in made if each is not None)
    return replace(first, has_earlier_turns=has_earlier_turns, datasets=datasets)
