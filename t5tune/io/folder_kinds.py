"""Recognize a folder by its files, for messages."""

from pathlib import Path

from t5tune.file_names import ADAPTER_CONFIG_FILE, CACHE_MANIFEST_FILE, CONFIG_FILE, MIXTURE_FILE

KINDS = {
    CONFIG_FILE: "a whole model",
    ADAPTER_CONFIG_FILE: "an adapter",
    MIXTURE_FILE: "a token cache",
    CACHE_MANIFEST_FILE: "a token cache",
}


def describe_folder(folder: Path) -> str | None:
    """Describe the kind of a folder, such as `an adapter`; None: unknown."""
    return next((kind for name, kind in KINDS.items() if (folder / name).is_file()), None)
