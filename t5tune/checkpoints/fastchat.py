"""Adapters that FastChat's train_lora_t5.py and scripts like it left: LoRA tensors without an adapter_config.json.

They lie in adapter_model.bin, adapter_model.safetensors or pytorch_model.bin, by the names of the training model:
`base_model.model.encoder.….q.lora_A.default.weight`, some behind a `module.` of the process group's wrapper.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.adapter import LORA_NAME, PREFIX, ROWS
from t5tune.checkpoints.adapter_config import CONFIG
from t5tune.checkpoints.safetensors import Checkpoint
from t5tune.checkpoints.tensors import Tensor
from t5tune.errors import CheckpointError, SettingsError
from t5tune.io.untrusted import read_object

ALPHA = 16.0
"""FastChat's own default of lora_alpha, which its files don't hold."""

TOKENS = ("[PAD]", "<", "{", "\n", "}", "`", " ", "\\", "^", "\t")
EMBEDDINGS = ("encoder.embed_tokens", "decoder.embed_tokens")
ROWS_AT_ONCE = 2048
LEVELS = 4

_WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.|_forward_module\.)*((?:base_model\.model\.)*)")
_OF_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|token_adapter\.trainable_tokens_delta)(\.|$)")


@dataclass(frozen=True)
class OldLora:
    """What the user says of an adapter; None: to be found."""

    r: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    base: str | None = None

    def check_against(self, config: Mapping[str, Any], place: Path) -> None:
        """Refuse flags that an adapter_config.json contradicts.

        Raises:
            SettingsError: by the flag's name.
        """
        targets = config.get("target_modules")
        said = {
            "lora_r": (self.r, config.get("r")),
            "lora_alpha": (self.alpha, config.get("lora_alpha")),
            "lora_target_modules": (
                sorted(self.target_modules) if self.target_modules else None,
                sorted(targets) if isinstance(targets, list) else targets,
            ),
        }
        for name, (flag, value) in said.items():
            if flag is not None and flag != value:
                raise SettingsError(f"{name}: {flag}, but {place} says {value}", hint="leave the flag out")


def plain_name(name: str) -> str:
    """A tensor's name without the wrappers of data parallelism and compilation, under PEFT's prefix once.

    module.base_model.model.x.lora_A.weight -> base_model.model.x.lora_A.weight; so also x.lora_A.weight.
    """
    match = _WRAPPERS.match(name)
    rest = name[match.end() :] if match else name
    return PREFIX + rest if (match and match[1]) or is_adapter_name(rest) else rest


def is_adapter_name(name: str) -> bool:
    """Whether a tensor of a PEFT model is of the adapter, not of the base."""
    return _OF_ADAPTER.search(name) is not None


def found_config(state: Mapping[str, Tensor], old: OldLora, place: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the adapter_config.json that the tensors' shapes and the user's flags make, what to tell the user).

    Raises:
        CheckpointError: a tensor that only a config could place.
        SettingsError: a flag that the tensors contradict.
    """
    ranks: dict[str, int] = {}
    for name, tensor in state.items():
        match = LORA_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{place}: no {CONFIG} in it, and {name} can't be placed without",
                hint="name the run folder or the checkpoint that holds it",
            )
        if len(tensor.shape) != 2 or not tensor.array.size:
            raise CheckpointError(
                f"{place}: {name}: {list(tensor.shape)}, no matrix",
                hint="saved under ZeRO-3 without gathering; the shards of its checkpoint-N hold the weights",
            )
        if match[2] == "A":
            ranks[match[1].removeprefix(PREFIX)] = tensor.shape[0]
    if not ranks:
        raise CheckpointError(f"{place}: holds no LoRA matrix")
    r = Counter(ranks.values()).most_common(1)[0][0]
    if old.r is not None and set(ranks.values()) != {old.r}:
        raise SettingsError(f"lora_r: {old.r}, but the matrices in {place} have rank {r}", hint="leave the flag out")
    targets = sorted({name.rpartition(".")[2] for name in ranks})
    if old.target_modules is not None and sorted(old.target_modules) != targets:
        raise SettingsError(
            f"lora_target_modules: {' '.join(old.target_modules)}, but {place} adapts {' '.join(targets)}",
            hint="leave the flag out",
        )
    alpha = old.alpha if old.alpha is not None else ALPHA
    config = {
        "base_model_name_or_path": old.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {re.escape(name): rank for name, rank in sorted(ranks.items()) if rank != r},
        "target_modules": targets,
        "task_type": "SEQ_2_SEQ_LM",
    }
    notes = [f"no {CONFIG}: rank {r} and the modules {' '.join(targets)} are those of the matrices"]
    if old.alpha is None:
        notes.append(
            f"lora_alpha {ALPHA:g} is FastChat's default; no file says what it was trained with: give --lora-alpha "
            "if it was another"
        )
    return config, tuple(notes)


def added_ids(folder: Path) -> list[int]:
    """The ids of the ten tokens that FastChat added ([PAD], `<`, `{`, newline, …), or nothing.

    Its tokenizer was saved by transformers 4, which writes added_tokens.json.
    """
    try:
        added = read_object(folder, "added_tokens.json")
        ids = sorted(added[text] for text in TOKENS)
    except (CheckpointError, OSError, KeyError, TypeError):
        return []
    fits = all(type(row) is int for row in ids) and ids == list(range(ids[0], ids[0] + len(ids))) and ids[0] > 0
    return ids if fits else []


def mean_rows(base: Checkpoint, ids: list[int]) -> dict[str, Tensor]:
    """What FastChat's tokens read and write: each is the mean of the rows before them, which it didn't save.

    By PEFT's names, as `t5tune train` saves trained rows: of the shared embedding of a tied base, else of the
    embedding of the encoder and the decoder and of the head.
    """
    tied = base.is_tied()
    rows: dict[str, Tensor] = {}
    for weight in ("shared.weight",) if tied else ("shared.weight", "lm_head.weight"):
        num_rows = base.tensor(weight).shape[0]
        if num_rows <= ids[-1]:
            raise CheckpointError(f"{base.folder}: {weight} has no row {ids[-1]}", hint="name FastChat's base itself")
        rows_KD = np.repeat(_mean(base, weight, ids[0])[None], len(ids), 0)
        modules = ["lm_head"] if weight == "lm_head.weight" else ["shared"] if tied else list(EMBEDDINGS)
        rows |= {f"{PREFIX}{module}{ROWS}": Tensor("F32", rows_KD) for module in modules}
    return rows


def row_indices(ids: list[int], tied: bool) -> Any:
    """PEFT's trainable_token_indices for these rows; the head's in the opposite order (see model/lora.py)."""
    return ids if tied else {name: ids for name in EMBEDDINGS} | {"lm_head": ids[::-1]}


def _mean(base: Checkpoint, weight: str, count: int) -> npt.NDArray[np.float32]:
    """The mean of a matrix's first rows, added in torch's order (ATen's SumKernel.cpp, multi_row_sum).

    Sums of 16 rows are added up, 16 of these, and so on, four levels high: the bits of torch's mean, for widths of a
    multiple of 32.
    """
    power = max(4, math.ceil(math.log2(count)) // LEVELS)
    sums_LD = np.zeros((LEVELS, base.tensor(weight).shape[1]), np.float32)
    for begin in range(0, count, ROWS_AT_ONCE):
        part = base.tensor(weight).rows(begin, min(begin + ROWS_AT_ONCE, count)).to_float32()
        for number, row_D in enumerate(part, begin + 1):
            sums_LD[0] += row_D
            level = 0
            while level + 1 < LEVELS and number % (1 << (level + 1) * power) == 0:
                level += 1
                sums_LD[level] += sums_LD[level - 1]
                sums_LD[level - 1] = 0
    for level in range(1, LEVELS):
        sums_LD[0] += sums_LD[level]
    mean_D: npt.NDArray[np.float32] = sums_LD[0] / np.float32(count)
    return mean_D
