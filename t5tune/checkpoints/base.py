"""Find a base checkpoint's folder: a path, a model on the Hugging Face Hub, or the built-in `pocket`."""

from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from t5tune.checkpoints.adapter_config import read_adapter_config
from t5tune.checkpoints.adapter_folder import DOWNLOADED_FILES, check_downloaded_adapter, is_adapter
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.pocket import pocket_folder
from t5tune.checkpoints.tokenizer_files import TOKENIZER_FILES
from t5tune.checkpoints.training_data import check_same_labels, read_label_task
from t5tune.data.labels import LabelTask
from t5tune.errors import CheckpointError, ModelError
from t5tune.families import find_architecture
from t5tune.families.encoder import make_encoder
from t5tune.file_names import ADAPTER_CONFIG_FILE, CONFIG_FILE, ONNX_FOLDER
from t5tune.hub.download import Repository
from t5tune.hub.names import is_hub_name, is_published
from t5tune.io.folder_kinds import describe_folder
from t5tune.io.untrusted import read_json_object
from t5tune.progress import Report, silent
from t5tune.settings.groups.base import BaseModelSettings

Pinned = TypeVar("Pinned", bound=BaseModelSettings)

CODE_KEYS = {"auto_map", "custom_pipelines"}
PICKLED_FILES = "pytorch_model*.bin"


def find_base(settings: BaseModelSettings, with_weights: bool = True, report: Report = silent) -> Path:
    """Find a base's folder like `find_model`; raise ModelError if it contains no base."""
    return check_base(find_model(settings, with_weights, report), settings.model_name_or_path)


def find_model(settings: BaseModelSettings, with_weights: bool = True, report: Report = silent) -> Path:
    """Find the folder of model_name_or_path, a base or an adapter.

    A model on the Hub is downloaded; without `with_weights`, only its config.json and tokenizer.
    """
    name = settings.model_name_or_path
    if is_pocket(name):
        return pocket_folder()
    path = Path(name)
    return path if path.is_dir() else _download(settings, with_weights, report)


def pin_base(settings: Pinned, report: Report) -> Pinned:
    """Find the base, and return the settings with the commit of a base on the Hub as the revision."""
    folder = find_base(settings, report=report)
    is_local = not is_published(settings.model_name_or_path)
    return settings if is_local else settings.model_copy(update={"revision": folder.name})


def check_base(folder: Path, name: str) -> Path:
    """Return the folder if it contains a base; `name` is its name for the user."""
    if not (folder / CONFIG_FILE).is_file():
        kind = describe_folder(folder)
        problem = f"{name}: {f'{kind}, not a model' if kind else f'contains no {CONFIG_FILE}'}"
        hint = "give a folder that save_pretrained or t5tune merge wrote"
        raise ModelError(problem, hint, setting="model_name_or_path")
    if any((folder / ONNX_FOLDER).glob("*.onnx")) and not _has_weights(folder):
        hint = "use the adapter or a merged checkpoint; serve also takes a model converted with --to ctranslate2"
        raise ModelError(f"{name}: is an ONNX model", hint, setting="model_name_or_path")
    read_config(folder)
    return folder


def find_local_base(settings: BaseModelSettings, with_weights: bool = False) -> Path | None:
    """Find a base on this machine, perhaps in the Hub's cache, with config.json and, `with_weights`, the weights."""
    name = settings.model_name_or_path
    with suppress(OSError, ValueError):  # a name that neither a file nor a model on the Hub can have
        folder = pocket_folder() if is_pocket(name) else Path(name)
        if not folder.is_dir() and is_hub_name(name):
            folder = _make_repository(settings).find_cached_folder() or folder
        if (folder / CONFIG_FILE).is_file() and (_has_weights(folder) or not with_weights):
            return folder
    return None


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", PICKLED_FILES))


def read_base_of_adapter(adapter: Path, cache_dir: Path | None) -> BaseModelSettings:
    """Read the base that an adapter's config names. Anyone may have written the name."""
    config = read_adapter_config(adapter)
    if not (name := config.get("base_model_name_or_path")):
        problem = f"{adapter / ADAPTER_CONFIG_FILE}: doesn't name the adapter's base"
        raise CheckpointError(problem, hint=f"give the base with --model-name-or-path, and --adapter {adapter}")
    return BaseModelSettings(model_name_or_path=name, revision=config.get("revision"), cache_dir=cache_dir)


def is_pocket(name: str) -> bool:
    return name == "pocket" and not Path(name, CONFIG_FILE).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, given its folder or the file itself. Raise ModelError if it requires custom code."""
    path = folder if folder.is_file() else folder / CONFIG_FILE
    try:
        config = read_json_object(path.parent, path.name)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: can't be read: no such file", hint="copy the model's folder again") from error
    except CheckpointError as error:
        raise ModelError(error.message, error.hint) from error
    if key := _find_code_key(config):
        raise ModelError(f"{path}: {key}: requires custom code from the model's repository, which t5tune doesn't run")
    return config


def open_base(folder: Path, family: str | None = None, task: LabelTask | None = None) -> Checkpoint:
    """Open the weights of a base.

    Args:
        family: its key in the table of families if its model_type isn't there.
        task: open only its encoder, with a head for these labels. A base without labels gets a head of zeros.

    Raises:
        CheckpointError: the base has different labels, or its head is missing.
    """
    base = Checkpoint(folder, make_encoder(find_architecture(read_config(folder), folder, family), task))
    if task is not None and read_label_task(folder) is not None:
        check_same_labels(folder, task, "model_name_or_path")
        if base.added:
            raise CheckpointError(f"{folder}: {min(base.added)}: missing from the weights", "copy the folder again")
    return base


def _find_code_key(value: Any) -> str | None:
    """Find a key, at any depth, that would make transformers download code: classes, or kernels from `owner/name`."""
    if isinstance(value, list):
        return next(filter(None, map(_find_code_key, value)), None)
    for key, inner in value.items() if isinstance(value, dict) else ():
        is_kernel = key.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in str(inner)
        if (key in CODE_KEYS and inner) or is_kernel:
            return str(key)
        if found := _find_code_key(inner):
            return found
    return None


def _download(settings: BaseModelSettings, with_weights: bool, report: Report) -> Path:
    name = settings.model_name_or_path
    if Path(name).is_file():
        raise ModelError(f"{name}: a file, not the folder of a model", "name the folder", "model_name_or_path")
    if not is_hub_name(name) or Path(name).exists():
        raise ModelError(f"{name}: no such folder", "check the path's spelling", "model_name_or_path")
    repository = _make_repository(settings)
    if not with_weights:
        return repository.download([CONFIG_FILE, *TOKENIZER_FILES], report=report)

    def download_weights(newest: Repository) -> Path:
        snapshot = newest.download(DOWNLOADED_FILES, report=report)
        # download pickled weights only if the model has no safetensors
        if not _has_weights(snapshot) and any(file.startswith("pytorch_model") for file in newest.list_files()):
            snapshot = newest.download([*DOWNLOADED_FILES, PICKLED_FILES], report=report)
        return snapshot

    snapshot = repository.use_newest(download_weights, report)
    if is_adapter(snapshot):
        check_downloaded_adapter(snapshot, repository, name)
    return snapshot


def _make_repository(settings: BaseModelSettings) -> Repository:
    name = settings.model_name_or_path
    return Repository("model", name, "model_name_or_path", settings.revision, settings.cache_dir)
