"""The run identity: the configuration a run depends on. A run resumes only with the same configuration.

    run_identity = build_run_identity(run_plan, examples, base_hash, teacher_hash, world_size)
    run_identity["lora_r"]      # 8
    check_run_identity(checkpoint, run_identity, run_plan)

Each checkpoint stores it in t5tune_manifest.json, under the key `made_of`. `batch` is the number of examples per
optimizer step, however these are divided among ranks and micro-batches. With tokens_per_batch, it is
`batch_tokens`, the number of tokens, however the micro-batches are divided among ranks.
"""

from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.checkpoints.zero.optimizer import read_zero_optimizer
from t5tune.checkpoints.zero.shards import find_deepspeed_folder
from t5tune.data.caches.examples import Examples
from t5tune.errors import CheckpointError, SettingsError
from t5tune.formatting import abbreviate_value, describe_change, format_count
from t5tune.io.atomic import hash_file, hash_json
from t5tune.preparing.cache_reuse import format_weights_flag, make_resume_error
from t5tune.runs.checkpoints import read_run_identity
from t5tune.runs.plan import RunPlan
from t5tune.settings import packaged_templates
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_list import PATHS_OF_DATASETS
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.run_output import CHANGEABLE
from t5tune.settings.records_in_memory import is_records_name

ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
SHARDING_FIELDS = ("world_size", "deepspeed_stage")
ZERO_STAGES = {1, 2, 3}  # those that divide the optimizer's state among the ranks
PACKED_ATTENTION = "packed_attention"  # how a run on a GPU computes attention: no setting, but recorded for resuming
STEPS_PER_EPOCH = "steps_per_epoch"  # recorded, too: where an epoch begins
EVALUATION_FIELDS = ("held_out", "best_metric")  # these fields may change when a run resumes
NOT_COMPARED = {*SHARDING_FIELDS, *EVALUATION_FIELDS, PACKED_ATTENTION, STEPS_PER_EPOCH}
SPLIT_FIELDS = ("eval_fraction", "num_data", "split_seed")  # determine which examples of the data are trained on


def build_run_identity(
    plan: RunPlan, examples: Examples, base_hash: str, teacher_hash: str | None, world_size: int
) -> dict[str, Any]:
    """Collect everything that determines a run's weights: field -> JSON value."""
    values = plan.list_affecting(Affects.STEPS)
    inputs = {name: value for name, value in examples.manifest["inputs"].items() if name != "data"}
    # train or, before it, prepare may have held out examples: only the remaining training examples matter
    values["eval_fraction"] = values["eval_fraction"] or examples.manifest["eval_fraction"]
    values["num_data"] = values["num_data"] or inputs["num_data"]
    deepspeed, cache_dir = plan.processes.deepspeed, plan.model.base.cache_dir
    adapter, reference = (
        path and find_adapter(path, cache_dir) for path in (plan.model.initial_adapter, plan.reference_adapter)
    )
    return {
        **inputs,
        **{name: values[name] for name in sorted(values)},
        **_describe_batch(plan, world_size),
        **_describe_mixing(examples),
        "data": hash_examples(examples),
        "base": f"sha256:{base_hash}",
        "teacher": teacher_hash,
        "adapter": adapter and hash_adapter(adapter),
        "reference_adapter": reference and hash_adapter(reference),
        "world_size": world_size,
        "deepspeed_stage": deepspeed
        and packaged_templates.get_zero_stage(packaged_templates.read_deepspeed_config(deepspeed)),
    }


def _describe_batch(plan: RunPlan, world_size: int) -> dict[str, int]:
    steps = plan.steps
    tokens, num_batches = steps.tokens_per_batch, steps.gradient_accumulation_steps * world_size
    if tokens is None:
        return {"batch": steps.per_device_train_batch_size * num_batches}
    return {"tokens_per_batch": tokens, "batch_tokens": tokens * num_batches}


def describe_evaluations(held_out: Examples | None, best_metric: str | None) -> dict[str, Any]:
    """Describe the examples and the metric of a run's evaluations, as fields of its identity."""
    examples = None if held_out is None else hash_examples(held_out)
    return dict(zip(EVALUATION_FIELDS, (examples, best_metric), strict=True))


def has_other_evaluations(checkpoint: Path, now: dict[str, Any]) -> bool:
    """Whether the evaluations before a checkpoint can't be compared with evaluations of this identity."""
    then = read_run_identity(checkpoint)
    had_some = then.get("held_out") is not None
    return had_some and any(then[name] != now[name] for name in EVALUATION_FIELDS)


def has_other_held_out(checkpoint: Path, now: dict[str, Any]) -> bool:
    """Whether the evaluations before a checkpoint had different examples than this identity."""
    return read_run_identity(checkpoint).get("held_out") not in (None, now["held_out"])


def check_run_identity(checkpoint: Path, now: dict[str, Any], plan: RunPlan) -> list[str]:
    """Compare the configuration with a checkpoint's. Return a line for each allowed difference."""
    then = read_run_identity(checkpoint)
    _check_shards(checkpoint, then, now)
    different = {
        name: describe_change(name, then.get(name), now.get(name))
        for name in now | then
        if then.get(name) != now.get(name) and name not in NOT_COMPARED
    }
    if "data" in different and (split := [name for name in SPLIT_FIELDS if name in different]):
        different["data"] = f"data: different training examples, because of {' and '.join(split)}"
    for name in ("batch", "batch_tokens"):
        if name in different and then.get(name) and now.get(name):
            different[name] += _suggest_equal_batch(then, now, plan.steps.gradient_accumulation_steps)
    if refused := {name: line for name, line in different.items() if name not in plan.output.allow_change}:
        allows = [*different] if different.keys() <= set(CHANGEABLE) else []
        raise make_resume_error(checkpoint, refused.values(), allows)
    return list(different.values())


def check_steps_per_epoch(checkpoint: Path, now: dict[str, Any]) -> None:
    """Check that epochs begin at the same steps, if nothing but the number of epochs or steps was changed.

    With tokens_per_batch, all epochs of a mixture have the steps of the longest epoch.
    """
    then = read_run_identity(checkpoint)
    before, after = then.get(STEPS_PER_EPOCH), now[STEPS_PER_EPOCH]
    lengths = [name for name in ("num_train_epochs", "max_steps") if then[name] != now[name]]
    others = ("data", "mixing", "tokens_per_batch", "batch_tokens", "seed")
    if lengths and before not in (None, after) and all(then.get(name) == now.get(name) for name in others):
        problem = f"with this value an epoch has {after} steps, with the previous value {before}"
        raise SettingsError(
            f"{lengths[0]}: {problem}, so the run can't continue where it was stopped",
            hint=f"resume with {lengths[0]} {then[lengths[0]]}, or start a new run from these weights with "
            f"{format_weights_flag(checkpoint)} and a new output_dir",
        )


def needs_resharding(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a checkpoint has shards that DeepSpeed can't load on these ranks, but `load_resharded` can."""
    return {then["deepspeed_stage"], now["deepspeed_stage"]} <= ZERO_STAGES and any(
        then[name] != now[name] for name in SHARDING_FIELDS
    )


def describe_other_ranks(checkpoint: Path, now: dict[str, Any]) -> str | None:
    """Describe the effect of a different number of ranks or ZeRO stage on a resumed run; None: no difference."""
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


def check_finished_run(folder: Path, then: Settings, now: Settings) -> None:
    """Compare the settings of a finished run with the current ones."""
    before, after = then.model_dump(mode="json"), now.model_dump(mode="json")
    paths = select_settings(type(now), Affects.INPUT_FILES)
    different = []
    for name in select_settings(type(now), Affects.FINAL_WEIGHTS):
        old, new = before[name], after[name]
        if old == new or (name in paths and _resolve_paths(old) == _resolve_paths(new)):
            continue
        if name in PATHS_OF_DATASETS:
            different += _describe_datasets(name, _resolve_datasets(old), _resolve_datasets(new))
            continue
        format_value = _format_in_full if name in paths else abbreviate_value
        different.append(f"{name}: {format_value(old)} before, {format_value(new)} now")
    if different:
        raise SettingsError(
            *different,
            heading=f"{folder}: this run has already finished, with different settings:",
            choices=[
                "to start over, add --fresh; the old run is kept under a new name",
                f"to continue from its weights, use {format_weights_flag(folder)} and a new output_dir",
            ],
        )


def _format_in_full(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _resolve_paths(value: Any) -> list[str]:
    """Resolve one or more paths, so that two spellings of the same path are equal.

    For records in memory, only the hash in the file's name counts: the file is in a run folder that may be moved.
    """
    paths = [Path(path).resolve() for path in (value if isinstance(value, list) else [value]) if path is not None]
    return [path.name if is_records_name(path.name) else str(path) for path in paths]


def _describe_datasets(name: str, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    if len(old) != len(new):
        return [f"{name}: {format_count(len(old), 'dataset')} before, {len(new)} now"]
    return [
        describe_change(f"{name}[{number}].{key}", then.get(key), now.get(key))
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
    """Suggest micro-batches, or numbers of examples in each, that keep the size of a step."""
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
    """Hash the examples: equal for the same examples in the same order."""
    return f"sha256:{hash_json(examples.identify())}"


def hash_adapter(folder: Path) -> str:
    """Hash an adapter's files."""
    paths = (path for pattern in ADAPTER_FILES for path in sorted(folder.glob(pattern)))
    return f"sha256:{hash_json({path.name: hash_file(path) for path in paths})}"


def _describe_mixing(examples: Examples) -> dict[str, Any]:
    """Describe how many examples of each dataset an epoch has, in place of the settings of mixing."""
    names = ("mixing", "mixing_temperature", "mixing_cap")
    if not examples.are_several:
        return dict.fromkeys(names)
    rates = {
        dataset.name: int(rate) if rate.denominator == 1 else float(rate)
        for dataset, rate in zip(examples.datasets, examples.rates, strict=True)
    }
    return dict.fromkeys(names) | {"mixing": rates}
