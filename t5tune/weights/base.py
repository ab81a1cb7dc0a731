"""Find a base checkpoint's folder: a path, a model on the hub, or the built-in `pocket`."""

import json
from pathlib import Path
from typing import Any

from t5tune.errors import ModelError
from t5tune.settings.base_model import BaseModelSettings
from t5tune.weights.pocket import pocket_folder

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
    name = settings.model_name_or_path
    if name == "pocket" and not Path("pocket").is_dir():
        return pocket_folder()
    path = Path(name)
    folder = path if path.is_dir() else _download(name, settings.revision, settings.cache_dir)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model_name_or_path: {name}: no config.json in it",
            hint="name a folder that save_pretrained wrote",
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands.

    Raises:
        ModelError: it can't be read, or holds no object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return config


def _download(name: str, revision: str | None, cache_dir: Path | None) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise ModelError(f"model_name_or_path: {name}: no such folder", hint="check the path's spelling")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = FILES
        snapshot = Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
        if not list(snapshot.glob("*.safetensors")):
            files = HfApi().list_repo_files(name, revision=revision)
            if any(file.startswith("pytorch_model") for file in files):
                patterns = [*FILES, "pytorch_model*.bin"]
                snapshot = Path(
                    snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
                )
        return snapshot
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model_name_or_path: {name}: no such folder, and the hub didn't give it: {reason}",
            hint="check the name, the network and `hf auth whoami`, or name a folder",
        ) from error
