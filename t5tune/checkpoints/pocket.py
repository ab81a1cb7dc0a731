"""The built-in model `pocket`: a small T5 of Flan's architecture, pretrained by examples/pocket/pretrain.py."""

from pathlib import Path

POCKET_FOLDER = Path(__file__).parent.parent / "pocket"


def pocket_folder() -> Path:
    """Return the checkpoint's folder, which is part of the package."""
    return POCKET_FOLDER


def find_conversations_file() -> Path:
    """Find the packaged conversations that `--data-path pocket` means."""
    # a source checkout has the file only in examples/
    packaged = POCKET_FOLDER / "train.jsonl"
    return packaged if packaged.is_file() else POCKET_FOLDER.parent.parent / "examples" / "quickstart" / "train.jsonl"
