"""Read and check the adapter_config.json of a LoRA adapter. The file is untrusted: anyone may have written it."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from t5tune.errors import CheckpointError
from t5tune.file_names import ADAPTER_CONFIG_FILE
from t5tune.io.reasons import shorten
from t5tune.io.untrusted import read_json_object

ADAPTER_FOLDER_HINT = "give a run folder, a checkpoint in it, or a folder that t5tune export wrote"
# each of these changes the meaning of B·A
UNSUPPORTED_KEYS = (
    "fan_in_fan_out", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config",
    "kasa_config", "layer_replication", "target_parameters", "auto_map", "megatron_config",
)  # fmt: skip
MAX_PATTERN_LENGTH = 200
MAX_PATTERNS = 4096
MAX_EXPRESSIONS = 4  # each may take some milliseconds per module
MAX_NAME_LENGTH = 4096
# a module's full name or the end of one, as PEFT writes them: matched in linear time
_MODULE_NAME_PATTERN = re.compile(r"\^?(\.\*)?([\w.-]|\\[.-]){1,1000}\$?")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json, and check that each key that is used has the type that PEFT gives it.

    Raises:
        CheckpointError: the file is missing, broken, or describes another kind of adapter.
    """
    if not folder.is_dir():
        raise CheckpointError(f"adapter: {folder}: no such folder", hint=ADAPTER_FOLDER_HINT)
    try:
        config = read_json_object(folder, ADAPTER_CONFIG_FILE)
    except FileNotFoundError:
        problem = f"adapter: {folder}: no {ADAPTER_CONFIG_FILE} in this folder"
        raise CheckpointError(problem, hint=ADAPTER_FOLDER_HINT) from None
    path = folder / ADAPTER_CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA is supported")
    for key, (is_right, expected) in KEY_TYPES.items():
        if key in config and not is_right(config[key]):
            raise CheckpointError(f"{path}: {key}: {shorten(repr(config[key]))}, expected {expected}")
    if config.get("lora_alpha") is None:
        raise CheckpointError(f"{path}: lora_alpha: missing, but the scale is lora_alpha / r")
    _check_all_patterns(config, path)
    return config


def _check_all_patterns(config: Mapping[str, Any], path: Path) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        _check_patterns(config.get(name) or {}, f"{path}: {name}")
    # a string is a regular expression, which PEFT matches when --verify and chat load the adapter
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            _check_patterns([config[name]], f"{path}: {name}")


def check_foldable(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse variants of LoRA whose merged weight isn't the sum of W and scale · B·A.

    Raises:
        CheckpointError: the config uses such a variant; the message names the key.
    """
    for key in UNSUPPORTED_KEYS:
        if config.get(key):
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG_FILE}: {key}: {shorten(repr(config[key]))} can't be merged"
            )


def resolve_pattern(pattern: Any, module: str, default: float) -> float:
    """Look up a module in a PEFT pattern: each key is a regex for the whole name, or for all of it after some dot."""
    for key, value in (pattern or {}).items():
        if _compile_pattern(key).fullmatch(module):
            return float(value)
    return float(default)


@functools.cache  # re's own cache is smaller than the number of modules
def _compile_pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})")


def _check_patterns(patterns: Collection[str], source: str) -> None:
    """Refuse regular expressions that could take hours to match against module names (catastrophic backtracking)."""
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(f"{source}: {len(patterns)} patterns; at most {MAX_PATTERNS} are allowed")
    expressions = [pattern for pattern in patterns if not _MODULE_NAME_PATTERN.fullmatch(pattern)]
    for number, pattern in enumerate(expressions):
        choices = pattern.count("|") > 4 or pattern.count("(") > 2 or re.search(r"\)[*+?{]|\\\d", pattern)
        repeats = len(re.findall(r"(?<!\\)[*+]", pattern)) > 3 or re.search(r"(?<!\\)[?{]", pattern)
        if len(pattern) > MAX_PATTERN_LENGTH or choices or repeats or number == MAX_EXPRESSIONS:
            raise CheckpointError(
                f"{source}: {shorten(repr(pattern))} is too complex to match safely",
                hint="list the modules by name",
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise CheckpointError(f"{source}: {shorten(repr(pattern))} isn't a regular expression: {error}") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_name(value: Any) -> bool:
    """Whether this is the name of a module or model: one line, without quotes that end a string in the card's code."""
    if not isinstance(value, str):
        return False
    return 0 < len(value) <= MAX_NAME_LENGTH and value.isprintable() and not set(value) & set('"`')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 20


def _is_optional_bool(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_name_list(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_name, value)))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(row) is int for row in value)


def _is_token_indices(value: Any) -> bool:
    of_modules = isinstance(value, dict) and all(_is_ids(ids) for ids in value.values())
    return value is None or _is_ids(value) or of_modules


def _is_mapping_of(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(of, value.values())))


# key -> (whether a value is valid, what is expected)
KEY_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_count, "a rank"),
    "lora_alpha": (_is_number, "a number"),
    "use_rslora": (_is_optional_bool, "true or false"),
    "use_dora": (_is_optional_bool, "true or false"),
    "lora_bias": (_is_optional_bool, "true or false"),
    "fan_in_fan_out": (_is_optional_bool, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "rank_pattern": (_is_mapping_of(_is_count), "ranks by module name"),
    "alpha_pattern": (_is_mapping_of(_is_number), "numbers by module name"),
    "target_modules": (lambda value: _is_name_list(value) or _is_name(value), "a list of names or a pattern"),
    "exclude_modules": (lambda value: _is_name_list(value) or _is_name(value), "a list of names or a pattern"),
    "modules_to_save": (_is_name_list, "a list of names"),
    "trainable_token_indices": (_is_token_indices, "a list of token ids"),
    "init_lora_weights": (lambda value: _is_optional_bool(value) or _is_text(value), "the name of an initialization"),
    "base_model_name_or_path": (lambda value: value in (None, "") or _is_name(value), "a name"),
    "revision": (lambda value: value in (None, "") or _is_name(value), "a name"),
}
