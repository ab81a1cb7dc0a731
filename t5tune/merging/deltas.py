"""Collect the changes that the adapters of a merge make to each tensor of the base."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import (
    LORA_BIAS_PATTERN,
    LORA_MATRIX_PATTERN,
    MAGNITUDE_SUFFIX,
    PEFT_PREFIX,
    TOKEN_ROWS_SUFFIX,
    check_adapter,
    collect_modules_to_save,
    read_adapter,
)
from t5tune.checkpoints.adapter_config import PLAIN_INITIALIZATIONS, resolve_pattern
from t5tune.checkpoints.base_tensors import Checkpoint, are_equal
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.errors import CheckpointError
from t5tune.families.architecture import Architecture
from t5tune.file_names import ADAPTER_CONFIG_FILE
from t5tune.merging.fold import OTHER_BASE_HINT, LowRankUpdate, TrainedRows, WeightDelta

# PEFT subtracts these initializations from W; they can be computed again from W alone (see merging/pissa.py)
REPRODUCIBLE_INITIALIZATIONS = {"pissa", "olora"}


@dataclass(frozen=True)
class Adapter:
    """One adapter of a merge, and its weight in the sum."""

    folder: Path
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    weight: float

    @property
    def initialization(self) -> str | None:
        """pissa or olora if the adapter doesn't contain its initialization, which must be subtracted from the base."""
        initialization = self.config.get("init_lora_weights")
        return initialization if initialization in REPRODUCIBLE_INITIALIZATIONS else None

    def has_more_than_lora(self) -> bool:
        """Whether the adapter contains token rows or whole modules, too."""
        return any(not LORA_MATRIX_PATTERN.fullmatch(name) for name in self.state)


def read_adapters(folders: list[Path], weights: list[float]) -> list[Adapter]:
    """Read the adapters, and check that each can be merged, and added up if there are several."""
    adapters = [Adapter(folder, *read_adapter(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
    for adapter in adapters:
        check_adapter(adapter.state, adapter.config, adapter.folder, must_be_trained=False)
        _check_all_used(adapter)
        _check_initialization(adapter)
        if len(adapters) > 1 or adapter.weight != 1:
            _check_addable(adapter)
    return adapters


def _check_initialization(adapter: Adapter) -> None:
    initialization = adapter.config.get("init_lora_weights")
    if initialization not in PLAIN_INITIALIZATIONS | REPRODUCIBLE_INITIALIZATIONS:
        raise CheckpointError(
            f"{adapter.folder / ADAPTER_CONFIG_FILE}: init_lora_weights: {initialization}: this "
            "initialization changed the base's weights in a way that can't be reproduced from the adapter",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, or set init_lora_weights: true and "
            "merge it into the base that was saved along with it",
        )


def _check_addable(adapter: Adapter) -> None:
    if adapter.config.get("use_dora"):
        key, reason = "use_dora", "norms can't be added"
    elif adapter.initialization:
        key, reason = "init_lora_weights", "the adapter doesn't contain its initialization"
    else:
        return
    raise CheckpointError(
        f"{adapter.folder / ADAPTER_CONFIG_FILE}: {key}: {adapter.config[key]}: can't be merged with a weight, because "
        f"{reason}",
        hint="merge it alone, with weight 1",
    )


def collect_deltas(adapters: list[Adapter], base: Checkpoint, tied: bool) -> dict[str, WeightDelta]:
    """Collect the changes of all adapters, by the name of the base's tensor."""
    deltas: defaultdict[str, WeightDelta] = defaultdict(WeightDelta)
    for adapter in adapters:
        _add_deltas(deltas, adapter, base, tied)
        if unknown := next((name for name in deltas if name not in base), None):
            raise CheckpointError(
                f"{adapter.folder}: adapts {unknown}, which {base.folder} doesn't have", hint=OTHER_BASE_HINT
            )
    # transformers 4 reads an untied T5's encoder.embed_tokens from shared.weight, so copies must change with it
    shared = base.architecture.list_shared(tied).items()
    return {**deltas, **{name: deltas[original] for name, original in shared if original in deltas and name in base}}


def _add_deltas(deltas: defaultdict[str, WeightDelta], adapter: Adapter, base: Checkpoint, tied: bool) -> None:
    config, state, weight = adapter.config, adapter.state, adapter.weight
    updates = _collect_low_rank_updates(config, state)
    for name, update in updates.items():
        deltas[name].updates.append((update, weight))
    for name, rows in _collect_token_rows(config, state, base.architecture, tied).items():
        deltas[name].rows.append((rows, weight))
    for name, tensor in collect_modules_to_save(config, state).items():
        deltas[name].replacements.append((tensor, weight))
    for name in state:
        if match := LORA_BIAS_PATTERN.fullmatch(name):
            module = match[1].removeprefix(PEFT_PREFIX)
            if f"{module}.bias" in base:
                deltas[f"{module}.bias"].biases.append((state[name], weight * updates[f"{module}.weight"].scale))
            elif state[name].to_float32().any():
                raise CheckpointError(
                    f"{adapter.folder}: {name}: the base's layer has no bias to add it to",
                    hint="use the adapter unmerged, or train without lora_bias; PEFT can't merge it either",
                )


def _collect_low_rank_updates(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, LowRankUpdate]:
    """Map each adapted weight's name to its update, scaled as in PEFT: alpha / r, or alpha / √r with use_rslora."""
    updates = {}
    for name, tensor in state.items():
        if (match := LORA_MATRIX_PATTERN.fullmatch(name)) and match[2] == "A":
            module = match[1].removeprefix(PEFT_PREFIX)
            rank = tensor.shape[0]
            alpha = resolve_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            magnitude = state.get(match[1] + MAGNITUDE_SUFFIX)
            updates[f"{module}.weight"] = LowRankUpdate(tensor, state[f"{match[1]}.lora_B.weight"], scale, magnitude)
    return updates


def _collect_token_rows(
    config: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Architecture, tied: bool
) -> dict[str, TrainedRows]:
    """Map the names of the embedding and of the head to their trained rows."""
    indices = config.get("trainable_token_indices") or {}
    if indices and not architecture.token_row_modules:
        problem = (
            f"trainable_token_indices: trained embedding rows of {architecture.model_type} can't be merged: PEFT "
            "trains them without the head, which shares its weight with the decoder's embedding"
        )
        raise CheckpointError(problem, hint="use the adapter unmerged")
    rows: dict[str, TrainedRows] = {}
    embedding, head = architecture.tied_to, architecture.head
    embedding_module = embedding.removesuffix(".weight")
    for module, ids in indices.items() if isinstance(indices, dict) else [(embedding_module, indices)]:
        is_head = module.endswith(head) and not tied
        weight = architecture.head_weight if is_head else embedding
        encoder = architecture.token_row_modules[0]
        modules = [head] if is_head else [encoder, embedding_module, encoder.rpartition(".")[2]]
        names = [f"{PEFT_PREFIX}{module}{TOKEN_ROWS_SUFFIX}" for module in modules]
        found = next((state[name] for name in names if name in state), None)
        if found is None:
            problem = f"the adapter's config lists trained rows of {weight}, but the adapter doesn't contain them"
            raise CheckpointError(problem, hint="use the adapter unmerged; its rows may belong to other weights")
        rows.setdefault(weight, TrainedRows({row: index for index, row in enumerate(ids)}, found))
    _check_other_rows(rows, state, architecture.list_shared(tied))
    return rows


def _check_other_rows(rows: Mapping[str, TrainedRows], state: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
    """Check that merging `rows` loses no trained rows. `shared`: name of a parameter -> weight that it shares."""
    for name, other in state.items():
        if not name.endswith(TOKEN_ROWS_SUFFIX) or any(other is each.trained_KD for each in rows.values()):
            continue
        module = name.removeprefix(PEFT_PREFIX).removesuffix(TOKEN_ROWS_SUFFIX)
        weight = shared.get(f"{module}.weight", f"{module}.weight")
        if weight not in rows:
            problem = f"{module}: t5tune can merge trained rows only of {' and '.join(rows)}"
            raise CheckpointError(problem, hint="use the adapter unmerged")
        if not are_equal(rows[weight].trained_KD, other):
            problem = f"{module}: several modules share {weight}, but their trained rows differ"
            raise CheckpointError(problem, hint="use the adapter unmerged")


def _check_all_used(adapter: Adapter) -> None:
    """Refuse tensors that merge would ignore, such as LoRA of an embedding, or token rows missing in the config."""
    config, state = adapter.config, adapter.state
    modules_to_save = collect_modules_to_save(config, state)
    for name in state:
        if not (
            LORA_MATRIX_PATTERN.fullmatch(name)
            or (config.get("use_dora") and name.endswith(MAGNITUDE_SUFFIX))
            or (config.get("lora_bias") and LORA_BIAS_PATTERN.fullmatch(name))
            or (config.get("trainable_token_indices") and name.endswith(TOKEN_ROWS_SUFFIX))
            or name.removeprefix(PEFT_PREFIX) in modules_to_save
        ):
            problem = f"{adapter.folder}: {name}: merge doesn't support this tensor"
            raise CheckpointError(problem, hint="use the adapter unmerged")
