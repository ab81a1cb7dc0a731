"""Read adapters without adapter_config.json, as FastChat's train_lora_t5.py and similar scripts write them.

The LoRA tensors are in adapter_model.bin, adapter_model.safetensors or pytorch_model.bin, under their names in the
training model: `base_model.model.encoder.….q.lora_A.default.weight`, sometimes with the prefix `module.` that
DistributedDataParallel adds.
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

from t5tune.checkpoints.adapter import LORA_MATRIX_PATTERN, PEFT_PREFIX, TOKEN_ROWS_SUFFIX
from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.errors import CheckpointError, SettingsError
from t5tune.families import FASTCHAT_TOKENS
from t5tune.families.t5 import T5
from t5tune.file_names import ADAPTER_CONFIG_FILE, ADDED_TOKENS_FILE
from t5tune.io.untrusted import read_json_object

DEFAULT_LORA_ALPHA = 16.0  # FastChat's; its files don't contain the value
DEFAULT_ALPHA_NOTE = (
    f"lora_alpha {DEFAULT_LORA_ALPHA:g} is FastChat's default; no file contains the value used in training: "
    "give --lora-alpha if it was different"
)
ROWS_AT_ONCE = 2048
SUM_LEVELS = 4

_WRAPPER_PATTERN = re.compile(r"(?:module\.|_orig_mod\.|_forward_module\.)*((?:base_model\.model\.)*)")
_ADAPTER_NAME_PATTERN = re.compile(r"\.(lora_\w+|modules_to_save|token_adapter\.trainable_tokens_delta)(\.|$)")


@dataclass(frozen=True)
class LoraFlags:
    """An adapter's settings on the command line; None: not given."""

    r: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    base: str | None = None

    def check_against(self, config: Mapping[str, Any], source: Path) -> None:
        """Refuse flags that contradict an adapter's config."""
        targets = config.get("target_modules")
        given = {
            "lora_r": (self.r, config.get("r")),
            "lora_alpha": (self.alpha, config.get("lora_alpha")),
            "lora_target_modules": (
                self.target_modules and " ".join(sorted(self.target_modules)),
                " ".join(sorted(targets)) if isinstance(targets, list) else targets,
            ),
        }
        for name, (flag, value) in given.items():
            if flag is not None and flag != value:
                raise SettingsError(f"{name}: {flag}, but {source} has {value}", hint="leave the flag out")


def strip_wrappers(name: str) -> str:
    """Strip the prefixes of data parallelism and torch.compile from a tensor's name, and keep or add PEFT's, once.

    `module.base_model.model.x.lora_A.weight` and `x.lora_A.weight` become `base_model.model.x.lora_A.weight`.
    """
    match = _WRAPPER_PATTERN.match(name)
    rest = name[match.end() :] if match else name
    return PEFT_PREFIX + rest if (match and match[1]) or is_adapter_name(rest) else rest


def is_adapter_name(name: str) -> bool:
    """Whether a tensor of a PEFT model belongs to the adapter, not to the base."""
    return _ADAPTER_NAME_PATTERN.search(name) is not None


def infer_adapter_config(
    state: Mapping[str, Tensor], flags: LoraFlags, source: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Infer (adapter_config.json, notes for the user) from the tensors' shapes and the flags."""
    ranks = _read_ranks(state, source)
    r = Counter(ranks.values()).most_common(1)[0][0]
    targets = sorted({name.rpartition(".")[2] for name in ranks})
    config = {
        "base_model_name_or_path": flags.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": flags.alpha if flags.alpha is not None else DEFAULT_LORA_ALPHA,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {re.escape(name): rank for name, rank in sorted(ranks.items()) if rank != r},
        "target_modules": targets,
        "task_type": "SEQ_2_SEQ_LM",
    }
    flags.check_against(config, source)
    inferred = f"no {ADAPTER_CONFIG_FILE}: rank {r} and the modules {' '.join(targets)} are inferred from the tensors"
    return config, (inferred,) if flags.alpha is not None else (inferred, DEFAULT_ALPHA_NOTE)


def _read_ranks(state: Mapping[str, Tensor], source: Path) -> dict[str, int]:
    ranks: dict[str, int] = {}
    for name, tensor in state.items():
        match = LORA_MATRIX_PATTERN.fullmatch(name)
        if match is None:
            problem = f"{source}: no {ADAPTER_CONFIG_FILE} in this folder, and {name} can't be interpreted without it"
            raise CheckpointError(problem, hint="give the run folder or the checkpoint that contains it")
        if len(tensor.shape) != 2 or not tensor.array.size:
            problem = f"{source}: {name}: shape {list(tensor.shape)}, expected a matrix"
            hint = "it was saved under ZeRO-3 without gathering; export a checkpoint-N: its shards have the weights"
            raise CheckpointError(problem, hint)
        if match[2] == "A":
            ranks[match[1].removeprefix(PEFT_PREFIX)] = tensor.shape[0]
    if not ranks:
        raise CheckpointError(f"{source}: contains no LoRA matrices")
    return ranks


def read_added_ids(folder: Path) -> list[int]:
    """Read the ids of FastChat's ten added tokens ([PAD], `<`, `{`, newline, …); empty if the tokenizer lacks them."""
    try:
        added = read_json_object(folder, ADDED_TOKENS_FILE)
        ids = sorted(added[text] for text in FASTCHAT_TOKENS)
    except (CheckpointError, OSError, KeyError, TypeError):
        return []
    fits = all(type(row) is int for row in ids) and ids == list(range(ids[0], ids[0] + len(ids))) and ids[0] > 0
    return ids if fits else []


def compute_mean_rows(base: Checkpoint, ids: list[int]) -> dict[str, Tensor]:
    """Compute the embedding and head rows of FastChat's tokens, which it initializes but doesn't save.

    Each is the mean of the rows before FastChat's tokens. The keys are PEFT's names, as `t5tune train` saves
    trained rows: the shared embedding of a tied base; else the embeddings of encoder and decoder, and the head.
    """
    tied = base.is_tied()
    rows: dict[str, Tensor] = {}
    head = base.architecture.head_weight
    for weight in (T5.tied_to,) if tied else (T5.tied_to, head):
        num_rows = base.get_tensor(weight).shape[0]
        if num_rows <= ids[-1]:
            problem = f"{base.folder}: {weight} has no row {ids[-1]}"
            raise CheckpointError(problem, hint="give the base that FastChat was trained on")
        rows_KD = np.repeat(_compute_mean_row(base, weight, ids[0])[None], len(ids), 0)
        embeddings = [T5.embedding] if tied else list(T5.token_row_modules)
        modules = [T5.head] if weight == head else embeddings
        rows |= {f"{PEFT_PREFIX}{module}{TOKEN_ROWS_SUFFIX}": Tensor("F32", rows_KD) for module in modules}
    return rows


def _compute_mean_row(base: Checkpoint, weight: str, count: int) -> npt.NDArray[np.float32]:
    """Compute the mean of a matrix's first rows, summed in torch's order (ATen's SumKernel.cpp, multi_row_sum).

    Rows are summed in blocks of 16, these sums again in blocks of 16, and so on for four levels. The result is
    bit-identical to torch's mean if the width is a multiple of 32.
    """
    power = max(4, math.ceil(math.log2(count)) // SUM_LEVELS)
    sums_LD = np.zeros((SUM_LEVELS, base.get_tensor(weight).shape[1]), np.float32)
    for begin in range(0, count, ROWS_AT_ONCE):
        part = base.get_tensor(weight).read_rows(begin, min(begin + ROWS_AT_ONCE, count)).to_float32()
        for number, row_D in enumerate(part, begin + 1):
            sums_LD[0] += row_D
            level = 0
            while level + 1 < SUM_LEVELS and number % (1 << (level + 1) * power) == 0:
                level += 1
                sums_LD[level] += sums_LD[level - 1]
                sums_LD[level - 1] = 0
    for level in range(1, SUM_LEVELS):
        sums_LD[0] += sums_LD[level]
    mean_D: npt.NDArray[np.float32] = sums_LD[0] / np.float32(count)
    return mean_D
