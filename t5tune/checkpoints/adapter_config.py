"""adapter_config.json of a LoRA adapter, as PEFT writes it and as a stranger may have written it."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.io.untrusted import read_object

CONFIG = "adapter_config.json"
HINT = "name a run folder, a checkpoint of one, or what export wrote"
# each changes what B·A means
UNFOLDABLE = (
    "fan_in_fan_out", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config",
    "kasa_config", "layer_replication", "target_parameters", "auto_map", "megatron_config",
)  # fmt: skip
MAX_PATTERN = 200
MAX_PATTERNS = 4096
MAX_EXPRESSIONS = 4  # each may take some milliseconds a module
MAX_NAME = 4096
# a module's name or its end, as PEFT writes them: matched in a time that grows with its length
_NAME = re.compile(r"\^?(\.\*)?([\w.-]|\\[.-]){1,1000}\$?")


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
        _check_patterns(config.get(name) or {}, f"{path}: {name}")
    for name in ("target_modules", "exclude_modules"):  # PEFT matches a text, where --verify and chat load the adapter
        if isinstance(config.get(name), str):
            _check_patterns([config[name]], f"{path}: {name}")
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
        if _compiled(key).fullmatch(module):
            return float(value)
    return float(default)


@functools.cache  # re's own cache is smaller than the number of modules
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})")


def _check_patterns(patterns: Collection[str], place: str) -> None:
    """Patterns are matched against the names of modules: what could run for hours is refused."""
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(f"{place}: {len(patterns)} patterns; {MAX_PATTERNS} is the most that is read")
    expressions = [pattern for pattern in patterns if not _NAME.fullmatch(pattern)]
    for number, pattern in enumerate(expressions):
        choices = pattern.count("|") > 4 or pattern.count("(") > 2 or re.search(r"\)[*+?{]|\\\d", pattern)
        repeats = len(re.findall(r"(?<!\\)[*+]", pattern)) > 3 or re.search(r"(?<!\\)[?{]", pattern)
        if len(pattern) > MAX_PATTERN or choices or repeats or number == MAX_EXPRESSIONS:
            raise CheckpointError(
                f"{place}: {_short(pattern)} is too involved to be matched safely", hint="list the modules by name"
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise CheckpointError(f"{place}: {_short(pattern)} is no pattern: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    """Of a module or a model: in one line, and nothing that ends a string of the card's code."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable() and not set(value) & set('"`')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 20


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_words(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_name, value)))


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
    "target_modules": (lambda value: _is_words(value) or _is_name(value), "list of names"),
    "exclude_modules": (lambda value: _is_words(value) or _is_name(value), "list of names"),
    "modules_to_save": (_is_words, "list of names"),
    "trainable_token_indices": (_is_rows, "list of rows"),
    "init_lora_weights": (lambda value: _is_flag(value) or _is_text(value), "name of a start"),
    "base_model_name_or_path": (lambda value: value in (None, "") or _is_name(value), "name"),
    "revision": (lambda value: value in (None, "") or _is_name(value), "name"),
}
