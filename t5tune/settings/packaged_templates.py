"""Find, list and read what templates/ holds: runs, DeepSpeed configurations, conversation layouts."""

import json
from pathlib import Path
from typing import Any

from t5tune.errors import SettingsError, suggestion
from t5tune.io.reasons import reason_of


def templates_folder() -> Path:
    """templates/, in the installed package or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


def names(kind: str) -> list[str]:
    """The names under templates/<kind>, sorted."""
    return sorted(path.stem for path in (templates_folder() / kind).iterdir() if path.suffix in {".yaml", ".json"})


def find_run(name_or_path: str) -> Path:
    """The YAML file of `--config`: a path, or a name under templates/runs."""
    return _find("config", "runs", name_or_path, ".yaml")


def find_conversation_template(name_or_path: str) -> Path:
    """The YAML file of `--conversation-template`: a path, or a name under templates/conversations."""
    return _find("conversation_template", "conversations", name_or_path, ".yaml")


def read_deepspeed(name_or_path: str) -> dict[str, Any]:
    """The DeepSpeed configuration of `--deepspeed`: a JSON file, or a name under templates/deepspeed."""
    path = _find("deepspeed", "deepspeed", name_or_path, ".json")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"deepspeed: {path}: can't be read: {reason_of(error)}") from error
    if not isinstance(value, dict):
        raise SettingsError(f"deepspeed: {path}: expected a JSON object")
    return value


def _find(setting: str, kind: str, name_or_path: str, suffix: str) -> Path:
    path = Path(name_or_path)
    # settings may come through a pipe; the others are read more than once
    if path.is_file() or (setting == "config" and path.exists() and not path.is_dir()):
        return path
    packaged = templates_folder() / kind / (name_or_path + suffix)
    if path.name == name_or_path and packaged.is_file():
        return packaged
    known = names(kind)
    if path.exists():
        raise SettingsError(f"{setting}: {name_or_path}: a {suffix} file is expected, this is none")
    raise SettingsError(
        f"{setting}: {name_or_path}: no such file, and no template of that name{suggestion(name_or_path, known)}",
        hint=f"the templates are {', '.join(known)}",
    )
