"""Adapters -> what they do to each tensor of the base, by its name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter import (
    LORA_BIAS,
    LORA_NAME,
    MAGNITUDE,
    PREFIX,
    ROWS,
    check_adapter,
    low_rank_updates,
    open_adapter,
    rows_tensor,
    token_rows,
    whole_modules,
)
from t5tune.checkpoints.adapter_config import CONFIG
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.errors import CheckpointError
from t5tune.merging.fold import OTHER_BASE, Change, Rows

EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# what a start leaves in the adapter, by PEFT's init_lora_weights: these add nothing to what W + scale · B·A says
PLAIN_STARTS = {None, True, False, "true", "gaussian", "orthogonal", "eva"}
REPEATABLE_STARTS = {"pissa", "olora"}


@dataclass(frozen=True)
class Adapter:
    """One adapter of a merge, and how much of it is added."""

    folder: Path
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    weight: float

    @property
    def start(self) -> str | None:
        """pissa or olora where it was saved without its start, and the base must lose that part first."""
        start = self.config.get("init_lora_weights")
        return start if start in REPEATABLE_STARTS else None

    def has_more_than_lora(self) -> bool:
        """Whether rows or whole modules were trained too."""
        return any(not LORA_NAME.fullmatch(name) for name in self.state)


def read_adapters(folders: list[Path], weights: list[float]) -> list[Adapter]:
    """The adapters, each checked on its own.

    Raises:
        CheckpointError: one that can't be folded, or several that can't be added up.
    """
    adapters = [Adapter(folder, *open_adapter(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
    for adapter in adapters:
        check_adapter(adapter.state, adapter.config, adapter.folder, must_have_moved=False)
        _check_all_used(adapter)
        start = adapter.config.get("init_lora_weights")
        if start not in PLAIN_STARTS | REPEATABLE_STARTS:
            raise CheckpointError(
                f"{adapter.folder / CONFIG}: init_lora_weights: {start}: a part of the base's weights went into this "
                "adapter, and nothing here tells which",
                hint="save it with PEFT's path_initial_model_for_weight_conversion, or fold it into the base that was "
                "saved with it, with init_lora_weights: true",
            )
        for key, reason in (("use_dora", "norms don't add up"), ("init_lora_weights", "its start isn't in it")):
            is_single = len(adapters) == 1 and adapter.weight == 1
            if not is_single and (adapter.start if key == "init_lora_weights" else adapter.config.get(key)):
                raise CheckpointError(
                    f"{adapter.folder / CONFIG}: {key}: {adapter.config[key]}: can't be merged by weight, {reason}",
                    hint="merge it alone",
                )
    return adapters


def changes_of(adapters: list[Adapter], base: Checkpoint, tied: bool) -> dict[str, Change]:
    """Base weight's name -> its change.

    Raises:
        CheckpointError: an adapter changes what the base doesn't have.
    """
    changes: dict[str, Change] = {}
    for adapter in adapters:
        for name, change in _changes(adapter, base, tied):
            if name not in base:
                raise CheckpointError(
                    f"{adapter.folder}: adapts {name}, which {base.folder} doesn't have", hint=OTHER_BASE
                )
            all_of_it = changes.setdefault(name, Change())
            for kind in ("whole", "updates", "biases", "rows"):
                getattr(all_of_it, kind).extend(getattr(change, kind))
    if EMBEDDING in changes:
        # transformers 4 reads an untied T5's encoder.embed_tokens from shared; a copy in the file must follow
        copies = [*EMBEDDING_COPIES, HEAD] if tied else EMBEDDING_COPIES
        changes |= {copy: changes[EMBEDDING] for copy in copies if copy in base}
    return changes


def _changes(adapter: Adapter, base: Checkpoint, tied: bool) -> Iterator[tuple[str, Change]]:
    config, state, weight = adapter.config, adapter.state, adapter.weight
    updates = low_rank_updates(config, state)
    for name, update in updates.items():
        yield name, Change(updates=[(update, weight)])
    for name, places in token_rows(config, state, tied).items():
        yield name, Change(rows=[(Rows(places, rows_tensor(state, name)), weight)])
    for name, tensor in whole_modules(config, state).items():
        yield name, Change(whole=[(tensor, weight)])
    for name in state:
        if match := LORA_BIAS.fullmatch(name):
            module = match[1].removeprefix(PREFIX)
            if f"{module}.bias" in base:
                yield f"{module}.bias", Change(biases=[(state[name], weight * updates[f"{module}.weight"].scale)])
            elif state[name].to_float32().any():
                raise CheckpointError(
                    f"{adapter.folder}: {name}: the base's layer has no bias that could take it up",
                    hint="PEFT can't merge it either: keep the adapter, or train one without lora_bias",
                )


def _check_all_used(adapter: Adapter) -> None:
    """Refuse tensors that would be left out: LoRA of an embedding, rows that the config doesn't list."""
    config, state = adapter.config, adapter.state
    listed = bool(config.get("trainable_token_indices"))
    whole = whole_modules(config, state)
    for name in state:
        is_magnitude = bool(config.get("use_dora")) and name.endswith(MAGNITUDE)
        is_bias = bool(config.get("lora_bias")) and bool(LORA_BIAS.fullmatch(name))
        is_row = listed and name.endswith(ROWS)
        is_known = LORA_NAME.fullmatch(name) or is_magnitude or is_bias or is_row
        if not (is_known or name.removeprefix(PREFIX) in whole):
            raise CheckpointError(f"{adapter.folder}: {name}: merge can't fold this tensor")
