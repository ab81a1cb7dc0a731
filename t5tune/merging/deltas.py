"""Collect what the adapters of a merge change in each tensor of the base."""

from collections.abc import Iterator, Mapping
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
    collect_low_rank_updates,
    collect_modules_to_save,
    find_token_rows,
    map_token_rows,
    open_adapter,
)
from t5tune.checkpoints.checkpoint import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.errors import CheckpointError
from t5tune.families import EMBEDDING_COPIES, EMBEDDING_WEIGHT, HEAD_WEIGHT
from t5tune.file_names import ADAPTER_CONFIG_FILE
from t5tune.merging.fold import OTHER_BASE_HINT, TrainedRows, WeightDelta

# Values of PEFT's init_lora_weights. With a plain initialization, the trained weight is W + scale · B·A. A reproducible
# one was subtracted from W, and can be computed again from W alone (see merging/pissa.py).
PLAIN_INITIALIZATIONS = {None, True, False, "true", "gaussian", "orthogonal", "eva"}
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
    """Read the adapters and check each of them.

    Raises:
        CheckpointError: an adapter can't be merged, or can't be part of a weighted sum.
    """
    adapters = [Adapter(folder, *open_adapter(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
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
    """Check that the adapter can be part of a weighted sum."""
    for key, reason in (
        ("use_dora", "because norms don't add up"),
        ("init_lora_weights", "because the adapter doesn't contain its initialization"),
    ):
        if adapter.initialization if key == "init_lora_weights" else adapter.config.get(key):
            raise CheckpointError(
                f"{adapter.folder / ADAPTER_CONFIG_FILE}: {key}: {adapter.config[key]}: can't be merged with a "
                f"weight, {reason}",
                hint="merge it alone, with weight 1",
            )


def collect_deltas(adapters: list[Adapter], base: Checkpoint, tied: bool) -> dict[str, WeightDelta]:
    """Collect the changes of all adapters, by the name of the base's tensor.

    Raises:
        CheckpointError: an adapter changes a tensor that the base doesn't have.
    """
    deltas: dict[str, WeightDelta] = {}
    for adapter in adapters:
        for name, delta in _iterate_deltas(adapter, base, tied):
            if name not in base:
                raise CheckpointError(
                    f"{adapter.folder}: adapts {name}, which {base.folder} doesn't have", hint=OTHER_BASE_HINT
                )
            total = deltas.setdefault(name, WeightDelta())
            for kind in ("replacements", "updates", "biases", "rows"):
                getattr(total, kind).extend(getattr(delta, kind))
    if EMBEDDING_WEIGHT in deltas:
        # transformers 4 reads an untied T5's encoder.embed_tokens from shared.weight, so copies must change with it
        copies = [*EMBEDDING_COPIES, HEAD_WEIGHT] if tied else EMBEDDING_COPIES
        deltas |= {copy: deltas[EMBEDDING_WEIGHT] for copy in copies if copy in base}
    return deltas


def _iterate_deltas(adapter: Adapter, base: Checkpoint, tied: bool) -> Iterator[tuple[str, WeightDelta]]:
    config, state, weight = adapter.config, adapter.state, adapter.weight
    updates = collect_low_rank_updates(config, state)
    for name, update in updates.items():
        yield name, WeightDelta(updates=[(update, weight)])
    for name, positions in map_token_rows(config, state, tied).items():
        yield name, WeightDelta(rows=[(TrainedRows(positions, find_token_rows(state, name)), weight)])
    for name, tensor in collect_modules_to_save(config, state).items():
        yield name, WeightDelta(replacements=[(tensor, weight)])
    for name in state:
        if match := LORA_BIAS_PATTERN.fullmatch(name):
            module = match[1].removeprefix(PEFT_PREFIX)
            if f"{module}.bias" in base:
                yield f"{module}.bias", WeightDelta(biases=[(state[name], weight * updates[f"{module}.weight"].scale)])
            elif state[name].to_float32().any():
                raise CheckpointError(
                    f"{adapter.folder}: {name}: the base's layer has no bias to add it to",
                    hint="PEFT can't merge it either: use the adapter unmerged, or train one without lora_bias",
                )


def _check_all_used(adapter: Adapter) -> None:
    """Refuse tensors that merge would ignore: LoRA of an embedding, token rows that the config doesn't list."""
    config, state = adapter.config, adapter.state
    lists_rows = bool(config.get("trainable_token_indices"))
    modules_to_save = collect_modules_to_save(config, state)
    for name in state:
        is_magnitude = bool(config.get("use_dora")) and name.endswith(MAGNITUDE_SUFFIX)
        is_bias = bool(config.get("lora_bias")) and bool(LORA_BIAS_PATTERN.fullmatch(name))
        is_row = lists_rows and name.endswith(TOKEN_ROWS_SUFFIX)
        is_known = LORA_MATRIX_PATTERN.fullmatch(name) or is_magnitude or is_bias or is_row
        if not (is_known or name.removeprefix(PEFT_PREFIX) in modules_to_save):
            raise CheckpointError(f"{adapter.folder}: {name}: merge doesn't support this tensor")
