"""Check that an adapter's tensors fit its own config and its base. Only the base's config.json is read, no weights.

check_adapter_shapes(state, adapter_config, find_architecture(read_config(base), base), source)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import (
    LORA_MATRIX_PATTERN,
    MAGNITUDE_SUFFIX,
    PEFT_PREFIX,
    TOKEN_ROWS_SUFFIX,
    check_rank,
)
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.errors import CheckpointError
from t5tune.families.architecture import Architecture
from t5tune.file_names import ADAPTER_CONFIG_FILE
from t5tune.formatting import format_count, shorten

_OTHER_BASE_HINT = "is this the base that the adapter was trained on?"


def check_adapter_shapes(
    state: Mapping[str, Tensor], config: Mapping[str, Any], base: Architecture | None, source: Path
) -> None:
    """Refuse tensors that contradict adapter_config.json or, unless `base` is None, the base's config.json."""
    modules = _check_lora_matrices(state, config, source)
    _check_token_rows(state, config, source)
    if base is None:
        return
    shapes = base.derive_shapes()
    for module, shape in modules.items():
        expected = shapes.get(f"{module}.weight")
        if expected is None:
            raise CheckpointError(f"{source}: adapts {module}, which doesn't exist in the base", hint=_OTHER_BASE_HINT)
        if shape != expected:
            problem = f"{source}: {module}: the base's weight is {list(expected)}, B·A is {list(shape)}"
            raise CheckpointError(problem, hint=_OTHER_BASE_HINT)
    if missing := [name for name in base.list_initial_shapes() if f"{PEFT_PREFIX}{name}" not in state]:
        raise CheckpointError(f"{source}: {missing[0]}: missing: the adapter has no head of labels")
    for name, tensor in state.items():
        _check_other_shape(name, tensor, shapes, source)
    _check_all_adapted(modules, config, shapes, source)


def _check_lora_matrices(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: Path
) -> dict[str, tuple[int, int]]:
    """Compare the adapted modules and their ranks with the config. Return the shape of each module's B·A."""
    modules = {}
    for name, tensor in state.items():
        match = LORA_MATRIX_PATTERN.fullmatch(name)
        if match is None or match[2] != "A":
            continue
        check_rank(match, tensor, config, source)
        module = match[1].removeprefix(PEFT_PREFIX)
        b_name = f"{match[1]}.lora_B.weight"
        if b_name not in state or len(state[b_name].shape) != 2:
            raise CheckpointError(f"{source}: {b_name}: missing, or not a matrix")
        modules[module] = (state[b_name].shape[0], tensor.shape[1])
        if not _is_target(module, config):
            targets = f"{ADAPTER_CONFIG_FILE} says target_modules {_format_targets(config)}"
            raise CheckpointError(f"{source}: {name}: module is adapted, but {targets}")
    return modules


def _check_all_adapted(
    modules: Mapping[str, Any], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    restricted = any(config.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
    if not restricted and isinstance(config.get("target_modules"), list):
        linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        wanted = [name for name in linear if _is_target(name, config) and not _is_trained_in_full(name, config)]
        missing = [name for name in wanted if name not in modules]
        if missing:
            targets = f"{ADAPTER_CONFIG_FILE} says target_modules {_format_targets(config)}"
            hint = (
                f"{format_count(len(modules), 'module')} adapted, but {len(modules) + len(missing)} of the base's match"
            )
            raise CheckpointError(f"{source}: {missing[0]}: has no LoRA matrices, although {targets}", hint=hint)


def _check_other_shape(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Check trained token rows, DoRA magnitudes and modules_to_save."""
    own = name.removeprefix(PEFT_PREFIX)
    expected: tuple[int, ...] | None
    if ".lora_" in own and not own.endswith(MAGNITUDE_SUFFIX):
        return
    if own.endswith(TOKEN_ROWS_SUFFIX):
        expected = (tensor.shape[0], *shapes.get(f"{own.removesuffix(TOKEN_ROWS_SUFFIX)}.weight", (0, 0))[1:])
    elif own.endswith(MAGNITUDE_SUFFIX):
        expected = shapes.get(f"{own.removesuffix(MAGNITUDE_SUFFIX)}.weight", (0,))[:1]
    else:
        expected = shapes.get(own)
    if tensor.shape != expected:
        reason = "the base has no such weight" if expected is None else f"expected {list(expected)} for this base"
        raise CheckpointError(f"{source}: {name}: shape {list(tensor.shape)}; {reason}", hint=_OTHER_BASE_HINT)


def _check_token_rows(state: Mapping[str, Tensor], config: Mapping[str, Any], source: Path) -> None:
    indices = config.get("trainable_token_indices")
    lists = indices.values() if isinstance(indices, dict) else [indices] if indices else []
    numbers = {len(ids) for ids in lists if isinstance(ids, list)}
    for name, tensor in state.items():
        if name.endswith(TOKEN_ROWS_SUFFIX) and (len(tensor.shape) != 2 or tensor.shape[0] not in numbers):
            listed = f"{ADAPTER_CONFIG_FILE} lists {sorted(numbers) or 'no'} trained rows"
            raise CheckpointError(f"{source}: {name}: shape {list(tensor.shape)}, but {listed}")
    if numbers and not any(name.endswith(TOKEN_ROWS_SUFFIX) for name in state):
        raise CheckpointError(f"{source}: has no trained token rows, but {ADAPTER_CONFIG_FILE} lists some")


def _format_targets(config: Mapping[str, Any]) -> str:
    targets = config.get("target_modules")
    return " ".join(map(str, targets)) if isinstance(targets, list) else shorten(str(targets))


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts a module: a list contains module names or their ends; a string is a regular expression."""
    targets = config.get("target_modules")
    if isinstance(targets, list):
        return any(module == target or module.endswith(f".{target}") for target in targets)
    # matching an untrusted regular expression could take forever, so leave that check to PEFT
    return True


def _is_trained_in_full(module: str, config: Mapping[str, Any]) -> bool:
    """Whether modules_to_save contains the module or a module around it, so PEFT doesn't adapt it."""
    return any(f".{name}." in f".{module}." for name in config.get("modules_to_save") or ())
