"""What a run is made of, sealed into each of its checkpoints, so that none is gone on with as something else.

    made_of = identity(settings, cache, base_hash, world_size)    # {"lora_r": 8, "data": "sha256:…", "batch": 16, …}
    check_same(checkpoint, made_of, allowed=["learning_rate"])

`batch` is the number of examples of an optimizer step, `batch_tokens` (with tokens_per_batch) that of its tokens,
however they are divided among ranks and micro-steps.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from t5tune.data.cache import Cache
from t5tune.errors import CheckpointError, SettingsError, suggestion
from t5tune.io.atomic import sha256
from t5tune.settings import QuantisationSettings, TrainSettings, packaged_templates
from t5tune.settings.lora import LoraSettings
from t5tune.settings.training import TrainingSettings
from t5tune.training.checkpoint import made_of

# how the work is divided or done, which gives the same weights
NO_PART_OF_IT = {
    "per_device_train_batch_size", "tokens_per_batch", "gradient_accumulation_steps", "gradient_checkpointing",
    "dataloader_num_workers", "use_cpu", "fp16",
}  # fmt: skip
# what can be otherwise when the command of a finished run is given again, and asks for the same weights
BESIDE_IT = NO_PART_OF_IT | {
    "cache_dir", "max_record_bytes", "max_rejected_fraction", "num_workers", "preprocessed_path", "eval_strategy",
    "eval_steps", "eval_generate", "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit",
    "logging_steps", "report_to", "report_samples", "num_gpus", "num_processes", "deepspeed", "process_group_timeout",
    "max_restarts", "output_dir", "fresh", "allow_change", "dry_run",
}  # fmt: skip
PATHS = {"model_name_or_path", "data_path", "eval_data_path", "adapter"}
ADAPTER = ("adapter_config.json", "adapter_model.*")
ROWS = ("tokens.bin", "conversations.bin", "examples.bin")
SHARDING = ("world_size", "deepspeed_stage")


def identity(settings: TrainSettings, cache: Cache, base_hash: str, world_size: int) -> dict[str, Any]:
    """What decides a run's weights: field -> a value of JSON."""
    chosen = [
        name
        for mixin in (LoraSettings, QuantisationSettings, TrainingSettings)
        for name in mixin.model_fields
        if name not in NO_PART_OF_IT
    ]
    values = settings.model_dump(mode="json", include={*chosen, "seed", "eval_fraction", "num_data", "family"})
    inputs = {name: value for name, value in cache.manifest["inputs"].items() if name != "data"}
    # held out by train or by prepare before it: what counts is which examples are left to learn from
    values["eval_fraction"] = values["eval_fraction"] or cache.manifest["eval_fraction"]
    values["num_data"] = values["num_data"] or inputs["num_data"]
    deepspeed = packaged_templates.read_deepspeed(settings.deepspeed) if settings.deepspeed else None
    micro_batch = settings.tokens_per_batch or settings.per_device_train_batch_size
    return {
        **inputs,
        **{name: values[name] for name in sorted(values)},
        "batch_tokens" if settings.tokens_per_batch else "batch": (
            micro_batch * settings.gradient_accumulation_steps * world_size
        ),
        "data": _hash({**{name: cache.manifest["files"][name] for name in ROWS}, "examples": cache.hash_of_numbers()}),
        "base": f"sha256:{base_hash}",
        "adapter": settings.adapter and _hash_of(settings.adapter, ADAPTER),
        "world_size": world_size,
        "deepspeed_stage": deepspeed and int(deepspeed.get("zero_optimization", {}).get("stage", 0)),
    }


def check_same(checkpoint: Path, now: dict[str, Any], allowed: list[str]) -> list[str]:
    """Compare with what a checkpoint was sealed with. Returns what differs and is allowed to, a line each.

    Raises:
        SettingsError: naming each field that differs, with both values.
        CheckpointError: the checkpoint's shards are of another number of ranks or another ZeRO stage.
    """
    if unknown := sorted(set(allowed) - now.keys()):
        raise SettingsError(f"allow_change: {unknown[0]}: no such field{suggestion(unknown[0], now)}")
    then = made_of(checkpoint)
    different = {
        name: f"{name}: {_shown(then.get(name))} in {checkpoint}, {_shown(now.get(name))} now"
        for name in [*now, *(then.keys() - now.keys())]
        if then.get(name) != now.get(name)
    }
    _check_shards(checkpoint, then, now)
    for name in SHARDING:
        different.pop(name, None)
    refused = [line for name, line in different.items() if name not in allowed]
    if refused:
        names = " ".join(name for name in different if name not in allowed)
        raise SettingsError(
            *refused,
            hint=f"give what the run began with, go on all the same with --allow-change {names}, or begin anew with "
            "--fresh",
        )
    return list(different.values())


def check_finished(folder: Path, then: TrainSettings, now: TrainSettings) -> None:
    """Compare what a finished run was asked for with what is asked now.

    Raises:
        SettingsError: naming each setting that would have given other weights, with both values.
    """
    before, after = then.model_dump(mode="json"), now.model_dump(mode="json")
    different = [
        f"{name}: {shown(before[name])} in {folder}, which is finished, {shown(after[name])} now"
        for name in before
        for shown in [_all_of if name in PATHS else _shown]
        if name not in BESIDE_IT and before[name] != after[name]
        if name not in PATHS or _resolved(before[name]) != _resolved(after[name])
    ]
    if different:
        raise SettingsError(
            *different,
            hint=f"--fresh trains anew and keeps the old run beside; --adapter {folder} in another output_dir goes on "
            "from its weights",
        )


def _all_of(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _resolved(value: Any) -> Any:
    """Paths that lead to one place are one."""
    return [str(Path(path).resolve()) for path in (value if isinstance(value, list) else [value]) if path is not None]


def _check_shards(checkpoint: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    stages = then["deepspeed_stage"], now["deepspeed_stage"]
    if stages[0] == stages[1] and (stages[0] is None or then["world_size"] == now["world_size"]):
        return
    raise CheckpointError(
        f"{checkpoint}: holds the state of {_sharding(then)}; {_sharding(now)} can't go on from it",
        hint=f"t5tune export {checkpoint} --output-dir ADAPTER, and train with --adapter ADAPTER in a new output_dir: "
        "the weights go on, the optimizer begins anew",
    )


def _sharding(made: dict[str, Any]) -> str:
    ranks = "1 process" if made["world_size"] == 1 else f"{made['world_size']} processes"
    stage = made["deepspeed_stage"]
    return f"{ranks} without DeepSpeed" if stage is None else f"{ranks} of ZeRO-{stage}"


def _hash_of(folder: Path, patterns: tuple[str, ...]) -> str:
    return _hash({path.name: sha256(path) for pattern in patterns for path in sorted(folder.glob(pattern))})


def _hash(hashes: dict[str, str]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:19]}…{text[-1]}"
