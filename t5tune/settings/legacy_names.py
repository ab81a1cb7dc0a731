"""Names that a user may bring from FastChat or from older releases of transformers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """An old name: what it is called now (None: nothing is left to set), and why."""

    new: str | None
    why: str
    convert: Callable[[Any], Any] = lambda value: value


def _full_shard(value: Any) -> Any:
    return "zero3" if "full_shard" in str(value) else None


TRAIN: Mapping[str, Renamed] = {
    "evaluation_strategy": Renamed("eval_strategy", "renamed by transformers"),
    "warmup_ratio": Renamed("warmup_steps", "below 1 it is a share of all steps"),
    "overwrite_output_dir": Renamed("fresh", "a run is moved aside, never overwritten"),
    "no_cuda": Renamed("use_cpu", "renamed by transformers"),
    "load_in_4bit": Renamed("q_lora", "NF4 with double quantisation"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size", "renamed by transformers"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size", "renamed by transformers"),
    "max_seq_length": Renamed("model_max_length", "the same thing"),
    "fsdp": Renamed("deepspeed", "parameters are sharded by ZeRO-3 here", _full_shard),
    "fsdp_transformer_layer_cls_to_wrap": Renamed(None, "ZeRO-3 needs no list of layers"),
    "lazy_preprocess": Renamed(None, "examples are always read from the cache as they are needed"),
    "lora_weight_path": Renamed(None, "FastChat declared it and never read it"),
    "logging_dir": Renamed(None, "metrics.jsonl in the run folder holds the logs"),
    "save_safetensors": Renamed(None, "weights are always written as safetensors"),
    "local_rank": Renamed(None, "the launcher's environment says it"),
    "remove_unused_columns": Renamed(None, "examples hold only what the model reads"),
}

RENAMED: Mapping[str, Mapping[str, Renamed]] = {"train": TRAIN}
