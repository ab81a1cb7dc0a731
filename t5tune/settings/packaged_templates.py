"""Find, list and read the files in templates/: run configs, DeepSpeed configs and conversation templates."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t5tune.errors import SettingsError, find_close_name, suggest_name
from t5tune.file_names import SETTINGS_FILE
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import parse_json_object
from t5tune.settings.field_types import read_path

KINDS = {  # setting -> folder in templates/ and suffix of its files
    "config": ("runs", ".yaml"),
    "conversation_template": ("conversations", ".yaml"),
    "deepspeed": ("deepspeed", ".json"),
}
DESCRIPTION = re.compile(r"^# (?!yaml-language-server)(.*)", re.MULTILINE)
DEEPSPEED_CONFIGS = {  # JSON has no comments
    "zero0": "Each GPU has all of the model, as without DeepSpeed.",
    "zero1": "Shards the optimizer's state.",
    "zero2": "Shards the optimizer's state and the gradients.",
    "zero2-offload": "zero2 with the optimizer's state in host memory.",
    "zero3": "Also shards the weights, including the frozen base.",
    "zero3-offload": "zero3 with the weights and the optimizer's state in host memory.",
}

# DeepSpeed fails without the batch size; without gradient_clipping nothing is clipped, since the Trainer leaves it to
# DeepSpeed
KEYS_FROM_SETTINGS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip
"""Keys of a DeepSpeed config that transformers sets from the settings if their value is "auto"."""
REPLACED_SECTIONS = ("optimizer", "scheduler")
"""Sections of a DeepSpeed config that the settings replace; runs/deepspeed_values.py compares both."""


def find_templates_folder() -> Path:
    """Find the folder templates/: inside the installed package, or next to the package in a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


def list_names(kind: str) -> list[str]:
    """List the sorted names of the files in templates/<kind>."""
    return sorted(path.stem for path in (find_templates_folder() / kind).iterdir() if path.suffix in {".yaml", ".json"})


def describe_templates(kind: str) -> dict[str, str]:
    """Map the names in templates/<kind> to a sentence that describes each: in YAML, the first comment."""
    if kind == "deepspeed":
        return {name: DEEPSPEED_CONFIGS[name] for name in list_names(kind)}
    lines = {name: (find_templates_folder() / kind / f"{name}.yaml").read_text("utf-8") for name in list_names(kind)}
    return {name: DESCRIPTION.search(text)[1] for name, text in lines.items()}  # type: ignore[index]


def is_run_config(word: str) -> bool:
    """Whether a word may be meant as a run config: a file, or a name under templates/runs, perhaps mistyped."""
    known = list_names("runs")
    is_file = word.endswith((".yaml", ".yml", ".json")) or Path(word).exists()
    return is_file or word in known or find_close_name(word, known) is not None


def read_deepspeed_config(name_or_path: str) -> dict[str, Any]:
    """Read the DeepSpeed config of `--deepspeed` as training uses it: missing KEYS_FROM_SETTINGS are "auto", and
    REPLACED_SECTIONS are removed.
    """
    config = read_deepspeed_file(name_or_path)
    own = {key: value for key, value in config.items() if key not in REPLACED_SECTIONS}
    return dict.fromkeys(KEYS_FROM_SETTINGS, "auto") | own


def read_deepspeed_file(name_or_path: str) -> dict[str, Any]:
    """Read a DeepSpeed config, without null in zero_optimization: a JSON file, or a name under templates/deepspeed."""
    path = find_template_file("deepspeed", name_or_path)
    try:
        config = parse_json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"deepspeed: {path}: can't be read: {describe_error(error)}") from error
    for section in REPLACED_SECTIONS:
        content = config.get(section, {})
        if not isinstance(content, dict) or not isinstance(content.get("params") or {}, dict):
            raise SettingsError(f"deepspeed: {path}: {section}: expected an object with type and params")
    return config if "zero_optimization" not in config else config | {"zero_optimization": _check_zero(config, path)}


def _check_zero(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check the types in zero_optimization that t5tune reads, and remove keys that are null, as DeepSpeed does."""
    zero = config["zero_optimization"]
    if not isinstance(zero, dict):
        raise SettingsError(
            f"deepspeed: {path}: zero_optimization: {json.dumps(zero)}: expected an object with a stage"
        )
    zero = {key: value for key, value in zero.items() if value is not None}
    if type(stage := zero.get("stage", 0)) is not int or not 0 <= stage <= 3:
        raise SettingsError(f"deepspeed: {path}: zero_optimization.stage: {json.dumps(stage)}: expected 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(offload := zero.get(key, {}), dict):
            problem = f"deepspeed: {path}: zero_optimization.{key}: {json.dumps(offload)}: expected an object"
            raise SettingsError(problem, hint='give {"device": "cpu"}, or leave it out')
    return zero


def read_zero3_config(deepspeed: str) -> dict[str, Any]:
    """Read a DeepSpeed config that partitions weights; refuse other configs."""
    config = read_deepspeed_config(deepspeed)
    if (stage := get_zero_stage(config)) != 3:
        raise SettingsError(
            f"deepspeed: {deepspeed}: has ZeRO stage {stage}, but only stage 3 partitions weights",
            hint="use zero3 if the base doesn't fit on one GPU; otherwise leave it out",
        )
    return config


def get_zero_stage(deepspeed: dict[str, Any] | None) -> int:
    """Return the ZeRO stage of a DeepSpeed config; 0 without a config."""
    stage: int = (deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
    return stage


def find_template_file(setting: str, name_or_path: str, datasets: Iterable[str] = ()) -> Path:
    """Find the file of `config`, `conversation_template` or `deepspeed`: a path, or a name under templates/.

    Args:
        datasets: other valid names, for the error.
    """
    kind, suffix = KINDS[setting]
    path = Path(read_path(name_or_path))
    # a run config may be a pipe, since it is read only once
    if path.is_file() or (setting == "config" and path.exists() and not path.is_dir()):
        return path
    packaged = find_templates_folder() / kind / (name_or_path + suffix)
    if path.name == name_or_path and packaged.is_file():
        return packaged
    known = list_names(kind)
    if path.exists():
        saved = path / SETTINGS_FILE  # such as in a run folder
        hint = f"give {saved}" if setting == "config" and saved.is_file() else None
        raise SettingsError(f"{setting}: {name_or_path}: expected a {suffix} file", hint=hint)
    advice = suggest_name(name_or_path, [*known, *datasets]) or f"; the templates are {', '.join(known)}"
    if names := ", ".join(datasets):
        advice += f"; the training datasets are {names}"
    raise SettingsError(f"{setting}: {name_or_path}: no file or template of that name{advice}")
