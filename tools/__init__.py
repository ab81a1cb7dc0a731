"""What developers run in the repository; it isn't installed with the package."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
