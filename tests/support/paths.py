"""Folders: the repository, and the real inputs that some machines have next to it."""

from pathlib import Path

SHARED = Path(__file__).parents[3] / "shared"
REPOSITORY = Path(__file__).parents[2]
