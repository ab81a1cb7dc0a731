"""Find a base checkpoint's folder: a path, a model on the hub, or the built-in `pocket`."""

from pathlib import Path
from typing import Any

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.errors import CheckpointError, ModelError, suggestion
from t5tune.io.reasons import reason_of
from t5tune.io.untrusted import read_object
from t5tune.settings.base_model import BaseModelSettings

CODE = {"auto_map", "custom_pipelines"}
FILES = [
    "*.json",
    "*.safetensors",
    "spiece.model",
    "tokenizer.model",
]


def find_base(settings: BaseModelSettings) -> Path:
    """The folder that holds the base's files; a hub model is downloaded first.

    Raises:
        ModelError: no such folder or model, or it holds no config.json.
    """
    return _find(settings, FILES)


def find_config(settings: BaseModelSettings) -> Path:
    """The folder that holds the base's config.json, whose weights may stay on the hub.

    Raises:
        ModelError: as `find_base`.
    """
    return _find(settings, ["config.json"])


def _find(settings: BaseModelSettings, files: list[str]) -> Path:
    name = settings.model_name_or_path
    if name == "pocket" and not Path("pocket", "config.json").is_file():
        return pocket_folder()
    path = Path(name)
    folder = path if path.is_dir() else _download(name, settings.revision, settings.cache_dir, files)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model_name_or_path: {name}: no config.json in it",
            hint="name a folder that save_pretrained or t5tune merge wrote",
        )
    read_config(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands, of a folder or the file itself.

    Raises:
        ModelError: it can't be read, holds no object, or asks for code of its own.
    """
    path = folder if folder.is_file() else folder / "config.json"
    try:
        config = read_object(path.parent, path.name)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: can't be read: {reason_of(error)}") from error
    except CheckpointError as error:
        raise ModelError(error.message, error.hint) from error
    if key := _asks_for_code(config):
        raise ModelError(f"{path}: {key}: asks for code that comes with the model; t5tune runs none")
    return config


def _asks_for_code(value: Any) -> str | None:
    """The key, at any depth, that would make transformers fetch code: classes, or kernels of an `owner/name`."""
    if isinstance(value, list):
        return next(filter(None, map(_asks_for_code, value)), None)
    for key, inner in value.items() if isinstance(value, dict) else ():
        is_kernel = key.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in str(inner)
        if (key in CODE and inner) or is_kernel:
            return str(key)
        if found := _asks_for_code(inner):
            return found
    return None


def _download(name: str, revision: str | None, cache_dir: Path | None, wanted: list[str]) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise ModelError(f"model_name_or_path: {name}: no such folder", hint="check the path's spelling")
    from huggingface_hub import HfApi, snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))

    try:
        snapshot = fetch(wanted)
        if (
            wanted == FILES
            and not list(snapshot.glob("*.safetensors"))
            and not list(snapshot.glob("pytorch_model*.bin"))
        ):
            files = HfApi().list_repo_files(name, revision=revision)
            if any(file.startswith("pytorch_model") for file in files):
                snapshot = fetch([*FILES, "pytorch_model*.bin"])
        return snapshot
    except Exception as error:  # OSError, ValueError, and those of the HTTP library that huggingface_hub chose
        raise _download_error(name, revision, error) from error


def _download_error(name: str, revision: str | None, error: Exception) -> ModelError:
    """What kept a model from coming, and what to do about it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"model_name_or_path: {name}"
    match error:
        case GatedRepoError():
            reason = "its owners give it only to those who asked"
            hint = f"ask for it on the page of {name}, then `hf auth login`"
        case RepositoryNotFoundError():
            reason = "no such folder here, and no such model on the hub, or a private one"
            hint = "check its spelling; for a private one `hf auth login`"
        case RevisionNotFoundError():
            return ModelError(
                f"revision: {revision}: {name} has no such branch, tag or commit", hint="check its spelling"
            )
        case HFValidationError():
            reason, hint = "no such folder, and no name of a model on the hub", "check its spelling"
        case LocalEntryNotFoundError() if isinstance(error.__cause__, OfflineModeIsEnabled):
            reason = (
                "no such folder, and HF_HUB_OFFLINE keeps the hub from being asked; the cache doesn't hold all of it"
            )
            hint = "take HF_HUB_OFFLINE out of the environment, or name a folder"
        case LocalEntryNotFoundError():
            reason = "no such folder, the hub can't be reached, and the cache doesn't hold it"
            reason += suggestion(name, ["pocket"])
            hint = "check the network, or name a folder; `pocket` is the built-in model"
        case OSError() if error.errno is not None:
            where = f" ({error.filename})" if error.filename else ""
            return ModelError(f"{asked}: {error.strerror}{where}", hint="--cache-dir puts downloads elsewhere")
        case _:
            reason = f"the hub didn't give it: {' '.join(str(error).split())[:200]}"
            hint = "try again later, or name a folder"
    return ModelError(f"{asked}: {reason}", hint=hint)
