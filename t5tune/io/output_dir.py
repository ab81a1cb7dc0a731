"""Check that a command may write to its output folder."""

from pathlib import Path

from t5tune.errors import SettingsError


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that contains files, unless the user has asked to overwrite it.

    Raises:
        SettingsError: the folder isn't empty, or the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"output_dir: {folder}: is a file, not a folder", hint="choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SettingsError(
            f"output_dir: {folder}: already contains files",
            hint="choose another folder, or use --overwrite to replace it",
        )
