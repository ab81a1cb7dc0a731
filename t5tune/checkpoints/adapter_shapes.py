"""Does an adapter fit its own config, and the base that it is for? Told from config.json alone, without weights.

check_fit(state, adapter_config, read_config(base), place)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import LORA_NAME, MAGNITUDE, PREFIX, ROWS
from t5tune.checkpoints.adapter_config import CONFIG
from t5tune.checkpoints.tensors import Tensor
from t5tune.errors import CheckpointError
from t5tune.families import of_type

_HINT = "is this the base that the adapter was trained on?"


def check_fit(
    state: Mapping[str, Tensor], config: Mapping[str, Any], base: Mapping[str, Any] | None, place: Path
) -> None:
    """Refuse names and shapes that contradict adapter_config.json, or the config.json of the base.

    Args:
        base: None where it isn't at hand, or no T5.

    Raises:
        CheckpointError: by the tensor's name.
    """
    modules = {}
    for name, tensor in state.items():
        match = LORA_NAME.fullmatch(name)
        if match is None or match[2] != "A":
            continue
        module = match[1].removeprefix(PREFIX)
        modules[module] = (_dimension(state, f"{match[1]}.lora_B.weight", 0, place), tensor.shape[-1])
        if not _is_target(module, config):
            raise CheckpointError(f"{place}: {name}: adapted, but {CONFIG} says target_modules {_targets(config)}")
        rank = _of_pattern(config.get("rank_pattern"), module, config.get("r"))
        if rank is not None and tensor.shape[0] != rank:
            raise CheckpointError(f"{place}: {name}: rank {tensor.shape[0]}, but {CONFIG} says {rank}")
    _check_token_rows(state, config, place)
    if base is None:
        return
    shapes = base_shapes(base)
    for module, shape in modules.items():
        expected = shapes.get(f"{module}.weight")
        if expected is None:
            raise CheckpointError(f"{place}: adapts {module}, which the base doesn't have", hint=_HINT)
        if shape != expected:
            raise CheckpointError(
                f"{place}: {module}: the base's weight is {list(expected)}, B·A is {list(shape)}", hint=_HINT
            )
    for name, tensor in state.items():
        _check_other(name, tensor, shapes, place)
    restricted = any(config.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
    if not restricted and isinstance(config.get("target_modules"), list):
        linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
        lost = [name for name in linear if _is_target(name, config) and name not in modules]
        if lost:
            raise CheckpointError(
                f"{place}: {lost[0]}: no LoRA matrices of it, though {CONFIG} says target_modules {_targets(config)}",
                hint=f"{len(modules)} modules are adapted, the base has {len(modules) + len(lost)} such",
            )


def base_shapes(base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a T5's weights, by their names in its file: [out, in] of linear layers. Its type must be known.

    Raises:
        CheckpointError: its config.json lacks a size.
    """
    try:
        width, inner = base["d_model"], base["d_kv"] * base["num_heads"]
        wide, words = base["d_ff"], base["vocab_size"]
        layers = {"encoder": base["num_layers"], "decoder": base.get("num_decoder_layers") or base["num_layers"]}
        buckets = base.get("relative_attention_num_buckets", 32)
        if not all(type(size) is int and 0 < size < 1 << 32 for size in (width, inner, wide, words, buckets)):
            raise TypeError
        if not all(type(number) is int and 0 < number < 1 << 12 for number in layers.values()):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise CheckpointError("the base's config.json: a size of the model is missing or no number") from error
    family = of_type(base)
    gated = str(base.get("feed_forward_proj", family.default_feed_forward)).startswith("gated-")
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (words, width), "lm_head.weight": (words, width)}
    for stack, number in layers.items():
        shapes[f"{stack}.embed_tokens.weight"] = (words, width)
        shapes[f"{stack}.final_layer_norm.weight"] = (width,)
        attentions = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
        for block in range(number):
            layer = f"{stack}.block.{block}.layer"
            for index, attention in enumerate(attentions):
                for part in "qkv":
                    shapes[f"{layer}.{index}.{attention}.{part}.weight"] = (inner, width)
                shapes[f"{layer}.{index}.{attention}.o.weight"] = (width, inner)
                bias = f"{layer}.{index}.{attention}.relative_attention_bias.weight"
                if index == 0 and (block == 0 or family.bias_in_each_block):
                    shapes[bias] = (buckets, base["num_heads"])
                shapes[f"{layer}.{index}.layer_norm.weight"] = (width,)
            last = f"{layer}.{len(attentions)}"
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                shapes[f"{last}.DenseReluDense.{part}.weight"] = (wide, width)
            shapes[f"{last}.DenseReluDense.wo.weight"] = (width, wide)
            shapes[f"{last}.layer_norm.weight"] = (width,)
    return shapes


def _check_other(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]], place: Path) -> None:
    """Rows, norms and modules_to_save; a name that no T5 has is refused too."""
    own = name.removeprefix(PREFIX)
    expected: tuple[int, ...] | None
    if ".lora_" in own and not own.endswith(MAGNITUDE):
        return
    if own.endswith(ROWS):
        expected = (tensor.shape[0], *shapes.get(f"{own.removesuffix(ROWS)}.weight", (0, 0))[1:])
    elif own.endswith(MAGNITUDE):
        expected = shapes.get(f"{own.removesuffix(MAGNITUDE)}.weight", (0,))[:1]
    else:
        expected = shapes.get(own)
    if tensor.shape != expected:
        said = "no such weight" if expected is None else f"{list(expected)}"
        raise CheckpointError(f"{place}: {name}: {list(tensor.shape)}, by the base's config.json {said}", hint=_HINT)


def _check_token_rows(state: Mapping[str, Tensor], config: Mapping[str, Any], place: Path) -> None:
    indices = config.get("trainable_token_indices")
    lists = indices.values() if isinstance(indices, dict) else [indices] if indices else []
    numbers = {len(ids) for ids in lists if isinstance(ids, list)}
    for name, tensor in state.items():
        if name.endswith(ROWS) and (len(tensor.shape) != 2 or tensor.shape[0] not in numbers):
            raise CheckpointError(
                f"{place}: {name}: {list(tensor.shape)}, but {CONFIG} lists {sorted(numbers) or 'no'} trained rows"
            )
    if numbers and not any(name.endswith(ROWS) for name in state):
        raise CheckpointError(f"{place}: {CONFIG} lists trained rows of tokens, but the checkpoint holds none")


def _dimension(state: Mapping[str, Tensor], name: str, axis: int, place: Path) -> int:
    if name not in state or len(state[name].shape) != 2:
        raise CheckpointError(f"{place}: {name}: missing, or no matrix")
    return state[name].shape[axis]


def _targets(config: Mapping[str, Any]) -> str:
    targets = config.get("target_modules")
    return " ".join(map(str, targets)) if isinstance(targets, list) else str(targets)[:100]


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """PEFT's rule: a list holds names of modules or their ends; a text is an expression for the whole name."""
    targets = config.get("target_modules")
    if isinstance(targets, list):
        return any(module == target or module.endswith(f".{target}") for target in targets)
    # an expression of a stranger's could take for ever to match; such a name is left to PEFT
    return True


def _of_pattern(pattern: Any, module: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern, where its keys are names: a key is the module's name or the end of it."""
    for key, value in (pattern or {}).items() if isinstance(pattern, dict) else ():
        name = re.sub(r"\\(.)", r"\1", str(key)).removeprefix("^").removeprefix(".*")
        if module == name or module.endswith(f".{name}"):
            return value
        if re.search(r"[][*+?|(){}]", name):
            return None  # an expression: left to PEFT
    return default
