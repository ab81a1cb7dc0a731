"""adapter_config.json of a LoRA adapter, as PEFT writes it and as a stranger may have written it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.weights.strangers import read_object

CONFIG = "adapter_config.json"
HINT = "name a run folder, a checkpoint of one, or what export wrote"
# each changes what B·A means
UNFOLDABLE = (
    "fan_in_fan_out", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config",
    "kasa_config", "layer_replication", "target_parameters", "auto_map",
)  # fmt: skip
MAX_PATTERN = 200


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, each key that matters of the type that PEFT gives it.

    Raises:
        CheckpointError: it is missing, broken, or of another kind of adapter.
    """
    if not folder.is_dir():
        raise CheckpointError(f"adapter: {folder}: no such folder", hint=HINT)
    try:
        config = read_object(folder, CONFIG)
    except FileNotFoundError:
        raise CheckpointError(f"adapter: {folder}: no {CONFIG} in it", hint=HINT) from None
    path = folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA is known")
    for key, (is_right, expected) in TYPES.items():
        if key in config and not is_right(config[key]):
            raise CheckpointError(f"{path}: {key}: {_short(config[key])} is no {expected}")
    if config.get("lora_alpha") is None:
        raise CheckpointError(f"{path}: lora_alpha: missing; the scale is lora_alpha / r")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(name) or {}:
            _check_pattern(pattern, f"{path}: {name}")
    return config


def check_foldable(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse kinds of LoRA that are no sum of W and scale · B·A.

    Raises:
        CheckpointError: naming the key.
    """
    for key in UNFOLDABLE:
        if config.get(key):
            raise CheckpointError(f"{folder / CONFIG}: {key}: {_short(config[key])} can't be folded")


def pattern_value(pattern: Any, module: str, default: float) -> float:
    """PEFT's rule for alpha_pattern and rank_pattern: a key matches a module's name from a dot or as a whole."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return float(value)
    return float(default)


def _check_pattern(pattern: str, place: str) -> None:
    """A pattern is matched against each module's name: one that could run for hours is refused."""
    nested = re.search(r"\)[*+?{]", pattern)
    if len(pattern) > MAX_PATTERN or nested or len(re.findall(r"(?<!\\)[*+{]", pattern)) > 4:
        raise CheckpointError(f"{place}: {_short(pattern)} is too involved a pattern to be matched safely")
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise CheckpointError(f"{place}: {_short(pattern)} is no pattern: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 20


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_words(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_text, value)))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(row) is int for row in value)


def _is_rows(value: Any) -> bool:
    of_modules = isinstance(value, dict) and all(_is_ids(ids) for ids in value.values())
    return value is None or _is_ids(value) or of_modules


def _is_pattern(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(of, value.values())))


TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_count, "rank"),
    "lora_alpha": (_is_number, "number"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "rank_pattern": (_is_pattern(_is_count), "ranks by module"),
    "alpha_pattern": (_is_pattern(_is_number), "numbers by module"),
    "target_modules": (lambda value: _is_words(value) or _is_text(value), "list of names"),
    "modules_to_save": (_is_words, "list of names"),
    "trainable_token_indices": (_is_rows, "list of rows"),
    "init_lora_weights": (lambda value: _is_flag(value) or _is_text(value), "name of a start"),
    "base_model_name_or_path": (lambda value: value is None or _is_text(value), "name"),
    "revision": (lambda value: value is None or _is_text(value), "name"),
}
