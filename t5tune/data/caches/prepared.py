"""The folder of a token cache: the caches in it, and their examples (see examples.py).

list_caches(Path("cache"))      # {"chats": Path("cache/chats")}
open_examples(Path("cache"))[0]
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from t5tune.data.caches.cache import is_cache, open_cache
from t5tune.data.caches.examples import MIXTURE_FORMAT, Dataset, Examples
from t5tune.data.caches.manifest import PREPARE_AGAIN, describe_manifest_error, read_manifest
from t5tune.data.caches.mixing import Mixing
from t5tune.data.labels import describe_form
from t5tune.errors import DataError
from t5tune.file_names import MIXTURE_FILE
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import parse_json_object
from t5tune.settings.dataset_list import DatasetName, DatasetSettings, Weight, check_names_differ, check_weights
from t5tune.settings.field_types import OptionalCount
from t5tune.settings.messages import shorten_file_value

CORRECT_IT = f"correct it, or {PREPARE_AGAIN}"


def is_prepared(path: Path) -> bool:
    """Return whether a folder looks like the output of prepare: the caches of one or more datasets."""
    # os.path, because pathlib raises if the folder can't be searched
    return os.path.isfile(path / MIXTURE_FILE)


@dataclass(frozen=True)
class _SavedDataset:
    name: DatasetName
    cache: Annotated[str, Field(min_length=1)]
    weight: Weight
    num_data: OptionalCount = None


@dataclass(frozen=True)
class _SavedMixture:
    """The checked part of mixture.json, which users may edit; it is checked like settings in YAML."""

    mixing: Mixing
    datasets: Annotated[list[_SavedDataset], Field(min_length=1)]
    inputs: dict[str, Any]
    eval_fraction: float | dict[str, float]


def _read_mixture(folder: Path) -> tuple[dict[str, Any], _SavedMixture]:
    path = folder / MIXTURE_FILE
    try:
        manifest = parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        problem = f"{path}: not the manifest of a token cache ({describe_error(error)})"
        raise DataError(problem, hint=PREPARE_AGAIN) from error
    if (version := manifest.get("format")) != MIXTURE_FORMAT:
        problem = f"{path}: format {shorten_file_value(version)}; this version of t5tune reads format {MIXTURE_FORMAT}"
        raise DataError(problem, hint=PREPARE_AGAIN)
    try:
        # as JSON, because in strict mode pydantic builds no dataclass from a dict; JSON has no lone surrogates, but
        # names of data files may have them
        checked = json.dumps(manifest, ensure_ascii=False).encode(errors="replace")
        saved: _SavedMixture = TypeAdapter(_SavedMixture).validate_json(checked, strict=True)
        check_names_differ([dataset.name for dataset in saved.datasets])
        check_weights(weights := [dataset.weight for dataset in saved.datasets])
        if saved.mixing.kind != "weights" and set(weights) != {1.0}:
            raise ValueError(f"weight: has no effect with mixing {saved.mixing.kind}; set mixing.kind to weights")
    except ValidationError as error:
        raise DataError(describe_manifest_error(path, error), hint=CORRECT_IT) from None
    except ValueError as error:
        raise DataError(f"{path}: datasets: {error}", hint=CORRECT_IT) from None
    return manifest, saved


def list_caches(folder: Path) -> dict[str, Path]:
    """List the token caches in a folder that prepare wrote, by the names of the datasets."""
    return {each.name: folder / each.cache for each in _read_mixture(folder)[1].datasets}


def read_datasets(folder: Path) -> tuple[list[DatasetSettings], Mixing]:
    """Read which token caches are in a folder, which may be a single cache, and how to mix them.

    Raises:
        DataError: mixture.json is broken, or has a different format version.
    """
    if not is_prepared(folder):
        return [DatasetSettings(path=[str(folder)])], Mixing()
    _, saved = _read_mixture(folder)
    datasets = [
        DatasetSettings(path=[str(folder / each.cache)], name=each.name, weight=each.weight, num_data=each.num_data)
        for each in saved.datasets
    ]
    return datasets, saved.mixing


def find_caches(folder: Path) -> list[Path]:
    """Find the token caches in a folder that prepare wrote; the folder may also be a single cache."""
    return list(list_caches(folder).values()) if is_prepared(folder) else [folder]


def find_tokenizer_folder(source: Path) -> Path:
    """Find the folder of the tokenizer of token caches, an adapter or a model."""
    cache = next(iter(list_caches(source).values())) if is_prepared(source) else source
    return cache / "tokenizer" if is_cache(cache) else cache


def check_datasets(datasets: Sequence[Dataset], place: str) -> None:
    """Check that all caches have the same tokenizer, and that all or no datasets have pairs, or labels of one form.

    With different tokenizers, the same id would mean different tokens. `place` is named in messages.
    """
    first, *others = (dataset.cache for dataset in datasets)
    for other in others:
        if other.manifest["inputs"]["tokenizer"] != first.manifest["inputs"]["tokenizer"]:
            problem = f"{place}: {other.folder} and {first.folder} were prepared with different tokenizers"
            hint = "give the data of both in place of the caches, or prepare both with the same --add-tokens"
            raise DataError(problem, hint=hint)
        if other.has_preferences != first.has_preferences:
            pairs, answers = (first, other) if first.has_preferences else (other, first)
            problem = f"{place}: {pairs.folder} has preference pairs, and {answers.folder} has no preference pairs"
            raise DataError(problem, hint="train on them in two runs: objective sft first, then dpo")
    forms = {describe_form(dataset.cache.label_task): dataset.name for dataset in datasets}
    if len(forms) > 1:
        listed = ", and ".join(f"{name} has {form}" for form, name in forms.items())
        raise DataError(f"{place}: {listed}", hint="train on them in two runs, or write the labels alike")


def read_examples_manifest(folder: Path) -> dict[str, Any]:
    """Read mixture.json, or the manifest of a single cache; DataError: it is broken, or of a different format."""
    return _read_mixture(folder)[0] if is_prepared(folder) else read_manifest(folder)


def open_examples(folder: Path) -> Examples:
    """Open the token caches that prepare wrote, or a single cache; DataError: a file is missing or has changed."""
    if not is_prepared(folder):
        return Examples(folder, [Dataset(folder.name, open_cache(folder))], Mixing()).map_labels()
    _, saved = _read_mixture(folder)
    datasets = [
        Dataset(each.name, open_cache(folder / each.cache), each.weight, each.num_data) for each in saved.datasets
    ]
    check_datasets(datasets, str(folder))
    return Examples(folder, datasets, saved.mixing).limit_training().map_labels()


def has_examples(folder: Path) -> bool:
    """Return whether a folder looks like the output of prepare, or like one of its caches."""
    return is_cache(folder) or is_prepared(folder)
