"""Read, check and write adapter folders in PEFT's layout.

adapter_config.json, adapter_model.safetensors    read by PeftModel.from_pretrained
non_lora_state.safetensors                        every trained tensor that isn't a LoRA parameter
tokenizer files, template.yaml                    tokenizer and conversation template of the training
README.md                                         model card
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.adapter_config import check_foldable, read_adapter_config, resolve_pattern
from t5tune.checkpoints.model_card import build_adapter_card
from t5tune.checkpoints.tensor_files.safetensors import SafetensorsFile, write_safetensors
from t5tune.checkpoints.tensor_files.tensors import FLOAT_DTYPES, Tensor
from t5tune.checkpoints.tensor_files.torch_file import read_state_dict
from t5tune.checkpoints.tokenizer_files import write_supporting_files
from t5tune.checkpoints.training_data import TOKEN_CLASSIFICATION
from t5tune.data.labels import LabelTask
from t5tune.errors import CheckpointError
from t5tune.families import EMBEDDINGS_AND_HEADS
from t5tune.families.architecture import Architecture
from t5tune.families.encoder import ENCODERS
from t5tune.file_names import (
    ADAPTER_BIN_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MODEL_CARD_FILE,
    NON_LORA_FILE,
)
from t5tune.formatting import shorten
from t5tune.io.atomic import write_json
from t5tune.io.reasons import describe_error
from t5tune.io.untrusted import has_file, parse_json_object

PEFT_PREFIX = "base_model.model."
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"
TOKEN_ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"
MAX_TENSORS = 1 << 12  # T5-XXL has 432 linear layers
LABEL_HEADS = {encoder.head.partition(".")[0] for encoder in ENCODERS.values()}
QUANTIZATIONS = {"nf4", "fp4", "int8"}
BASE_KEY = "t5tune"  # in safetensors' metadata: identifies the base; see checkpoints.fingerprint
LORA_MATRIX_PATTERN = re.compile(r"(.+)\.lora_([AB])\.weight")
LORA_BIAS_PATTERN = re.compile(r"(.+)\.lora_B\.bias")


@dataclass(frozen=True)
class AdapterMetadata:
    """The contents of an adapter folder besides its tensors.

    Args:
        files: tokenizer and template, name -> content; see checkpoints.tokenizer_files.
        training: the model card's lines about data and settings.
        labels: that the model predicts; None: it predicts texts.
    """

    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    """The tokenizer's and the template's files: name -> content; see checkpoints.tokenizer_files."""
    base: Mapping[str, Any] = field(default_factory=dict)
    training: str = ""
    """The model card's lines about data and settings."""
    labels: LabelTask | None = None


def to_peft_name(name: str) -> str:
    """Convert a parameter's name in the training model to its name in PEFT's file."""
    name = name.replace(".modules_to_save.default.", ".")
    return re.sub(r"(\.lora_magnitude_vector)\.default\.weight$|\.default(?=$|\.weight$)", r"\1", name)


def convert_to_plain_lora(state: Mapping[str, Tensor], subtracted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a PiSSA or OLoRA adapter to a plain LoRA adapter of twice the rank, for the unmodified base.

    PiSSA and OLoRA train W - s·B₀·A₀ + s·B·A, which equals W + s·[B, -B₀]·[A; A₀] (PEFT's subtract_mutated_init).
    `subtracted` has the initial matrices B₀ and A₀ by PEFT's names.
    """
    result = dict(state)
    for name, initial in subtracted.items():
        values, first = state[name].to_float32(), initial.to_float32()
        is_a = LORA_MATRIX_PATTERN.fullmatch(name)[2] == "A"  # type: ignore[index]
        both = np.concatenate([values, first], 0) if is_a else np.concatenate([values, -first], 1)
        result[name] = Tensor("F32", np.ascontiguousarray(both))
    return result


def convert_config_to_plain_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert adapter_config.json along with `convert_to_plain_lora`: the same scale at twice the rank."""
    # the scale is alpha / √r with rsLoRA, else alpha / r
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return {**config, "r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}


def extract_initial_matrices(state: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extract B₀ and A₀ from a `state` of `convert_to_plain_lora`; the shapes in `trained` give the trained rank."""
    found = {}
    for name, values in trained.items():
        match = LORA_MATRIX_PATTERN.fullmatch(name)
        if match and name in state and math.prod(state[name].shape) == 2 * math.prod(values.shape):
            both = state[name].to_float32()
            rank = values.shape[0 if match[2] == "A" else 1]
            initial = both[rank:] if match[2] == "A" else -both[:, rank:]
            found[name] = Tensor("F32", np.ascontiguousarray(initial))
    return found


def add_decoder_rows(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Add the decoder's trained embedding rows, which it shares with the encoder, if the config lists both."""
    indices = config.get("trainable_token_indices")
    result = dict(state)
    if isinstance(indices, dict) and len(indices) > 2:  # the encoder's embedding, the decoder's, and the head
        encoder, decoder = (f"{PEFT_PREFIX}{module}{TOKEN_ROWS_SUFFIX}" for module in list(indices)[:2])
        if encoder in state:
            result.setdefault(decoder, state[encoder])
    return result


def check_adapter(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: Path, must_be_trained: bool = True
) -> None:
    """Refuse an invalid adapter and, with `must_be_trained`, one whose lora_B are all zero."""
    pairs: dict[str, set[str]] = {}
    is_trained = False
    for name, tensor in state.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(f"{source}: {name}: dtype {tensor.dtype} isn't a floating-point type")
        values = tensor.to_float32()
        if values.size == 0:
            raise CheckpointError(f"{source}: {name}: empty tensor {list(tensor.shape)}")
        check_finite(name, values, source)
        if match := LORA_MATRIX_PATTERN.fullmatch(name):
            pairs.setdefault(match[1], set()).add(match[2])
            check_rank(match, tensor, config, source)
            is_trained |= match[2] == "B" and bool(values.any())
    if not pairs:
        raise CheckpointError(f"{source}: contains no LoRA matrices")
    for module, halves in pairs.items():
        if halves != {"A", "B"}:
            raise CheckpointError(f"{source}: {module}: lora_{min({'A', 'B'} - halves)} is missing")
        if config.get("use_dora") and module + MAGNITUDE_SUFFIX not in state:
            lack = f"{MAGNITUDE_SUFFIX[1:]} is missing, but {ADAPTER_CONFIG_FILE} says use_dora"
            raise CheckpointError(f"{source}: {module}: {lack}")
    _check_modules_to_save(state, config, source)
    if must_be_trained and not is_trained:
        problem = f"{source}: every lora_B is zero, as before the first training step: the adapter changes nothing"
        raise CheckpointError(problem, hint="train longer, or with a higher learning rate")


def check_finite(name: str, values: npt.NDArray[np.float32], source: Path) -> None:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{source}: {name}: contains NaN or infinity", hint="use an earlier checkpoint")


def check_rank(match: re.Match[str], tensor: Tensor, config: Mapping[str, Any], source: Path) -> None:
    """Refuse a LoRA matrix whose rank isn't the config's; `match` is LORA_MATRIX_PATTERN's for the tensor's name."""
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{source}: {match[0]}: shape {list(tensor.shape)}, expected a matrix")
    rank = tensor.shape[0 if match[2] == "A" else 1]
    module = match[1].removeprefix(PEFT_PREFIX)
    expected = resolve_pattern(config.get("rank_pattern"), module, config.get("r", rank))
    if rank != expected:
        raise CheckpointError(f"{source}: {match[0]}: rank {rank}, but {ADAPTER_CONFIG_FILE} says r {expected:g}")


def _check_modules_to_save(state: Mapping[str, Tensor], config: Mapping[str, Any], source: Path) -> None:
    key = f"{source / ADAPTER_CONFIG_FILE}: modules_to_save"
    # PEFT lists all names that a head of labels may have
    heads = LABEL_HEADS if config.get("task_type") == TOKEN_CLASSIFICATION else set()
    has_head = bool(collect_modules_to_save({"modules_to_save": heads}, state))
    for name in config.get("modules_to_save") or ():
        if name.rpartition(".")[2] in EMBEDDINGS_AND_HEADS:
            problem = f"{key}: {name}: the model ignores PEFT's copy of it, so it wouldn't be trained"
            raise CheckpointError(problem, hint="train the rows of new tokens with trainable_token_indices")
        if not collect_modules_to_save({"modules_to_save": [name]}, state) and not (has_head and name in heads):
            raise CheckpointError(f"{key}: {name}: no such tensor in {ADAPTER_WEIGHTS_FILE}")


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], metadata: AdapterMetadata, with_non_lora_state: bool = False
) -> None:
    """Write an adapter folder's files into `folder`; non_lora_state.safetensors only on request."""
    state = add_decoder_rows(state, metadata.config)
    base = {BASE_KEY: json.dumps(dict(metadata.base), sort_keys=True)} if metadata.base else {}
    write_safetensors(folder / ADAPTER_WEIGHTS_FILE, state, {"format": "pt"} | base)
    if with_non_lora_state:
        non_lora = {name.removeprefix(PEFT_PREFIX): value for name, value in state.items() if ".lora_" not in name}
        write_safetensors(folder / NON_LORA_FILE, non_lora, {"format": "pt"})
    write_json(folder / ADAPTER_CONFIG_FILE, dict(metadata.config))
    write_supporting_files(folder, metadata.files)
    card = build_adapter_card(metadata.config, metadata.training, metadata.labels)
    (folder / MODEL_CARD_FILE).write_text(card, encoding="utf-8")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (adapter_config.json, tensors by PEFT's names) of an adapter or run folder that can be merged."""
    config = read_adapter_config(folder)
    check_foldable(config, folder)
    return config, read_adapter_tensors(folder)


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Read an adapter's tensors by their names in the file."""
    if has_file(folder, ADAPTER_WEIGHTS_FILE):
        file = SafetensorsFile(folder / ADAPTER_WEIGHTS_FILE)
        if (count := len(file.entries)) > MAX_TENSORS:
            raise CheckpointError(f"{file.path}: {count} tensors; an adapter may have at most {MAX_TENSORS}")
        return {name: file.get_tensor(name) for name in file.entries}
    if has_file(folder, ADAPTER_BIN_FILE):
        return read_state_dict(folder / ADAPTER_BIN_FILE)
    problem = f"{folder}: no {ADAPTER_WEIGHTS_FILE} in this folder"
    raise CheckpointError(problem, "a run folder contains it once the run has finished", setting="adapter")


def read_base_metadata(folder: Path) -> dict[str, Any]:
    """Read the description of the base in an adapter's file; empty if t5tune didn't write the file."""
    path = folder / ADAPTER_WEIGHTS_FILE
    if not has_file(folder, ADAPTER_WEIGHTS_FILE) or (text := SafetensorsFile(path).metadata.get(BASE_KEY)) is None:
        return {}
    try:
        base_metadata = parse_json_object(text.encode())
    except ValueError as error:
        raise CheckpointError(f"{path}: metadata about its base: {describe_error(error)}") from error
    for name, value in base_metadata.items():
        if not isinstance(value, str | bool) or (name == "onto" and value not in QUANTIZATIONS):
            raise CheckpointError(f"{path}: metadata about its base: {name}: unexpected {shorten(str(value))!r}")
    return base_metadata


def read_training_precision(adapter: Path) -> dict[str, Any]:
    """Read the base's precision in training, as settings: `bf16`, `q_lora` and its details.

    Empty if t5tune didn't train the adapter.
    """
    metadata = read_base_metadata(adapter)
    names = ("bf16", "double_quant", "quantize_wo")
    # an edited file may lack some, or have a text in their place
    found = {name: value for name in names if isinstance(value := metadata.get(name), bool)}
    if "onto" in metadata:
        return found | {"q_lora": True, "quant_type": metadata["onto"]}
    return {"bf16": found["bf16"], "q_lora": False} if "bf16" in found else {}


def collect_modules_to_save(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map base weights' names to the tensors of modules_to_save that replace them."""
    listed = tuple(config.get("modules_to_save") or ())
    names = {name: name.removeprefix(PEFT_PREFIX) for name in state if not LORA_MATRIX_PATTERN.fullmatch(name)}
    return {base: state[name] for name, base in names.items() if is_inside(base, listed)}


def is_inside(parameter: str, module_endings: tuple[str, ...]) -> bool:
    """Whether a parameter is in a module whose path has one of these endings, or in a module below it.

    This is PEFT's rule for modules_to_save: `layer_norm` also names each `final_layer_norm`.
    """
    path = parameter
    while path := path.rpartition(".")[0]:
        if path.endswith(module_endings):
            return True
    return False


def build_token_indices(ids: list[int], architecture: Architecture, tied: bool) -> Any:
    """Build PEFT's trainable_token_indices for these rows of the embedding and the head.

    Stock PEFT drops one of two modules with equal index lists if the model is marked as tied, and transformers 5 marks
    every T5 as tied. So the indices of an untied head are listed in the reverse order of the embedding's: then stock
    PEFT loads the saved adapter correctly without extra code.
    """
    if tied:
        return list(ids)
    return {name: list(ids) for name in architecture.token_row_modules} | {architecture.head: ids[::-1]}
