"""Find and download the data files of a dataset on the Hugging Face Hub, for one subset and one split.

    name = parse_dataset_name("hf://datasets/owner/name")
    files = find_dataset_files(name, DatasetChoice(split="train"), is_data, "data_path", cache_dir=None)

The dataset's README.md lists the files of each subset and split; otherwise their names show it. No script is ever run.
"""

import glob
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from t5tune.errors import DataError, suggest_name
from t5tune.hub.download import Repository
from t5tune.hub.names import split_revision
from t5tune.io.reasons import join_first
from t5tune.progress import Note, Report, silent

PREFIX = "hf://datasets/"
README = "README.md"
# the words in files' names that mean a split to the Hub's viewer and the datasets library
SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
IGNORED_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
EVALUATION_SPLITS = ("validation", "test")

Splits = Mapping[str, Sequence[str]]  # split -> its files


@dataclass(frozen=True)
class DatasetChoice:
    """The part of a dataset to read.

    Args:
        subset: None: the default.
        split: None: the first of `defaults` that the dataset has, or its only split.
        setting: the setting that names the split, for messages.
    """

    subset: str | None = None
    split: str | None = None
    defaults: tuple[str, ...] = ("train",)
    setting: str = "data_split"


@dataclass(frozen=True)
class DatasetName:
    """A dataset's name: `owner/name`, its revision, and a file, a folder or a pattern in it; empty for all files."""

    name: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        return f"{self.name}{f'@{self.revision}' if self.revision else ''}{f'/{self.path}' if self.path else ''}"


def parse_dataset_name(text: str) -> DatasetName | None:
    """Parse `hf://datasets/owner/name@revision/path` or `owner/name@revision`; None for other texts."""
    if not text.startswith(PREFIX):
        name, revision = split_revision(text)
        return DatasetName(name, revision, "") if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else None
    # as in huggingface_hub's HfFileSystem
    revision = r"refs/(?:convert/[\w.-]+|pr/\d+)|[^/]+"
    found = re.fullmatch(rf"([\w.-]+/[\w.-]+)(@({revision}))?(/(.*))?", text.removeprefix(PREFIX))
    return DatasetName(found[1], found[3] and unquote(found[3]), (found[5] or "").strip("/")) if found else None


def pin_dataset(name: str, sources: Sequence[str]) -> str:
    """Name a dataset by its files' commit, `hf://datasets/owner/name@commit/file`, if all have the same commit."""
    dataset, files = parse_dataset_name(name), [file for file in map(parse_dataset_name, sources) if file is not None]
    commits = {file.revision for file in files if dataset is not None and file.name == dataset.name}
    if dataset is None or len(commits) != 1:
        return name
    return f"{PREFIX}{replace(dataset, revision=commits.pop())}"


def find_dataset_files(
    dataset: DatasetName,
    choice: DatasetChoice,
    is_data: Callable[[str], bool],
    setting: str,
    cache_dir: Path | None,
    report: Report = silent,
) -> list[Path]:
    """Download the data files of a dataset, in their order, and return their paths in the cache.

    `is_data` says whether a file of this name can be read. Errors name the `setting`.
    """
    repository = Repository("dataset", dataset.name, setting, dataset.revision, cache_dir)
    return repository.use_newest(partial(_find_files, dataset, choice, is_data, report=report), report)


def _find_files(
    dataset: DatasetName, choice: DatasetChoice, is_data: Callable[[str], bool], repository: Repository, report: Report
) -> list[Path]:
    snapshot = repository.download([README])
    pinned = replace(repository, revision=snapshot.name)  # offline, the commit is known only now
    names = pinned.list_files()
    data = [name for name in names if is_data(name) and not _is_ignored(name)]
    asked = f"{repository.setting}: {dataset}"
    if not data:
        raise _explain_no_data(asked, dataset, names)
    if dataset.path:
        # a file, the files of a folder, or the matches of a pattern
        named = {name for name in data if name == dataset.path or name.startswith(f"{dataset.path}/")}
        chosen = sorted(named | set(_match(data, dataset.path)))
        if not chosen:
            raise DataError(f"{asked}: no such data file in this dataset", hint=f"it has {join_first(data)}")
    else:
        chosen = _select_by_split(data, _read_configs(snapshot), choice, asked, report)
        chosen = _keep_most_common_kind(chosen, asked, report)
    folder = pinned.download([*map(glob.escape, chosen)], True, report)
    if missing := [name for name in chosen if not (folder / name).is_file()]:
        problem = f"{asked}: the Hub can't be reached, and the local cache lacks {join_first(missing)}"
        raise DataError(problem, hint="check the network connection")
    return [folder / name for name in chosen]


def _is_ignored(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return parts[-1] in IGNORED_FILES or any(part.startswith((".", "_")) for part in parts)


def _explain_no_data(asked: str, dataset: DatasetName, names: Sequence[str]) -> DataError:
    if any(name.endswith(".py") for name in names):
        problem = f"{asked}: this dataset needs its Python script, which t5tune doesn't run"
        return DataError(problem, hint=f"try the Hub's Parquet copy: {PREFIX}{dataset.name}@refs/convert/parquet")
    hint = f"it has {join_first(names)}" if names else "it has no files"
    return DataError(f"{asked}: this dataset has no JSON, JSONL, CSV or Parquet file", hint=hint)


def _read_configs(snapshot: Path) -> list[dict[str, Any]]:
    """Read the subsets that README.md lists."""
    if not (snapshot / README).is_file():
        return []
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(snapshot / README) or {}
    except Exception:  # broken YAML, or bytes that aren't UTF-8: then there is no list, as for other readers of it
        return []
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    configs = configs if isinstance(configs, list) else []
    listed = [config for config in configs if isinstance(config, dict) and config.get("config_name")]
    return [config for config in listed if config.get("data_files") or config.get("data_dir")]


def _select_by_split(
    data: Sequence[str], configs: list[dict[str, Any]], choice: DatasetChoice, asked: str, report: Report
) -> list[str]:
    # without a list in README.md, a subset is a folder
    config = _choose_config(configs, choice.subset, asked) if configs else {"data_dir": choice.subset}
    folder = str(config.get("data_dir") or "").strip("./")
    inside = [name for name in data if not folder or name.startswith(f"{folder}/")]
    if not inside and not configs:
        folders = sorted({name.partition("/")[0] for name in data if "/" in name})
        hint = f"it has the folders {join_first(folders)}" if folders else "it has no subsets: leave it out"
        raise DataError(f"data_subset: {folder}: {asked}: no such subset", hint=hint)
    listed = _read_data_files(config.get("data_files"), folder, inside)
    splits = {name: files for name, files in (listed or _guess_splits(inside, folder, asked)).items() if files}
    wanted = choice.defaults if choice.split is None else (choice.split,)
    found = next((name for name in wanted if name in splits), None)
    if found is None and len(splits) == 1 and choice.split is None:
        (found,) = splits
        report(Note(f"{asked}: reading its only split, {found}"))
    if found is not None:
        return list(splits[found])
    hint = f"it has {join_first(list(splits))}" if splits else "its subset has no files"
    raise DataError(f"{choice.setting}: {' or '.join(wanted)}: {asked}: no such split", hint=hint)


def _choose_config(configs: list[dict[str, Any]], subset: str | None, asked: str) -> dict[str, Any]:
    """Choose a subset: the named subset, the default, or the only subset."""
    by_name = {str(config["config_name"]): config for config in configs}
    if subset is not None:
        if subset in by_name:
            return by_name[subset]
        hint = f"it has {join_first(list(by_name))}{suggest_name(subset, by_name)}"
        raise DataError(f"data_subset: {subset}: {asked}: no such subset", hint=hint)
    marked = [config for config in configs if config.get("default") is True]
    if marked or "default" in by_name or len(configs) == 1:
        return (marked or [by_name.get("default", configs[0])])[0]
    hint = f"choose one with --data-subset: {join_first(list(by_name))}"
    raise DataError(f"{asked}: this dataset has {len(by_name)} subsets and no default", hint=hint)


def _read_data_files(data_files: Any, folder: str, data: Sequence[str]) -> Splits:
    """Read a subset's list of files: a path, paths, or a path or paths for each split."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": paths} for split, paths in data_files.items()]
    splits: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        listed = entry if isinstance(entry, dict) else {"path": entry}
        paths = listed.get("path")
        for path in [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []:
            pattern = f"{folder}/{path}" if folder else str(path).removeprefix("./")
            splits.setdefault(str(listed.get("split", "train")), []).extend(_match(data, pattern))
    return {split: list(dict.fromkeys(files)) for split, files in splits.items()}


def _match(data: Sequence[str], pattern: str) -> list[str]:
    """Select the names that match a pattern: `*` doesn't match a slash, but `**` does."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    translated = (
        part.replace("[!", "[^") if part.startswith("[") else meanings.get(part, re.escape(part)) for part in parts
    )
    try:
        expression = re.compile("".join(translated))
    except re.error:
        return []
    return sorted(name for name in data if expression.fullmatch(name))


def _guess_splits(data: Sequence[str], folder: str, asked: str) -> Splits:
    """Find splits by words in the names of files and folders; files without a split's name are for training."""
    splits: dict[str, list[str]] = {}
    places: set[str] = set()  # folders that contain splits
    for name in sorted(data):
        inside = name.removeprefix(f"{folder}/") if folder else name
        split, place = _find_split(inside)
        splits.setdefault(split, []).append(name)
        if split:
            places.add(place)
    tops = {place.partition("/")[0] for place in places if place}
    if len(places) > 1 and tops:
        hint = f"choose one with --data-subset: {join_first(sorted(tops))}"
        raise DataError(f"{asked}: several folders of this dataset have splits", hint=hint)
    rest = splits.pop("", [])
    return {"train": rest, **splits} if rest and "train" not in splits else splits


def _find_split(path: str) -> tuple[str, str]:
    """Return the last split that a path names, and its folder: ("test", "en") for en/test/0.parquet.

    The split is empty if the path names no split.
    """
    parts = path.split("/")
    for number in reversed(range(len(parts))):
        for split, words in SPLIT_WORDS.items():
            if re.search(rf"(?<![a-zA-Z])({words})(?![a-zA-Z])", parts[number], re.IGNORECASE):
                return split, "/".join(parts[:number])
    return "", ""


def _keep_most_common_kind(files: Sequence[str], asked: str, report: Report) -> list[str]:
    """Keep the files of the most common suffix: a dataset may contain the same records in several formats."""
    ((kept, _),) = Counter(map(_get_kind, files)).most_common(1)
    if skipped := [name for name in files if _get_kind(name) != kept]:
        report(Note(f"{asked}: skipped, since most files are {kept}: {join_first(skipped)}", warning=True))
    return [name for name in files if name not in skipped]


def _get_kind(name: str) -> str:
    suffixes = [suffix for suffix in PurePosixPath(name).suffixes if suffix.lower() not in (".gz", ".zst")]
    return suffixes[-1].lower().replace(".ndjson", ".jsonl") if suffixes else ""
