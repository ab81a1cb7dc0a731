"""The run identity: the configuration a run depends on. Resuming with a different one is refused.

    run_identity = build_run_identity(settings, examples, base_hash, teacher_hash, world_size)
    run_identity["lora_r"]      # 8
    check_run_identity(checkpoint, run_identity, ["learning_rate"], settings.gradient_accumulation_steps)

Each checkpoint stores it in t5tune_manifest.json, under the key `made_of`. `batch` is the number of examples per
optimizer step, however these are divided among ranks and micro-batches. With tokens_per_batch, which determines what a
micro-batch contains, it is `batch_tokens`, the number of tokens, however the micro-batches are divided among ranks.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.checkpoints.zero.optimizer import read_zero_optimizer
from t5tune.checkpoints.zero.shards import find_deepspeed_folder
from t5tune.data.caches.examples import Examples
from t5tune.errors import CheckpointError, SettingsError, suggest_name
from t5tune.formatting import format_count
from t5tune.io.atomic import hash_file
from t5tune.preparing.cache_reuse import make_resume_error
from t5tune.runs.checkpoints import read_run_identity
from t5tune.settings import TrainSettings, packaged_templates
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_list import PATHS_OF_DATASETS
from t5tune.settings.groups.lora import BASE_CHANGING_INITIALIZATIONS
from t5tune.settings.groups.training import SCHEDULES_BY_METRIC
from t5tune.settings.records_in_memory import find_records_name

ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
SHARDING_FIELDS = ("world_size", "deepspeed_stage")
ZERO_STAGES = {1, 2, 3}  # those that divide the optimizer's state among the ranks
PACKED_ATTENTION = "packed_attention"  # how a run on a GPU computes attention: no setting, but recorded for resuming
STEPS_PER_EPOCH = "steps_per_epoch"  # recorded, too: where an epoch begins
EVALUATION_FIELDS = ("held_out", "best_metric")  # what evaluations measure: a run may resume with another
CACHE_INPUTS = "cache_inputs"  # recorded, too: hashes of what the token caches were made from
LATE_FIELDS = (PACKED_ATTENTION, STEPS_PER_EPOCH, CACHE_INPUTS)  # added once the others have been compared
OF_EXAMPLES = ("eval_fraction", "num_data", "mixing", "mixing_temperature", "mixing_cap")  # depend on the data, too
FIXED_FIELDS = (
    "family", "train_mode", "lora_r", "lora_target_modules", "lora_bias", "use_dora", "init_lora_weights",
    "modules_to_save", "train_token_rows", "optim", "loraplus_lr_ratio", "deepspeed_optimizer", "deepspeed_scheduler",
)  # fmt: skip
"""What decides which tensors are trained, their shapes, and the states of optimizer and schedule: with another value, a
checkpoint can't be loaded or means something else, so --allow-change can't allow it."""
ARGUMENTS_OF_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
"""Those of training_args that the optimizer's state contains, so that a resumed run has the previous ones."""
FIXED_IF_SUBTRACTED = (
    "base",
    "bf16",
    "q_lora",
    "quant_type",
    "quantize_wo",
    "double_quant",
    "lora_alpha",
    "use_rslora",
)
"""What PiSSA and OLoRA compute their initial matrices from. A resumed run computes them again, and subtracts them from
the base's weights: with another value, it would subtract others than those the checkpoint was trained with."""
DEEPSPEED_SECTIONS = ("optimizer", "scheduler")
"""Sections of a DeepSpeed config that replace the optimizer and the schedule of the settings."""
PARAMETERS_FROM_SETTINGS = (
    "lr", "betas", "eps", "weight_decay", "warmup_max_lr", "warmup_num_steps", "total_num_steps",
)  # fmt: skip
"""Their parameters of which transformers refuses other values than those of the settings, which are compared."""
SPLIT_FIELDS = ("eval_fraction", "num_data", "split_seed")  # determine which examples of the data are trained on


def build_run_identity(
    settings: TrainSettings, examples: Examples, base_hash: str, teacher_hash: str | None, world_size: int
) -> dict[str, Any]:
    """Collect everything that determines a run's weights: field -> JSON value."""
    values = settings.model_dump(mode="json", include=set(select_settings(TrainSettings, Affects.STEPS)))
    inputs = {name: value for name, value in examples.manifest["inputs"].items() if name != "data"}
    # train or, before it, prepare may have held out examples: what matters is which ones are left to train on
    values["eval_fraction"] = values["eval_fraction"] or examples.manifest["eval_fraction"]
    values["num_data"] = values["num_data"] or inputs["num_data"]
    deepspeed = packaged_templates.read_deepspeed_config(settings.deepspeed) if settings.deepspeed else None
    adapter, reference = (
        path and find_adapter(path, settings.cache_dir) for path in (settings.adapter, settings.reference_adapter)
    )
    return {
        **inputs,
        **{name: values[name] for name in sorted(values)},
        **_describe_batch(settings, world_size),
        **_describe_mixing(examples),
        "data": hash_examples(examples),
        "base": f"sha256:{base_hash}",
        "teacher": teacher_hash,
        "adapter": adapter and hash_adapter(adapter),
        "reference_adapter": reference and hash_adapter(reference),
        "world_size": world_size,
        "deepspeed_stage": deepspeed and packaged_templates.get_zero_stage(deepspeed),
        **{f"deepspeed_{name}": _describe_section((deepspeed or {}).get(name)) for name in DEEPSPEED_SECTIONS},
    }


def _describe_section(section: dict[str, Any] | None) -> dict[str, Any] | None:
    """Describe a section of a DeepSpeed config, without the parameters that the settings decide."""
    if section is None:
        return None
    given = {name: value for name, value in (section.get("params") or {}).items() if value != "auto"}
    own = {name: value for name, value in given.items() if name not in PARAMETERS_FROM_SETTINGS}
    return {**section, "params": own}


def _describe_batch(settings: TrainSettings, world_size: int) -> dict[str, int]:
    tokens, num_batches = settings.tokens_per_batch, settings.gradient_accumulation_steps * world_size
    if tokens is None:
        return {"batch": settings.per_device_train_batch_size * num_batches}
    return {"tokens_per_batch": tokens, "batch_tokens": tokens * num_batches}


def describe_evaluations(held_out: Examples | None, best_metric: str | None) -> dict[str, Any]:
    """Describe what the evaluations of a run measure, as fields of its identity."""
    examples = None if held_out is None else hash_examples(held_out)
    return dict(zip(EVALUATION_FIELDS, (examples, best_metric), strict=True))


def has_other_evaluations(checkpoint: Path, now: dict[str, Any]) -> bool:
    """Whether the evaluations before a checkpoint can't be compared with those of a run with this identity."""
    then = read_run_identity(checkpoint)
    had_some = then.get("held_out") is not None
    return had_some and any(then[name] != now[name] for name in EVALUATION_FIELDS)


def has_other_held_out(checkpoint: Path, now: dict[str, Any]) -> bool:
    """Whether the evaluations before a checkpoint were on other examples than those of a run with this identity."""
    return read_run_identity(checkpoint).get("held_out") not in (None, now["held_out"])


def check_run_identity(checkpoint: Path, now: dict[str, Any], allowed: list[str], accumulation_steps: int) -> list[str]:
    """Compare the configuration with the one in a checkpoint. Return a line for each difference that is allowed.

    Args:
        accumulation_steps: the setting gradient_accumulation_steps, of which another value may keep the batch equal.

    Raises:
        SettingsError: fields differ that aren't allowed to, or can't be; names each one with both values.
        CheckpointError: this number of ranks or this ZeRO stage can't resume from the checkpoint's state.
    """
    then = read_run_identity(checkpoint)
    _check_shards(checkpoint, then, now)
    different = {
        name: f"{name}: {_abbreviate(then.get(name))} before, {_abbreviate(now.get(name))} now"
        for name in now | then
        if then.get(name) != now.get(name) and name not in (*SHARDING_FIELDS, *EVALUATION_FIELDS, *LATE_FIELDS)
    }
    if "data" in different and (split := [name for name in SPLIT_FIELDS if name in different]):
        different["data"] = f"data: other examples of it to train on, because of {' and '.join(split)}"
    _refuse(checkpoint, then, now, different, allowed, accumulation_steps)
    return list(different.values())


def check_settings_of_run(checkpoint: Path, settings: TrainSettings, allowed: list[str], world_size: int) -> None:
    """Compare the settings alone with the configuration in a checkpoint, before other data replaces a cache.

    Raises:
        SettingsError: fields differ; names each one with both values.
    """
    then = read_run_identity(checkpoint)
    check_allowed_names(allowed, then)
    values = settings.model_dump(mode="json", include=set(select_settings(TrainSettings, Affects.STEPS)))
    values |= {"world_size": world_size, **_describe_batch(settings, world_size)}
    different = {
        name: f"{name}: {_abbreviate(then[name])} before, {_abbreviate(value)} now"
        for name, value in values.items()
        if name in then and then[name] != value and name not in (*OF_EXAMPLES, *SHARDING_FIELDS)
    }
    _refuse(checkpoint, then, values, different, allowed, settings.gradient_accumulation_steps)


def _refuse(
    checkpoint: Path,
    then: dict[str, Any],
    now: dict[str, Any],
    different: dict[str, str],
    allowed: list[str],
    accumulation_steps: int,
) -> None:
    """Refuse the differences that aren't allowed: field -> description.

    Raises:
        SettingsError: there is one.
    """
    fixed = [name for name in different if name in _list_fixed_fields(then, now)]
    if refused := {name: line for name, line in different.items() if name not in allowed or name in fixed}:
        for name in ("batch", "batch_tokens"):
            if name in refused and then.get(name) and now.get(name):
                refused[name] += _suggest_equal_batch(then, now, accumulation_steps)
        raise make_resume_error(checkpoint, refused, fixed)


def check_allowed_names(allowed: list[str], run_identity: dict[str, Any]) -> None:
    """Check that --allow-change names only fields of the run identity.

    Raises:
        SettingsError: it names another one.
    """
    if unknown := sorted(set(allowed) - run_identity.keys()):
        raise SettingsError(f"allow_change: {unknown[0]}: no such field{suggest_name(unknown[0], run_identity)}")


def check_steps_per_epoch(checkpoint: Path, now: dict[str, Any]) -> None:
    """Check that epochs begin at the same steps, if nothing but the number of epochs or steps was changed.

    With tokens_per_batch, all epochs of a mixture have as many steps as the longest of them.

    Raises:
        SettingsError: they don't, so examples would be repeated or skipped.
    """
    then = read_run_identity(checkpoint)
    before, after = then.get(STEPS_PER_EPOCH), now[STEPS_PER_EPOCH]
    lengths = [name for name in ("num_train_epochs", "max_steps") if then[name] != now[name]]
    others = ("data", "mixing", "tokens_per_batch", "batch_tokens", "seed")
    if lengths and before not in (None, after) and all(then.get(name) == now.get(name) for name in others):
        problem = f"with this value an epoch has {after} steps, with the previous one {before}"
        raise SettingsError(
            f"{lengths[0]}: {problem}, so the run can't continue where it was stopped",
            hint=f"resume with {lengths[0]} {then[lengths[0]]}, or continue from its weights with --adapter "
            f"{checkpoint} and another output_dir",
        )


def _list_fixed_fields(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the fields of which --allow-change can't allow another value than in this run identity."""
    method = str(then.get("init_lora_weights"))
    fixed = [*FIXED_FIELDS]
    if method.startswith(BASE_CHANGING_INITIALIZATIONS):
        fixed += FIXED_IF_SUBTRACTED
    if method.startswith("pissa_niter"):  # its decomposition begins with random vectors
        fixed.append("seed")
    schedules = {run_identity.get("lr_scheduler_type") for run_identity in (then, now)}
    if len(schedules) == 2 and schedules & SCHEDULES_BY_METRIC:  # their states differ
        fixed.append("lr_scheduler_type")
    if then.get("learning_rate") == 0:  # a resumed run multiplies the rates in the state by new / previous
        fixed.append("learning_rate")
    if any(then["training_args"].get(name) != now["training_args"].get(name) for name in ARGUMENTS_OF_OPTIMIZER):
        fixed.append("training_args")
    return fixed


def needs_resharding(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a checkpoint has shards that DeepSpeed can't load on these ranks, but `load_resharded` can."""
    return {then["deepspeed_stage"], now["deepspeed_stage"]} <= ZERO_STAGES and any(
        then[name] != now[name] for name in SHARDING_FIELDS
    )


def describe_other_ranks(checkpoint: Path, now: dict[str, Any]) -> str | None:
    """Describe what another number of ranks or another ZeRO stage means for a resumed run; None if there is none."""
    then = read_run_identity(checkpoint)
    before, ranks = then["world_size"], now["world_size"]
    if all(then[name] == now[name] for name in SHARDING_FIELDS):
        return None
    if then["deepspeed_stage"] == now["deepspeed_stage"]:
        text = f"resuming on {format_count(ranks, 'process', 'processes')} from a checkpoint of {before}"
    else:
        text = f"resuming on {_describe_sharding(now)} from a checkpoint of {_describe_sharding(then)}"
    # one process and several save their random states under different names
    first_new = ranks if before == ranks else 0 if min(before, ranks) == 1 else before
    if first_new >= ranks:
        return text
    new = f"rank {first_new}" if first_new == ranks - 1 else f"ranks {first_new} to {ranks - 1}"
    return f"{text}; the random generators of {new} start from the seed and the step"


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
        if name in PATHS_OF_DATASETS:
            different += _describe_datasets(name, _resolve_datasets(old), _resolve_datasets(new))
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
    """Resolve one or more paths, so that two spellings of the same path are equal.

    Of records in memory, what counts is the hash in their file's name, which is kept next to a run that may be moved.
    """
    paths = [Path(path).resolve() for path in (value if isinstance(value, list) else [value]) if path is not None]
    return [find_records_name(path.name) or str(path) for path in paths]


def _describe_datasets(name: str, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """Describe what differs between two lists of datasets, a line for each value."""
    if len(old) != len(new):
        return [f"{name}: {format_count(len(old), 'dataset')} before, {len(new)} now"]
    return [
        f"{name}[{number}].{key}: {_abbreviate(then.get(key))} before, {_abbreviate(now.get(key))} now"
        for number, (then, now) in enumerate(zip(old, new, strict=True))
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]


def _resolve_datasets(datasets: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return [{**dataset, "path": _resolve_paths(dataset["path"])} for dataset in datasets or []]


def _check_shards(checkpoint: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    reason = ""
    if needs_resharding(then, now):
        try:
            read_zero_optimizer(find_deepspeed_folder(checkpoint) or checkpoint)
            return
        except CheckpointError as error:
            reason = f" ({error.message})"
    elif then["deepspeed_stage"] == now["deepspeed_stage"]:  # without ZeRO's shards, each rank loads all of the state
        return
    raise CheckpointError(
        f"{checkpoint}: its state is for {_describe_sharding(then)}; {_describe_sharding(now)} can't resume from it"
        f"{reason}",
        hint=f"t5tune export {checkpoint} --output-dir ADAPTER, then train with --adapter ADAPTER and a new "
        "output_dir: this keeps the weights and starts with a new optimizer",
    )


def _suggest_equal_batch(then: dict[str, Any], now: dict[str, Any], accumulation_steps: int) -> str:
    """Say with which number of micro-batches, or of examples in each, a step is as large as before."""
    ranks = now["world_size"]
    if "batch_tokens" in then:
        divisors = {"gradient_accumulation_steps": ranks * then["tokens_per_batch"]}
        total = then["batch_tokens"]
    else:
        divisors = {
            "gradient_accumulation_steps": now["batch"] // accumulation_steps,
            "per_device_train_batch_size": ranks * accumulation_steps,
        }
        total = then["batch"]
    fitting = [f"{name} {total // divisor}" for name, divisor in divisors.items() if total % divisor == 0]
    if not fitting and "batch_tokens" not in then and total % ranks == 0:
        fitting = [f"per_device_train_batch_size 1 with gradient_accumulation_steps {total // ranks}"]
    if not fitting:
        return f"; with {format_count(ranks, 'process', 'processes')} no setting makes it {total}"
    return f"; {' or '.join(fitting)} makes it {total}"


def _describe_sharding(run_identity: dict[str, Any]) -> str:
    ranks = format_count(run_identity["world_size"], "process", "processes")
    stage = run_identity["deepspeed_stage"]
    return f"{ranks} without DeepSpeed" if stage is None else f"{ranks} with ZeRO-{stage}"


def hash_examples(examples: Examples) -> str:
    """Hash what is equal for the same examples."""
    return _hash_mapping(examples.identify())


def hash_adapter(folder: Path) -> str:
    """Hash an adapter's files."""
    paths = (path for pattern in ADAPTER_FILES for path in sorted(folder.glob(pattern)))
    return _hash_mapping({path.name: hash_file(path) for path in paths})


def _describe_mixing(examples: Examples) -> dict[str, Any]:
    """Describe how many examples of each dataset an epoch has, in place of the settings that say it."""
    names = ("mixing", "mixing_temperature", "mixing_cap")
    if not examples.are_several:
        return dict.fromkeys(names)
    rates = {
        dataset.name: int(rate) if rate.denominator == 1 else float(rate)
        for dataset, rate in zip(examples.datasets, examples.rates, strict=True)
    }
    return dict.fromkeys(names) | {"mixing": rates}


def _hash_mapping(hashes: dict[str, Any]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()}"


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:19]}…{text[-1]}"
