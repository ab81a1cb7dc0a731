"""Prepare several datasets for one run: a token cache of each, with a common tokenizer, in the folder of a mixture.

manifest, facts = prepare_mixture(settings, report, Origin())
"""

import glob
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import find_base, pin_base
from t5tune.checkpoints.training_data import DatasetTraining, TrainingData, read_training_data, write_training_data
from t5tune.data.caches.cache import CACHE_CONTENTS, is_cache, open_cache, read_manifest
from t5tune.data.caches.examples import (
    OLD_MIXTURE_FILE,
    SUMMED,
    Dataset,
    Mixture,
    check_datasets,
    describe_shares,
    is_left_over,
    is_mixture,
    list_caches,
    list_written_caches,
    read_mixture_manifest,
)
from t5tune.data.caches.mixing import Mixing, choose_mixing
from t5tune.data.reading.formats import Conversation
from t5tune.data.reading.remote_files import hide_query
from t5tune.data.tokens.templates import Template, load_template
from t5tune.data.tokens.vocabulary import ExtendedTokenizer
from t5tune.errors import DataError, SettingsError
from t5tune.file_names import CACHE_MANIFEST_FILE, MIXTURE_FILE, TEMPLATE_FILE
from t5tune.io.atomic import write_file, write_json
from t5tune.io.reasons import join_first
from t5tune.io.yaml_file import to_yaml
from t5tune.preparing.cache_reuse import make_resume_error
from t5tune.preparing.dataset import Origin, choose_vocabulary, prepare_dataset, read_sample
from t5tune.preparing.parts.parts import find_joined
from t5tune.preparing.parts.shard import find_shard
from t5tune.preparing.record_checks import name_rejected_file
from t5tune.progress import Note, Report
from t5tune.settings import PrepareSettings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_list import DatasetSettings, complete_dataset, name_datasets
from t5tune.settings.groups.data import DataSettings
from t5tune.settings.groups.record_format import PREFERENCE_OBJECTIVES


def prepare_mixture(settings: PrepareSettings, report: Report, origin: Origin) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the token cache of each dataset that isn't one already, unless it is up to date, and mixture.json.

    Returns:
        The manifest of the mixture, and what the result says about this call.

    Raises:
        DataError, ModelError, SettingsError: see `prepare`; they name the dataset.
    """
    datasets = dict(zip(name_datasets(settings.data or []), settings.data or [], strict=True))
    folder, settings = settings.output_dir, pin_base(settings, report)  # once for all datasets
    _check_folder(folder, list(datasets), origin)
    before = _read_manifest(folder)
    _check_given_caches(folder, datasets)
    if origin.run is None:
        _check_settings_of_caches(settings)
    if not origin.in_use:
        origin = replace(origin, before_replacing=lambda: _set_aside(folder))
    caches, prepared = _prepare_caches(settings, datasets, report, origin)
    facts = _join_facts(settings, prepared)
    if facts["joined"] is False:  # other parts are still missing
        return _add_counts(prepared), facts
    parts = [
        # a cache that was written here has num_data already
        Dataset(
            name, open_cache(caches[name]), dataset.weight, settings.num_data if find_given_cache(dataset) else None
        )
        for name, dataset in datasets.items()
    ]
    mixture = Mixture(folder, parts, choose_mixing(settings) or Mixing()).apply_num_data()
    manifest, training = _write_mixture(mixture, [each.cache for each in prepared], origin, report)
    facts["up_to_date"] = facts["up_to_date"] and manifest == before
    if origin.run is None:
        for note in describe_shares(training):
            report(note)
    return manifest, {**facts, "datasets": {part.name: len(part.cache) for part in mixture.datasets}}


@dataclass(frozen=True)
class _Prepared:
    """The folder of a dataset's cache, and what `prepare_dataset` returned."""

    cache: Path
    manifest: dict[str, Any]
    facts: dict[str, Any]


def _prepare_caches(
    settings: PrepareSettings, datasets: Mapping[str, DatasetSettings], report: Report, origin: Origin
) -> tuple[dict[str, Path], list[_Prepared]]:
    """Prepare the cache of each dataset that isn't one already. Return the folders of all, and what was prepared."""
    vocabulary = _choose_common_vocabulary(settings, datasets, origin)
    caches: dict[str, Path] = {}
    prepared: list[_Prepared] = []
    for name, dataset in datasets.items():
        if (given := find_given_cache(dataset)) is not None:
            caches[name] = given
            continue
        caches[name] = settings.output_dir / name
        report(Note(f"dataset {name}: {join_first([*map(hide_query, dataset.path)])}"))
        # a checkpoint has only the template of the main dataset
        own = replace(
            origin,
            tokenizer_source=_find_source(origin, name),
            vocabulary=vocabulary,
            checkpoint=None,
            rejected_file=origin.rejected_file or name_rejected_file(settings.output_dir),  # not among the caches
        )
        settings_of_it = complete_dataset(settings, dataset, output_dir=caches[name])
        prepared.append(_Prepared(caches[name], *prepare_dataset(settings_of_it, report, own)))
    return caches, [_look_again(each) for each in prepared]


def _look_again(prepared: _Prepared) -> _Prepared:
    """Look whether another process has joined the parts of a dataset while this one prepared the next datasets.

    Each process looks at all datasets after its last one, so at least the process that joined the last parts finds
    that all are joined, and writes mixture.json. Others may find it, too: then they write the same bytes.
    """
    if prepared.facts["joined"] is not False:
        return prepared
    joined = find_joined(prepared.cache, prepared.manifest)
    return prepared if joined is None else replace(prepared, manifest=joined, facts={**prepared.facts, "joined": True})


def _join_facts(settings: PrepareSettings, prepared: Sequence[_Prepared]) -> dict[str, Any]:
    """Say of all datasets what `prepare_dataset` says of each."""
    is_divided = settings.join or settings.shard is not None
    return {
        "up_to_date": all(each.facts["up_to_date"] for each in prepared),
        "shard": None if settings.shard is None else str(find_shard(settings.shard)),
        "joined": all(each.facts["joined"] for each in prepared) if is_divided else None,
    }


def _add_counts(prepared: Sequence[_Prepared]) -> dict[str, Any]:
    """Add up the counts of parts that aren't joined yet."""
    counts = {name: sum(each.manifest.get(name, 0) for each in prepared) for name in SUMMED}
    return {**prepared[0].manifest, **counts}


def _write_mixture(
    mixture: Mixture, written: Collection[Path], origin: Origin, report: Report
) -> tuple[dict[str, Any], Mixture]:
    """Write the files of a mixture besides its caches, and remove the caches of datasets that it doesn't have any more.

    Args:
        written: the caches that were written for it: only these may be removed once it doesn't have them any more.

    Returns:
        The manifest of the mixture, and what is left to train on.
    """
    check_datasets(mixture.datasets, origin.setting)
    folder, (training, _) = mixture.folder, mixture.split_as_prepared()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_cache(folder)  # if no dataset had to be prepared
    write_file(folder / TEMPLATE_FILE, to_yaml(dict(vars(mixture.main.cache.template))).encode())
    write_training_data(folder, _join_training_data(training))
    datasets = [
        {**facts, "written": dataset.cache.folder in written}
        for dataset, facts in zip(training.datasets, training.manifest["datasets"], strict=True)
    ]
    manifest = {**mixture.manifest, "datasets": datasets}
    # first the old caches, since the new mixture.json doesn't list them: if a kill comes between, the next one does it
    kept = {dataset.cache.folder.resolve() for dataset in mixture.datasets}
    _remove_old_caches(folder, [cache for cache in _list_old_caches(folder) if cache.resolve() not in kept], report)
    write_json(folder / MIXTURE_FILE, manifest)
    (folder / OLD_MIXTURE_FILE).unlink(missing_ok=True)
    return manifest, training


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read mixture.json; None if there is none, or it is broken, so that it is written again."""
    with suppress(DataError):
        return read_mixture_manifest(folder)
    return None


def _set_aside(folder: Path) -> None:
    """Rename mixture.json, because the folder is no mixture while only some of its caches are new; remove a cache."""
    _remove_cache(folder)
    with suppress(FileNotFoundError):  # there was none, or another process has renamed it
        (folder / MIXTURE_FILE).rename(folder / OLD_MIXTURE_FILE)


def _list_old_caches(folder: Path) -> list[Path]:
    """List the caches that were written for the mixture that the folder contained, not those that were given for it."""
    caches: list[Path] = []
    for file in (OLD_MIXTURE_FILE, MIXTURE_FILE):
        with suppress(DataError):  # there is no such file, or it is broken
            caches += list_written_caches(folder, file)
    return list(dict.fromkeys(caches))


def _remove_old_caches(folder: Path, caches: Sequence[Path], report: Report) -> None:
    """Remove caches in the folder that contain nothing else. Another process may do so at the same time."""
    for cache in caches:
        if cache.parent != folder:
            continue
        old_prefix = f".{cache.name}.old-"
        if is_cache(cache):
            with suppress(FileNotFoundError):
                if foreign := sorted({path.name for path in cache.iterdir()} - CACHE_CONTENTS):
                    why = f"since it contains {join_first(foreign)}"
                    report(Note(f"{cache}: no longer among the data, but kept, {why}"))
                    continue
                cache.rename(folder / f"{old_prefix}{uuid.uuid4().hex[:8]}")
                report(Note(f"{cache}: removed, since this dataset is no longer among the data"))
        for old in folder.glob(f"{glob.escape(old_prefix)}*"):  # also what a killed process has left
            shutil.rmtree(old, ignore_errors=True)


def find_given_cache(dataset: DatasetSettings) -> Path | None:
    """Return the token cache that a dataset names; None if it names data.

    Raises:
        DataError: it is a mixture, or more is given than the cache.
    """
    path = Path(dataset.path[0])
    if is_mixture(path):
        hint = "give its token caches, which are folders in it"
        raise DataError(f"data: {path}: a mixture can't be one of several datasets", hint=hint)
    if not is_cache(path):
        return None
    if extra := [*dataset.path[1:], *dataset.list_given()]:
        problem = f"data: {path}: is a token cache, whose examples are complete, but {extra[0]} is given, too"
        raise DataError(problem, hint="leave it out, or give the data in place of the cache")
    return path


def list_given_caches(datasets: Sequence[DatasetSettings]) -> list[Path]:
    """List the token caches that the datasets are; none if one of them isn't a cache, to which settings still apply.

    Raises:
        DataError: one is a mixture, or more is given than a cache.
    """
    caches = [cache for dataset in datasets if (cache := find_given_cache(dataset)) is not None]
    return caches if len(caches) == len(datasets) else []


def find_cache_conflicts(
    settings: DataSettings,
    caches: Sequence[Path],
    names: Collection[str],
    find_template: Callable[[str], Template | None] = load_template,
) -> list[str]:
    """Describe which of the given settings differ from those that one of the token caches was made with.

    Args:
        names: the settings to compare.
        find_template: finds the conversation template that a value of the setting means.
    """
    problems: dict[str, str] = {}
    template = settings.conversation_template if "conversation_template" in names else None
    given_template = None if template is None else find_template(template)
    step = "leave it out, or use the original conversations as data_path"
    for cache in caches:
        manifest = read_manifest(cache)
        inputs = manifest["inputs"]
        given = settings.model_fields_set & {*names} & inputs.keys()
        # these may determine nothing of this cache
        given = given - ({"split_seed"} if not manifest["eval_fraction"] else set())
        given = given - ({"seed"} if inputs.get("objective") != "span-corruption" else set())
        if settings.reads_preferences and inputs.get("objective") in PREFERENCE_OBJECTIVES:  # which read the same
            given = given - {"objective"}
        for name in sorted(name for name in given if getattr(settings, name) != inputs[name]):
            values = f"{getattr(settings, name)!r:.80} here, {inputs[name]!r:.80} in the cache {cache}"
            problems.setdefault(name, f"{name}: {values}; {step}")
        if given_template is not None and given_template.hash != inputs.get("template"):
            problem = f"conversation_template: {template}: the cache {cache} was made with another one; {step}"
            problems.setdefault("conversation_template", problem)
    return list(problems.values())


def _check_settings_of_caches(settings: PrepareSettings) -> None:
    """Check that no setting is given that would have no effect, because all datasets are token caches.

    Raises:
        SettingsError: one is.
    """
    names = {*select_settings(PrepareSettings, Affects.CACHE), "conversation_template"} - {"num_data"}
    if problems := find_cache_conflicts(settings, list_given_caches(settings.data or []), names):
        raise SettingsError(*problems)


def _check_folder(folder: Path, names: Sequence[str], origin: Origin) -> None:
    """Check that the folder can get the caches of these datasets.

    Raises:
        DataError: it has other content.
        SettingsError: a run uses the mixture in it, which has other datasets.
    """
    if is_mixture(folder):
        if origin.in_use and (before := list(list_caches(folder))) != list(names):
            line = f"data: the datasets were {', '.join(before)} before, and are {', '.join(names)} now"
            raise make_resume_error(folder, {"data": line})
        return
    if is_cache(folder):
        if origin.in_use:
            raise make_resume_error(folder, {"data": "data: it was one dataset before, and is several now"})
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if not (foreign := sorted(found - CACHE_CONTENTS - set(names))):
            return  # it is replaced once a new one is complete, as prepare replaces a cache of other inputs
        problem = f"output_dir: {folder}: contains {join_first(foreign)} in addition to a token cache"
        raise DataError(problem, hint="move these files away, or choose another output_dir")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"output_dir: {folder}: is a file", hint="choose another output_dir")
    if folder.is_dir() and not is_left_over(folder):
        hint = "choose another output_dir"
        raise DataError(f"output_dir: {folder}: contains other files, so it isn't a mixture of datasets", hint=hint)


def _check_given_caches(folder: Path, datasets: Mapping[str, DatasetSettings]) -> None:
    """Check that what is written doesn't replace a token cache that is one of the datasets.

    Raises:
        DataError: it would.
    """
    given = {name: cache for name, dataset in datasets.items() if (cache := find_given_cache(dataset)) is not None}
    written = {folder.resolve(): "the output folder"}
    written |= {
        (folder / name).resolve(): f"where dataset {name} is written" for name in datasets.keys() - given.keys()
    }
    for cache in given.values():
        if (place := written.get(cache.resolve())) is not None:
            problem = f"data: {cache}: one of the datasets, but also {place}"
            raise DataError(problem, hint="choose another output folder, or give the datasets other names")


def _remove_cache(folder: Path) -> None:
    """Remove the token cache in place of which the mixture is written. Other processes may do so at the same time."""
    if not is_cache(folder):
        return
    old = folder / f".old-{uuid.uuid4().hex[:8]}"
    old.mkdir()
    for name in (CACHE_MANIFEST_FILE, *sorted(CACHE_CONTENTS)):  # without the manifest it is no cache any more
        with suppress(FileNotFoundError):
            (folder / name).rename(old / name)
    shutil.rmtree(old, ignore_errors=True)


def _choose_common_vocabulary(
    settings: PrepareSettings, datasets: Mapping[str, DatasetSettings], origin: Origin
) -> ExtendedTokenizer:
    """Take the tokenizer of a token cache among the datasets, or extend the base's with what all of them need."""

    def read_all() -> Iterator[Conversation]:
        for name, dataset in datasets.items():
            yield from read_sample(complete_dataset(settings, dataset, output_dir=settings.output_dir / name), origin)

    caches = [given for dataset in datasets.values() if (given := find_given_cache(dataset)) is not None]
    if origin.vocabulary is not None and not caches:
        return origin.vocabulary
    source = next(iter(caches), origin.tokenizer_source)
    return choose_vocabulary(settings, find_base(settings), source, read_all())


def _find_source(origin: Origin, name: str) -> Path | None:
    """Return where a dataset's conversation template comes from: of a mixture, the dataset of the same name."""
    source = origin.tokenizer_source
    if source is None or not is_mixture(source):
        return source
    return list_caches(source).get(name, source)


def _join_training_data(mixture: Mixture) -> TrainingData:
    """Make the description of how the examples of all datasets were made; at its top level is the main dataset."""
    made = [read_training_data(dataset.cache.folder) for dataset in mixture.datasets]
    datasets = [
        DatasetTraining(
            name=dataset.name,
            share=rates["share"],
            conversation_template=dict(vars(dataset.cache.template)),
            has_earlier_turns=own.has_earlier_turns,
            **own.list_reading(),
        )
        for dataset, own, rates in zip(mixture.datasets, made, mixture.describe_rates(), strict=True)
        if own is not None
    ]
    main = made[mixture.datasets.index(mixture.main)]
    assert main is not None, "prepare has written it"
    return replace(main, datasets=datasets)
