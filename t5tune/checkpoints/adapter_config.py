"""Read and check the adapter_config.json of a LoRA adapter. The file is untrusted: anyone may have written it."""

import functools
import re
import shlex
import warnings
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from t5tune.errors import CheckpointError
from t5tune.file_names import ADAPTER_CONFIG_FILE, CONFIG_FILE
from t5tune.formatting import shorten
from t5tune.io.folder_kinds import describe_folder
from t5tune.io.untrusted import read_json_object
from t5tune.settings.messages import describe_value_error, shorten_file_value

ADAPTER_FOLDER_HINT = "give a run folder, a checkpoint in it, or a folder that t5tune export wrote"
# what axolotl's `adapter` means
ADAPTER_KIND_HINTS = {
    "lora": "leave it out: LoRA is the default",
    "qlora": "to train QLoRA, leave it out and set q_lora: true",
}
# each of these changes the meaning of B·A
UNSUPPORTED_KEYS = (
    "fan_in_fan_out", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "monteclora_config",
    "kasa_config", "layer_replication", "target_parameters", "auto_map", "megatron_config",
)  # fmt: skip
# PEFT's values of init_lora_weights for a trained weight W + scale · B·A. All other values change W first.
PLAIN_INITIALIZATIONS = {None, True, False, "true", "gaussian", "orthogonal", "eva"}
MAX_PATTERN_LENGTH = 200
MAX_PATTERNS = 4096
MAX_EXPRESSIONS = 4  # each may take some milliseconds per module
# a module's full name or the end of one, as PEFT writes them: matched in linear time
_CHOICE_PATTERN = re.compile(r"(?<!\\)\(((?:[\w|]|\\[.-])+)\)(?![*+?{])")
_MODULE_NAME_PATTERN = re.compile(r"\^?(\.\*)?([\w.-]|\\[.-]){1,1000}\$?")


def _check_name(name: str) -> str:
    if not name.isprintable() or set(name) & set('"`'):
        raise ValueError("expected a name on one line, without quotes")
    return name


_Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_check_name)]
_Rank = Annotated[int, Field(gt=0, lt=1 << 20)]
_Number = Annotated[float, Field(gt=-1e30, lt=1e30)]


class _AdapterConfig(BaseModel, strict=True):
    r: _Rank = 8  # PEFT's default
    lora_alpha: _Number  # the scale of B·A is lora_alpha / r
    use_rslora: bool | None = None
    use_dora: bool | None = None
    lora_bias: bool | None = None
    fan_in_fan_out: bool | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    target_modules: list[_Name] | _Name | None = None
    exclude_modules: list[_Name] | _Name | None = None
    modules_to_save: list[_Name] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: str | bool | None = None
    base_model_name_or_path: _Name | Literal[""] | None = None
    revision: _Name | Literal[""] | None = None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json, and check the types of all keys that t5tune uses."""
    if not folder.is_dir():
        hint = ADAPTER_KIND_HINTS.get(str(folder), ADAPTER_FOLDER_HINT)
        raise CheckpointError(f"{folder}: no such folder", hint, setting="adapter")
    try:
        config = read_json_object(folder, ADAPTER_CONFIG_FILE)
    except FileNotFoundError:
        kind = describe_folder(folder)
        if (folder / CONFIG_FILE).is_file():
            problem = f"{folder}: {kind} without an adapter, so there is nothing to merge or load"
            hint = f"use it as it is: t5tune chat {shlex.quote(str(folder))}"
            raise CheckpointError(problem, hint, setting="adapter") from None
        problem = f"{kind}, not an adapter" if kind else f"no {ADAPTER_CONFIG_FILE} in this folder"
        raise CheckpointError(f"{folder}: {problem}", ADAPTER_FOLDER_HINT, setting="adapter") from None
    path = folder / ADAPTER_CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA is supported")
    try:
        _AdapterConfig.model_validate(config)
    except ValidationError as error:
        details = error.errors()[0]
        key = str(details["loc"][0])
        found = f"{shorten_file_value(config[key])}: " if key in config else ""
        raise CheckpointError(f"{path}: {key}: {found}{describe_value_error(details)}") from None
    for name in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        patterns = config.get(name)
        if isinstance(patterns, dict | str):  # PEFT matches a string, too, when --verify and chat load the adapter
            _check_patterns([patterns] if isinstance(patterns, str) else patterns, f"{path}: {name}")
    return config


def check_foldable(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse variants of LoRA whose merged weight isn't the sum of W and scale · B·A."""
    for key in UNSUPPORTED_KEYS:
        if config.get(key):
            path = folder / ADAPTER_CONFIG_FILE
            raise CheckpointError(f"{path}: {key}: {shorten(repr(config[key]))} can't be merged")


def resolve_pattern(pattern: Any, module: str, default: float) -> float:
    """Look up a module in a PEFT pattern: each key is a regex for the whole name, or for its end after a dot."""
    for key, value in (pattern or {}).items():
        if _compile_pattern(key).fullmatch(module):
            return float(value)
    return float(default)


@functools.cache  # re's own cache is smaller than the number of modules
def _compile_pattern(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})")


def _replace_plain_choice(match: re.Match[str]) -> str:
    """Replace a choice between names, such as (q_proj|v_proj), if at most one of them can match at a place."""
    names = sorted(match[1].split("|"))
    is_plain = all(names) and not any(after.startswith(name) for name, after in pairwise(names))
    return "x" if is_plain else match[0]


def _check_patterns(patterns: Collection[str], source: str) -> None:
    """Refuse regular expressions that could take hours to match against module names (catastrophic backtracking)."""
    if len(patterns) > MAX_PATTERNS:
        raise CheckpointError(f"{source}: {len(patterns)} patterns; at most {MAX_PATTERNS} are allowed")
    expressions = [pattern for pattern in patterns if not _MODULE_NAME_PATTERN.fullmatch(pattern)]
    for number, pattern in enumerate(expressions):
        simple = _CHOICE_PATTERN.sub(_replace_plain_choice, pattern)
        choices = simple.count("|") > 4 or simple.count("(") > 2 or re.search(r"\)[*+?{]|\\\d", simple)
        repeats = len(re.findall(r"(?<!\\)[*+]", pattern)) > 3 or re.search(r"(?<!\\)[?{]", pattern)
        if len(pattern) > MAX_PATTERN_LENGTH or choices or repeats or number == MAX_EXPRESSIONS:
            problem = f"{source}: {shorten(repr(pattern))} is too complex to match safely"
            raise CheckpointError(problem, hint="list the modules by name")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # later releases of Python may read `[[` differently
                re.compile(pattern)
        except (re.error, OverflowError, FutureWarning) as error:
            problem = "is ambiguous" if isinstance(error, FutureWarning) else "isn't a regular expression"
            problem = f"{source}: {shorten(repr(pattern))} {problem}: {error}"
            raise CheckpointError(problem, hint="list the modules by name") from error
