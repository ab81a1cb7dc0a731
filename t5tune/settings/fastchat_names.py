"""Option names of FastChat and of older transformers releases, and today's names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from t5tune.settings.field_types import Settings


@dataclass(frozen=True)
class LegacyName:
    """A legacy name.

    Attributes:
        new: today's name; None if nothing needs to be set anymore.
        why: the reason, shown in a note.
        convert: turns the old value into the new value; None if no new value does the same.
        noted: the lowercase value that needs a note when it is ignored; None: any value but false and "not set".
    """

    new: str | None
    why: str
    convert: Callable[[Any], Any] = lambda value: value
    noted: str | None = None

    def is_noted(self, value: Any) -> bool:
        """Whether the user must know that this value is ignored."""
        text = str(value).lower()
        return text not in {"", "[]", "-1", "none", "false"} if self.noted is None else text == self.noted


def _convert_fsdp(value: Any) -> Any:
    """Convert FSDP's options, a text or a list, to the DeepSpeed config that shards the same, if one does."""
    options = re.findall(r"\w+", str(value).lower())
    shards = {"full_shard": "zero3", "true": "zero3", "shard_grad_op": "zero2"}
    config = next((shards[option] for option in options if option in shards), None)
    return f"{config}-offload" if config and "offload" in options else config


LEGACY_NAMES: Mapping[str, LegacyName] = {
    "evaluation_strategy": LegacyName("eval_strategy", "renamed by transformers"),
    "warmup_ratio": LegacyName("warmup_steps", "a value below 1 is a fraction of all steps"),
    "overwrite_output_dir": LegacyName("fresh", "an existing run is renamed, never overwritten"),
    "no_cuda": LegacyName("use_cpu", "renamed by transformers"),
    "load_in_4bit": LegacyName("q_lora", "NF4 with double quantization"),
    "per_gpu_train_batch_size": LegacyName("per_device_train_batch_size", "renamed by transformers"),
    "per_gpu_eval_batch_size": LegacyName("per_device_eval_batch_size", "renamed by transformers"),
    "max_seq_length": LegacyName("model_max_length", "the same thing"),
    "fsdp": LegacyName("deepspeed", "t5tune shards with DeepSpeed ZeRO", _convert_fsdp),
    "fsdp_transformer_layer_cls_to_wrap": LegacyName(None, "ZeRO-3 needs no list of layers"),
    "lazy_preprocess": LegacyName(None, "examples are always read from the cache on demand"),
    "lora_weight_path": LegacyName(None, "FastChat declared it and never read it"),
    "logging_dir": LegacyName(None, "logs are written to metrics.jsonl in the run folder"),
    "save_safetensors": LegacyName(None, "weights are always written as safetensors", noted="false"),
    "local_rank": LegacyName(None, "it is read from the launcher's environment variables"),
    "remove_unused_columns": LegacyName(None, "examples contain only the model's inputs"),
}


def select_legacy_names(model: type[Settings]) -> dict[str, LegacyName]:
    """Select the legacy names of a command's settings, and for train also the names without a new one."""
    return {
        name: change
        for name, change in LEGACY_NAMES.items()
        if (model.command == "train" if change.new is None else change.new in model.model_fields)
    }
