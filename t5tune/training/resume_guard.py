"""The run identity: the configuration a run depends on. Resuming with a different one is refused.

    run_identity = build_run_identity(settings, cache, base_hash, world_size)   # {"lora_r": 8, "data": "sha256:…", …}
    check_run_identity(checkpoint, run_identity, allowed=["learning_rate"])

Each checkpoint stores it in t5tune_manifest.json, under the key `made_of`. `batch` is the number of examples per
optimizer step, `batch_tokens` (with tokens_per_batch) the number of its tokens, however these are divided among ranks
and micro-batches.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from t5tune.data.cache import Cache
from t5tune.data.cache_reuse import make_resume_error
from t5tune.errors import CheckpointError, SettingsError, suggest_name
from t5tune.formatting import format_count
from t5tune.io.atomic import hash_file
from t5tune.settings import TrainSettings, packaged_templates
from t5tune.settings.affects import Affects, select_settings
from t5tune.training.checkpoint import read_run_identity

ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
CACHE_FILES = ("tokens.bin", "conversations.bin", "examples.bin")
SHARDING_FIELDS = ("world_size", "deepspeed_stage")
PACKED_ATTENTION = "packed_attention"  # how a run on a GPU computes attention: no setting, but recorded for resuming
SPLIT_FIELDS = ("eval_fraction", "num_data", "seed")  # determine which examples of the data are trained on


def build_run_identity(settings: TrainSettings, cache: Cache, base_hash: str, world_size: int) -> dict[str, Any]:
    """Collect everything that determines a run's weights: field -> JSON value."""
    values = settings.model_dump(mode="json", include=set(select_settings(TrainSettings, Affects.STEPS)))
    inputs = {name: value for name, value in cache.manifest["inputs"].items() if name != "data"}
    # train or, before it, prepare may have held out examples: what matters is which ones are left to train on
    values["eval_fraction"] = values["eval_fraction"] or cache.manifest["eval_fraction"]
    values["num_data"] = values["num_data"] or inputs["num_data"]
    deepspeed = packaged_templates.read_deepspeed_config(settings.deepspeed) if settings.deepspeed else None
    micro_batch = settings.tokens_per_batch or settings.per_device_train_batch_size
    return {
        **inputs,
        **{name: values[name] for name in sorted(values)},
        "batch_tokens" if settings.tokens_per_batch else "batch": (
            micro_batch * settings.gradient_accumulation_steps * world_size
        ),
        "data": _hash_mapping(
            {**{name: cache.manifest["files"][name] for name in CACHE_FILES}, "examples": cache.hash_indices()}
        ),
        "base": f"sha256:{base_hash}",
        "adapter": settings.adapter and _hash_files(settings.adapter, ADAPTER_FILES),
        "world_size": world_size,
        "deepspeed_stage": deepspeed and packaged_templates.get_zero_stage(deepspeed),
    }


def check_run_identity(checkpoint: Path, now: dict[str, Any], allowed: list[str]) -> list[str]:
    """Compare the configuration with the one in a checkpoint. Return a line for each difference that is allowed.

    Raises:
        SettingsError: fields differ; names each one with both values.
        CheckpointError: the checkpoint's shards are for another number of ranks or another ZeRO stage.
    """
    if unknown := sorted(set(allowed) - now.keys()):
        raise SettingsError(f"allow_change: {unknown[0]}: no such field{suggest_name(unknown[0], now)}")
    then = read_run_identity(checkpoint)
    _check_shards(checkpoint, then, now)
    different = {
        name: f"{name}: {_abbreviate(then.get(name))} before, {_abbreviate(now.get(name))} now"
        for name in now | then
        if then.get(name) != now.get(name) and name not in (*SHARDING_FIELDS, PACKED_ATTENTION)
    }
    if "data" in different and (split := [name for name in SPLIT_FIELDS if name in different]):
        different["data"] = f"data: other examples of it to train on, because of {' and '.join(split)}"
    if refused := {name: line for name, line in different.items() if name not in allowed}:
        raise make_resume_error(checkpoint, refused)
    return list(different.values())


def check_finished_run(folder: Path, then: TrainSettings, now: TrainSettings) -> None:
    """Compare the settings of a finished run with the current ones.

    Raises:
        SettingsError: settings that affect the weights differ; names each one with both values.
    """
    before, after = then.model_dump(mode="json"), now.model_dump(mode="json")
    paths = select_settings(TrainSettings, Affects.INPUT_FILES)
    different = []
    for name in select_settings(TrainSettings, Affects.FINAL_WEIGHTS):
        old, new = before[name], after[name]
        if old == new or (name in paths and _resolve_paths(old) == _resolve_paths(new)):
            continue
        format_value = _format_in_full if name in paths else _abbreviate
        different.append(f"{name}: {format_value(old)} before, {format_value(new)} now")
    if different:
        raise SettingsError(
            *different,
            heading=f"{folder}: this run has already finished, with other settings:",
            choices=[
                "to start over, add --fresh; the old run is kept under another name",
                f"to continue from its weights, use --adapter {folder} and another output_dir",
            ],
        )


def _format_in_full(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _resolve_paths(value: Any) -> list[str]:
    """Resolve one or more paths, so that two spellings of the same path are equal."""
    return [str(Path(path).resolve()) for path in (value if isinstance(value, list) else [value]) if path is not None]


def _check_shards(checkpoint: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    stages = then["deepspeed_stage"], now["deepspeed_stage"]
    if stages[0] == stages[1] and (stages[0] is None or then["world_size"] == now["world_size"]):
        return
    raise CheckpointError(
        f"{checkpoint}: its state is for {_describe_sharding(then)}; {_describe_sharding(now)} can't resume from it",
        hint=f"t5tune export {checkpoint} --output-dir ADAPTER, then train with --adapter ADAPTER and a new "
        "output_dir: this keeps the weights and starts with a new optimizer",
    )


def _describe_sharding(run_identity: dict[str, Any]) -> str:
    ranks = format_count(run_identity["world_size"], "process", "processes")
    stage = run_identity["deepspeed_stage"]
    return f"{ranks} without DeepSpeed" if stage is None else f"{ranks} with ZeRO-{stage}"


def _hash_files(folder: Path, patterns: tuple[str, ...]) -> str:
    return _hash_mapping({path.name: hash_file(path) for pattern in patterns for path in sorted(folder.glob(pattern))})


def _hash_mapping(hashes: dict[str, str]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()}"


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:19]}…{text[-1]}"
