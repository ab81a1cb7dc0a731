"""The built-in model `pocket`: a small T5 of Flan's architecture, pretrained by examples/pocket/pretrain.py."""

from pathlib import Path

FILES = Path(__file__).parent.parent / "pocket"


def pocket_folder() -> Path:
    """The checkpoint's folder, in the package."""
    return FILES


def conversations_file() -> Path:
    """The packaged conversation set that `--data-path pocket` names."""
    packaged = FILES / "train.jsonl"
    return packaged if packaged.is_file() else FILES.parent.parent / "examples" / "quickstart" / "train.jsonl"
