"""May a command write into this folder?"""

from pathlib import Path

from t5tune.errors import SettingsError


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds files, unless the user said to replace it.

    Raises:
        SettingsError: the folder isn't empty, or a file stands there.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"output_dir: {folder}: a file stands there", hint="name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise SettingsError(
            f"output_dir: {folder}: holds files already",
            hint="name another folder, or --overwrite to replace it",
        )
