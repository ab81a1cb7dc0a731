"""Folders of adapters that tests change while a server runs."""

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def scale_adapter(source: Path, folder: Path, scale: float) -> Path:
    """Copy an adapter, with an update that is `scale` times as large."""
    path = shutil.copytree(source, folder) / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = {name: value * scale if "lora_B" in name else value for name, value in load_file(path).items()}
    save_file(state, path, metadata)
    return folder


def replace(folder: Path, new: Path) -> None:
    """Replace an adapter's folder as a deployment does: copy it, then rename it."""
    copied = shutil.copytree(new, folder.with_name("copied"))
    if folder.exists():
        shutil.rmtree(folder)
    copied.rename(folder)
