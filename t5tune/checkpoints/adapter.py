"""Adapter folders, in PEFT's own layout.

adapter_config.json, adapter_model.safetensors    what PeftModel.from_pretrained reads
non_lora_state.safetensors                        every trained tensor that is no LoRA matrix
tokenizer files, template.yaml                    what the adapter was trained with
README.md                                         the model card
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.adapter_config import CONFIG, check_foldable, pattern_value, read_adapter_config
from t5tune.checkpoints.fingerprint import decoded, encoded
from t5tune.checkpoints.model_card import adapter_card
from t5tune.checkpoints.safetensors import SafetensorsFile, Tensors, write_safetensors
from t5tune.checkpoints.tensors import FLOATS, Tensor
from t5tune.checkpoints.tokenizer_files import copy_template, copy_tokenizer
from t5tune.checkpoints.torch_format.file import read_torch_file
from t5tune.errors import CheckpointError
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import holds
from t5tune.settings.lora import UNTRAINABLE

WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
NON_LORA = "non_lora_state.safetensors"
TEMPLATE = "template.yaml"
PREFIX = "base_model.model."
MAGNITUDE = ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"
ENCODER_ROWS = f"{PREFIX}encoder.embed_tokens{ROWS}"
DECODER_ROWS = f"{PREFIX}decoder.embed_tokens{ROWS}"
MAX_TENSORS = 1 << 12
"""T5-XXL has 432 linear layers."""
QUANTISED = {"nf4", "fp4", "int8"}
LORA_NAME = re.compile(r"(.+)\.lora_([AB])\.weight")
LORA_BIAS = re.compile(r"(.+)\.lora_B\.bias")


@dataclass(frozen=True)
class TrainedWith:
    """What goes into an adapter folder beside the tensors."""

    config: Mapping[str, Any]
    tokenizer_folder: Path
    template_file: Path
    base: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the base: see weights.fingerprint."""
    training: str = ""
    """Lines of the model card on data and settings."""


@dataclass(frozen=True)
class LowRank:
    """The update of one weight: scale · B·A. A is [R, I], B is [O, R]; DoRA's row norms are [O]."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    magnitude_O: Tensor | None = None


def saved_name(name: str) -> str:
    """A parameter's name in the training model -> its name in PEFT's file."""
    name = name.replace(".modules_to_save.default.", ".")
    return re.sub(r"(\.lora_magnitude_vector)\.default\.weight$|\.default(?=$|\.weight$)", r"\1", name)


def without_start(state: Mapping[str, Tensor], taken_out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters that began as a part of the base's weights -> adapters for the base as it is, of twice the rank.

    PiSSA and OLoRA train W - s·B₀·A₀ + s·B·A, which is W + s·[B, -B₀]·[A; A₀] (PEFT's subtract_mutated_init).
    """
    result = dict(state)
    for name, start in taken_out.items():
        values, first = state[name].to_float32(), start.to_float32()
        is_a = LORA_NAME.fullmatch(name)[2] == "A"  # type: ignore[index]
        both = np.concatenate([values, first], 0) if is_a else np.concatenate([values, -first], 1)
        result[name] = Tensor("F32", np.ascontiguousarray(both))
    return result


def config_without_start(config: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter_config.json that goes with `without_start`: the same scale at twice the rank."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return {**config, "r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}


def starts_in(state: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `without_start` put behind each of the `trained` matrices in a saved `state` of twice their rank."""
    found = {}
    for name, values in trained.items():
        match = LORA_NAME.fullmatch(name)
        if match and name in state and math.prod(state[name].shape) == 2 * math.prod(values.shape):
            both = state[name].to_float32()
            rank = values.shape[0 if match[2] == "A" else 1]
            start = both[rank:] if match[2] == "A" else -both[:, rank:]
            found[name] = Tensor("F32", np.ascontiguousarray(start))
    return found


def with_copies(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Add the decoder's rows of the embedding, which it shares with the encoder, where the config lists both."""
    indices = config.get("trainable_token_indices")
    result = dict(state)
    if isinstance(indices, dict) and "decoder.embed_tokens" in indices and ENCODER_ROWS in state:
        result.setdefault(DECODER_ROWS, state[ENCODER_ROWS])
    return result


def check_adapter(
    state: Mapping[str, Tensor], config: Mapping[str, Any], place: Path, must_have_moved: bool = True
) -> None:
    """Refuse an adapter that can't be right.

    Raises:
        CheckpointError: no LoRA pair, a half of one, wrong rank, an empty or non-finite tensor, or every
            lora_B zero, as it is before the first step.
    """
    pairs: dict[str, set[str]] = {}
    moved = False
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{place}: {name}: dtype {tensor.dtype} is no floating type")
        values = tensor.to_float32()
        if values.size == 0:
            raise CheckpointError(f"{place}: {name}: empty tensor {list(tensor.shape)}")
        if not np.isfinite(values).all():
            raise CheckpointError(f"{place}: {name}: holds NaN or infinity", hint="go back to an earlier checkpoint")
        if match := LORA_NAME.fullmatch(name):
            pairs.setdefault(match[1], set()).add(match[2])
            if len(tensor.shape) != 2:
                raise CheckpointError(f"{place}: {name}: {list(tensor.shape)} is no matrix")
            rank = tensor.shape[0 if match[2] == "A" else 1]
            module = match[1].removeprefix(PREFIX)
            expected = pattern_value(config.get("rank_pattern"), module, config.get("r", rank))
            if rank != expected:
                raise CheckpointError(f"{place}: {name}: rank {rank}, but {CONFIG} says r {expected:g}")
            moved |= match[2] == "B" and bool(values.any())
    if not pairs:
        raise CheckpointError(f"{place}: holds no LoRA matrix")
    for module, halves in pairs.items():
        if halves != {"A", "B"}:
            raise CheckpointError(f"{place}: {module}: lora_{min({'A', 'B'} - halves)} is missing")
        if config.get("use_dora") and module + MAGNITUDE not in state:
            raise CheckpointError(f"{place}: {module}: {MAGNITUDE[1:]} is missing, but {CONFIG} says use_dora")
    _check_whole_modules(state, config, place)
    if must_have_moved and not moved:
        raise CheckpointError(
            f"{place}: every lora_B is zero, as before the first step: nothing was learned",
            hint="train longer, or with a larger learning rate",
        )


def _check_whole_modules(state: Mapping[str, Tensor], config: Mapping[str, Any], place: Path) -> None:
    for name in config.get("modules_to_save") or ():
        if name.rpartition(".")[2] in UNTRAINABLE:
            raise CheckpointError(
                f"{place / CONFIG}: modules_to_save: {name}: PEFT's copy of it is not what a T5 reads",
                hint="train rows of new tokens with trainable_token_indices",
            )
        if not whole_modules({"modules_to_save": [name]}, state):
            raise CheckpointError(f"{place / CONFIG}: modules_to_save: {name}: no tensor of it in {WEIGHTS}")


def write_adapter(
    folder: Path,
    state: Mapping[str, Tensor],
    trained_with: TrainedWith,
    non_lora: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter folder's files into `folder`.

    Args:
        non_lora: more tensors for non_lora_state.safetensors beside the trained ones; None: no such file.
    """
    state = with_copies(state, trained_with.config)
    write_safetensors(folder / WEIGHTS, state, {"format": "pt"} | encoded(trained_with.base))
    if non_lora is not None:
        extra = {name.removeprefix(PREFIX): value for name, value in state.items() if not LORA_NAME.fullmatch(name)}
        write_safetensors(folder / NON_LORA, {**non_lora, **extra}, {"format": "pt"})
    write_json(folder / CONFIG, dict(trained_with.config))
    copy_tokenizer(trained_with.tokenizer_folder, folder)
    copy_template(trained_with.template_file, folder)
    (folder / "README.md").write_text(adapter_card(trained_with.config, trained_with.training), encoding="utf-8")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, tensors by PEFT's names) of an adapter folder or a run folder.

    Raises:
        CheckpointError: as `open_adapter`.
    """
    config, tensors = open_adapter(folder)
    return config, dict(tensors)


def open_adapter(folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """`read_adapter` that maps a tensor only while it is used, for adapters that are large themselves.

    Raises:
        CheckpointError: it holds no adapter, or of a kind that can't be folded.
    """
    config = read_adapter_config(folder)
    check_foldable(config, folder)
    return config, read_adapter_tensors(folder)


def read_adapter_tensors(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of an adapter's file, by the names in it.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    if holds(folder, WEIGHTS):
        file = SafetensorsFile(folder / WEIGHTS)
        if len(file.entries) > MAX_TENSORS:
            raise CheckpointError(f"{file.path}: {len(file.entries)} tensors; an adapter has {MAX_TENSORS} at most")
        return Tensors(file)
    if holds(folder, OLD_WEIGHTS):
        state = read_torch_file(folder / OLD_WEIGHTS)
        if isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values()):
            return dict(state)
        raise CheckpointError(f"{folder / OLD_WEIGHTS}: expected a state dict of tensors")
    raise CheckpointError(f"adapter: {folder}: no {WEIGHTS} in it", hint="a run folder has one when its run is over")


def base_facts(folder: Path) -> dict[str, Any]:
    """What an adapter's file says of the base that it was trained on; nothing where t5tune didn't write it.

    Raises:
        CheckpointError: the file is broken.
    """
    if not holds(folder, WEIGHTS):
        return {}
    facts = decoded(SafetensorsFile(folder / WEIGHTS).metadata)
    for name, value in facts.items():
        if not isinstance(value, str | bool) or (name == "onto" and value not in QUANTISED):
            raise CheckpointError(f"{folder / WEIGHTS}: what it tells of its base: {name}: {str(value)[:100]!r}")
    return facts


def low_rank_updates(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """Base weight's name -> its update, scaled as PEFT does: alpha / r, or alpha / √r with use_rslora."""
    updates = {}
    for name, tensor in state.items():
        if (match := LORA_NAME.fullmatch(name)) and match[2] == "A":
            module = match[1].removeprefix(PREFIX)
            rank = tensor.shape[0]
            alpha = pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            magnitude = state.get(match[1] + MAGNITUDE)
            updates[f"{module}.weight"] = LowRank(tensor, state[f"{match[1]}.lora_B.weight"], scale, magnitude)
    return updates


def whole_modules(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Base weight's name -> the tensor that takes its place: the parameters of modules_to_save."""
    listed = tuple(config.get("modules_to_save") or ())
    names = {name: name.removeprefix(PREFIX) for name in state if not LORA_NAME.fullmatch(name)}
    return {base: state[name] for name, base in names.items() if listed and base.rpartition(".")[0].endswith(listed)}


def token_rows(config: Mapping[str, Any], state: Mapping[str, Tensor], tied: bool) -> dict[str, dict[int, int]]:
    """Base weight's name -> {row of the weight: row of the adapter's tensor}; see `rows_tensor`."""
    indices = config.get("trainable_token_indices")
    if not indices:
        return {}
    if isinstance(indices, list):
        indices = {"shared": indices}
    rows: dict[str, dict[int, int]] = {}
    for module, ids in indices.items():
        weight = "lm_head.weight" if module.endswith("lm_head") else "shared.weight"
        if weight == "lm_head.weight" and tied:
            weight = "shared.weight"
        rows.setdefault(weight, {row: place for place, row in enumerate(ids)})
    return rows


def rows_tensor(state: Mapping[str, Tensor], weight: str) -> Tensor:
    """The trained rows of the embedding or of the head."""
    modules = ["lm_head"] if weight == "lm_head.weight" else ["encoder.embed_tokens", "shared", "embed_tokens"]
    for module in modules:
        if (name := f"{PREFIX}{module}{ROWS}") in state:
            return state[name]
    raise CheckpointError(f"the adapter lists trained rows of {weight}, but holds none")
