"""Bring data to this machine: datasets on the Hugging Face Hub, and files at a URL.

bring_data(["chats.jsonl", "hf://datasets/owner/name"], DatasetChoice(), "data_path", cache_dir=None)
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from t5tune.data.reading.files import STDIN, find_data_suffix
from t5tune.data.reading.remote_files import fetch_remote, find_url, hide_query, is_url
from t5tune.errors import DataError
from t5tune.hub.datasets import PREFIX, DatasetChoice, DatasetName, find_dataset_files, parse_dataset_name
from t5tune.hub.names import name_snapshot
from t5tune.progress import Report, silent


def bring_data(
    names: Sequence[str],
    choice: DatasetChoice,
    setting: str,
    cache_dir: Path | None,
    report: Report = silent,
    is_text: bool = False,
) -> list[str]:
    """Replace each name of a dataset and each URL by the paths of its files on this machine; paths stay as they are.

    Args:
        choice: the part of a dataset to read.
        setting: the setting that has the names, for messages.
    """
    datasets: dict[str, DatasetName] = {}
    for name in filter(is_dataset_name, names):
        if (dataset := parse_dataset_name(name)) is None:
            hint = f"expected {PREFIX}owner/name, {PREFIX}owner/name@revision/path/in/it"
            raise DataError(f"{setting}: {name}: not the name of a dataset", hint=hint)
        datasets[name] = dataset
    # the subset of the training data also applies to evaluation data that may be elsewhere
    subset = choice.subset if setting == "data_path" else None
    if (part := choice.split or subset) and not any(not dataset.path for dataset in datasets.values()):
        option = "data_subset" if choice.split is None else choice.setting
        given = ", ".join(map(hide_query, names))
        problem = f"{option}: {part}: only for a whole dataset on the Hub, but {setting} is {given}"
        raise DataError(problem, hint="leave it out")
    found: list[str] = []

    def is_data(name: str) -> bool:
        return find_data_suffix(Path(name), is_text) not in (None, ".xlsx")

    for name in names:
        if name in datasets:
            found += map(str, find_dataset_files(datasets[name], choice, is_data, setting, cache_dir, report))
        elif is_url(name):
            found += map(str, fetch_remote(name, setting, cache_dir, report, is_text))
        else:
            found.append(name)
    return found


def describe_origin(file: Path) -> str | None:
    """Return the origin of a file on this machine: `hf://datasets/owner/name@commit/file`, a URL, or None."""
    if (name := name_snapshot(file)) != str(file):
        return f"{PREFIX}{name}"
    return find_url(file)


def is_dataset_name(name: str) -> bool:
    """Whether a name means a dataset on the Hub: hf://…, or owner/name without such a file, folder or pattern here."""
    if name.startswith("hf://"):
        return True
    path = Path(name)
    with suppress(OSError):  # too long for a path
        is_here = path == STDIN or path.exists() or path.parent.exists() or find_data_suffix(path, True) is not None
        return not is_here and parse_dataset_name(name) is not None
    return False
