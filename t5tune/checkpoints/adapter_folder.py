"""Find an adapter's folder: a path, or `owner/name` or `owner/name@revision` on the Hugging Face Hub."""

from pathlib import Path

from t5tune.errors import CheckpointError
from t5tune.file_names import (
    ADAPTER_BIN_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BPE_FILES,
    CONFIG_FILE,
    SENTENCEPIECE_FILES,
    TEMPLATE_FILE,
)
from t5tune.hub.download import Repository
from t5tune.hub.names import is_hub_name, split_revision
from t5tune.progress import Report, silent

DOWNLOADED_FILES = (
    "*.json", "*.safetensors", *SENTENCEPIECE_FILES, *BPE_FILES, TEMPLATE_FILE, "*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file()


def has_only_model(folder: Path) -> bool:
    """Whether a folder contains a whole model and no adapter."""
    return (folder / CONFIG_FILE).is_file() and not (folder / ADAPTER_CONFIG_FILE).is_file()


def find_adapter(
    adapter: Path,
    cache_dir: Path | None,
    setting: str = "adapter",
    report: Report = silent,
    allows_model: bool = False,
) -> Path:
    """Find an adapter's folder: `adapter` itself, or its download if it names a model on the Hub.

    Errors name the `setting`. Without `cache_dir`, the download is in the Hub's cache. With `allows_model`, it may be a
    whole model.
    """
    name, revision = split_revision(str(adapter))
    if adapter.exists() or "/" not in name or not is_hub_name(name):
        return adapter
    repository = Repository("adapter", name, setting, revision, cache_dir)
    folder = repository.download(DOWNLOADED_FILES, report=report)
    if allows_model and has_only_model(folder):
        return folder
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        problem = f"{setting}: {adapter}: this model on the Hub has no {ADAPTER_CONFIG_FILE}, so it isn't an adapter"
        raise CheckpointError(problem, hint="name an adapter, or give a whole model as --model-name-or-path")
    check_downloaded_adapter(folder, repository, str(adapter))
    return folder


def check_downloaded_adapter(folder: Path, repository: Repository, given: str) -> None:
    """Refuse an adapter without safetensors: pickled weights aren't downloaded. `given` is the user's name for it."""
    if (folder / ADAPTER_WEIGHTS_FILE).is_file():
        return
    lack = f"{given}: has no {ADAPTER_WEIGHTS_FILE} on the Hub"
    if ADAPTER_BIN_FILE not in repository.list_files(folder.name):
        raise CheckpointError(lack, "its owner must upload it", repository.setting)
    problem = f"{lack}, only {ADAPTER_BIN_FILE}, and pickled files aren't downloaded"
    get = f"hf download {repository.name} --local-dir {repository.name.rpartition('/')[2]}"
    raise CheckpointError(problem, f"if you trust its owner, run `{get}`, and give that folder", repository.setting)
