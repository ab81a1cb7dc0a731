"""Validate a run's settings before anything is written or loaded."""

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from t5tune.checkpoints.adapter_config import read_adapter_config
from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.checkpoints.base import find_base, read_config
from t5tune.compat.requirements import check_versions
from t5tune.custom_metrics import load_custom_metric
from t5tune.data.tokens.templates import load_template
from t5tune.distributed.deepspeed_build import compiles_for_offloading, find_missing_build_tools
from t5tune.distributed.world import World
from t5tune.errors import DependencyError, SettingsError, naming_settings, suggest_name
from t5tune.families import find_family
from t5tune.families.encoder import find_encoder_class
from t5tune.file_names import (
    CACHE_MANIFEST_FILE,
    CHECKPOINT_MANIFEST_FILE,
    RESULT_FILE,
    RUN_CACHE_FOLDER,
    SETTINGS_FILE,
)
from t5tune.formatting import shorten
from t5tune.io.reasons import join_lines
from t5tune.metrics import PREFERENCE_METRICS
from t5tune.model.device import DOCTOR_HINT, read_nvidia_driver
from t5tune.model.kernels.build_tools import find_missing_compiler
from t5tune.progress import Report, silent
from t5tune.runs.deepspeed_values import describe_replaced_schedule, find_mismatches
from t5tune.runs.plan import PreferencePlan, RunPlan
from t5tune.runs.teacher_files import find_teacher
from t5tune.settings import packaged_templates
from t5tune.settings.field_types import Settings
from t5tune.settings.groups.distillation import TEACHER
from t5tune.settings.groups.preferences import DPO_SETTINGS, ORPO_SETTINGS
from t5tune.settings.groups.processes import ProcessSettings, RankSettings
from t5tune.settings.groups.steps import SCHEDULES_BY_METRIC, StepSettings

FILES_OF_A_RUN = (
    RESULT_FILE,
    f"checkpoint-*/{CHECKPOINT_MANIFEST_FILE}",
    f"{RUN_CACHE_FOLDER}/**/{CACHE_MANIFEST_FILE}",
)
SECRET_ARGUMENTS = {"hub_token", "push_to_hub_token"}
FIXED_ARGUMENTS = {
    "save_total_limit": None,  # we rotate checkpoints ourselves, once a new checkpoint is complete: see publisher.py
    "ddp_find_unused_parameters": False,
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "average_tokens_across_devices": True,  # else the loss would be multiplied by the number of ranks
    "prediction_loss_only": True,
    "log_level": "error",
    "log_level_replica": "error",
}
"""The Trainer's arguments that t5tune's own trainer relies on."""
RESERVED_ARGUMENTS = {
    *FIXED_ARGUMENTS, "fsdp", "fsdp_config", "parallelism_config", "local_rank", "resume_from_checkpoint",
    "load_best_model_at_end",
}  # fmt: skip
UNRESUMABLE_ARGUMENTS = {
    "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "ignore_data_skip", "auto_find_batch_size",
    "restore_callback_states_from_checkpoint",
}  # fmt: skip
"""Change the contents or the writer of a checkpoint, or the examples of the next step."""
ARGUMENTS_WITHOUT_EFFECT = {
    "data_seed": "set seed instead; it determines the order of the examples",
    # at exit, Python would wait for such workers, which ignore the signal that is to end them
    "dataloader_persistent_workers": "each epoch starts new workers; leave it out",
    # transformers adds its noise to the output of `shared`, but T5 calls encoder.embed_tokens; T5Gemma's noise would
    # depend on the other examples of a packed row
    "neftune_noise_alpha": "NEFTune isn't supported; leave it out",
    "train_sampling_strategy": "set group_by_length instead; it determines the order of the examples",
    "length_column_name": "the lengths are in the token cache; leave it out",
    "bf16_full_eval": "evaluations compute as training does; set bf16",
    "fp16_full_eval": "evaluations compute as training does, and T5's feed-forward layers overflow in fp16; use bf16",
    **dict.fromkeys(
        ("dataloader_drop_last", "dataloader_multiprocessing_context", "dataloader_in_order"),
        "t5tune makes its own batches; leave it out",
    ),
    **dict.fromkeys(
        (
            "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics",
            "include_for_metrics",
        ),
        "t5tune has its own evaluation loop; leave it out",
    ),
    **dict.fromkeys(("hub_always_push", "hub_revision"), "t5tune uploads the run itself; leave it out"),
}  # fmt: skip
# names that need no check: importing transformers' list takes seconds, also in a process that only starts ranks
COMMON_NAMES = {
    "optim": ("adamw_torch", "adamw_torch_fused", "adafactor"),
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup"),
}
WITHOUT_WARMUP = {"constant", *SCHEDULES_BY_METRIC}
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab")  # also their modules' names


def check_plan(plan: RunPlan, imports_metrics: bool = True) -> None:
    """Check everything that depends on neither the machine's GPUs nor the base.

    Args:
        imports_metrics: whether the files of custom metrics are executed.

    Raises:
        CheckpointError: `adapter` isn't the folder of an adapter.
        SettingsError: an unknown field under training_args, an unsuitable DeepSpeed config, and so on: all problems at
            once; but an unknown conversation template alone, before them.
        DependencyError: DeepSpeed or a tracker isn't installed, or a library is older than t5tune needs.
    """
    check_versions("torch", "transformers", "accelerate", "peft")
    if plan.model.precision.quantization is not None:
        check_versions("bitsandbytes")
    choose_trackers(plan.output.report_to)
    for name, adapter in plan.list_adapters().items():
        with naming_settings(adapter=name):
            read_adapter_config(find_adapter(adapter, plan.model.base.cache_dir))
    if plan.data.conversation_template is not None:
        load_template(plan.data.conversation_template)
    problems = _find_unusable_evaluation(plan) + _find_unknown_names(plan.steps)
    problems += _find_unusable_schedule(plan.steps)
    problems += _find_unusable_arguments(plan.steps.training_args, type(plan.given))
    problems += _find_missing_functions(plan.evaluation.metric or []) if imports_metrics else []
    problems += _find_useless_mixing(plan) + _find_settings_of_other_objectives(plan)
    if (deepspeed := plan.processes.deepspeed) is not None:
        configuration = packaged_templates.read_deepspeed_file(deepspeed)
        problems += _find_deepspeed_conflicts(plan, configuration)
        _check_deepspeed_installation(deepspeed, configuration)
    on_cpu, layers, optim = _trains_on_cpu(plan.processes), plan.model.layers, plan.steps.optim
    if layers.torch_compile and (missing := find_missing_compiler(on_gpu=not on_cpu)):
        raise DependencyError(f"torch_compile: {missing.what}", hint=f"{missing.fix}; or leave out torch_compile")
    problems += [
        f"eval_data_path: {each.path[0]}: objective is {each.objective} here and {plan.data.objective} for the run; "
        "give held-out data of the same kind"
        for each in plan.eval_datasets
        if each.kind != plan.data.kind and {"pairs", "labels"} & {each.kind, plan.data.kind}
    ]
    if (path := plan.data.preprocessed_path) is not None and path.is_file():
        problem = "is a file; a token cache is a folder. FastChat's JSON cache isn't read; choose a new folder"
        problems.append(f"preprocessed_path: {path}: {problem}")
    if layers.packed_attention == "flex" and layers.packing == "off":
        problems.append("packed_attention: flex: needs packing; leave out packing: off")
    problems += find_unusable_optimizer(optim, on_cpu)
    if problems:
        raise SettingsError(*problems)


def find_unusable_optimizer(optim: str, on_cpu: bool) -> list[str]:
    """List a paged optimizer that can't train on a CPU."""
    is_unusable = on_cpu and optim.startswith("paged_")
    return [f"optim: {optim}: paged optimizers need a GPU; use adamw_bnb_8bit"] if is_unusable else []


def choose_trackers(names: list[str]) -> list[str]:
    """Return the trackers that `--report-to` names: none for ["none"], all installed ones for ["all"].

    transformers logs to them.
    """
    if names == ["all"]:
        return [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    wanted = [name for name in names if name != "none"]
    for name in wanted:
        if name not in TRACKERS:
            raise SettingsError(f"report_to: {name}: no such tracker; choose from {', '.join(TRACKERS)}, all and none")
        if importlib.util.find_spec(name) is None:
            raise DependencyError(
                f"report_to: {name} isn't installed",
                hint=f"pip install {name}, or leave it out: metrics.jsonl and report.html need no package",
            )
    return wanted


def _find_unusable_arguments(training_args: dict[str, Any], model: type[Settings]) -> list[str]:
    """List the fields under training_args that can't be set there, such as t5tune's own settings."""
    if not training_args:
        return []
    from transformers import TrainingArguments

    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    # a value that t5tune has anyway changes nothing
    same = {name for name, value in (defaults | FIXED_ARGUMENTS).items() if training_args.get(name, ...) == value}
    given = [name for name in training_args if name not in same or name in model.model_fields]
    problems = {name: _find_argument_problem(name, {*defaults}, model) for name in given}
    return [f"training_args.{name}: {problem}" for name, problem in problems.items() if problem is not None]


def _find_missing_functions(functions: list[str]) -> list[str]:
    problems = []
    for function in functions:
        try:
            load_custom_metric(function)
        except SettingsError as error:
            problems += [f"{error.message}; {error.hint}" if error.hint else error.message]
    return problems


def _find_argument_problem(name: str, fields: set[str], model: type[Settings]) -> str | None:
    if name in model.model_fields:
        return f"set {name} directly, not under training_args"
    if name in SECRET_ARGUMENTS:  # the settings are saved in the run folder
        return "secrets don't belong in settings; set HF_TOKEN instead"
    if name in RESERVED_ARGUMENTS:
        return "t5tune sets this itself; leave it out"
    if name in UNRESUMABLE_ARGUMENTS:
        return "with it, a run couldn't resume exactly; leave it out"
    if name in ARGUMENTS_WITHOUT_EFFECT:
        return ARGUMENTS_WITHOUT_EFFECT[name]
    if name.startswith("torch_compile"):
        return "t5tune chooses what to compile; set torch_compile instead"
    return None if name in fields else f"no such field of TrainingArguments{suggest_name(name, fields)}"


def _find_deepspeed_conflicts(plan: RunPlan, configuration: dict[str, Any]) -> list[str]:
    """List settings that don't work with the DeepSpeed config, or with DeepSpeed at all."""
    problems, name, quantization = [], plan.processes.deepspeed, plan.model.precision.quantization
    if configuration.get("fp16", {}).get("enabled") is True:
        problems.append(f"deepspeed: {name}: fp16: T5's feed-forward layers overflow in fp16; use bf16")
    if configuration.get("zero_optimization", {}).get("round_robin_gradients"):
        # DeepSpeed 0.19 reorders the fp32 weights, but looks for a parameter's where they would be without it
        problem = "DeepSpeed mixes up the names of saved weights; remove it"
        problems.append(f"deepspeed: {name}: round_robin_gradients: {problem}")
    if quantization is not None and quantization.quant_type == "int8":
        problem = "DeepSpeed can't handle int8 weights; use nf4 or fp4, or leave out --deepspeed"
        problems.append(f"quant_type: int8: {problem}")
    # PEFT 0.21 replaces quantized weights on CPUs whenever it reads them for DoRA, and DeepSpeed loses track of them
    if (
        quantization is not None
        and plan.model.adapter is not None
        and plan.model.adapter.use_dora
        and packaged_templates.get_zero_stage(configuration) == 3
        and _trains_on_cpu(plan.processes)
    ):
        problem = "with q_lora and ZeRO-3 it works only on GPUs"
        problems.append(f"use_dora: {problem}; use zero2, or leave out use_dora or q_lora")
    world = World.from_environment()
    ranks = world.size if world.launched else plan.processes.process_count
    return problems + find_mismatches(plan, configuration, ranks, plan.steps.max_steps)


def list_notes(plan: RunPlan) -> list[str]:
    """List notes about default values, and about settings that replace values of a DeepSpeed config."""
    notes: list[str | None] = []
    if plan.processes.deepspeed is not None:
        configuration = packaged_templates.read_deepspeed_file(plan.processes.deepspeed)
        notes.append(describe_replaced_schedule(plan, configuration))
    if isinstance(plan.objective, PreferencePlan) and "dropout" not in plan.given.model_fields_set:
        notes.append(f"objective {plan.objective.objective}: dropout is off; --dropout turns it on")
    return [note for note in notes if note is not None]


def _check_deepspeed_installation(name: str, configuration: dict[str, Any]) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise DependencyError(
            "deepspeed: the package isn't installed",
            hint="pip install deepspeed (Linux), or leave out --deepspeed, which is optional even with several "
            "processes",
        )
    check_versions("deepspeed")
    if compiles_for_offloading(configuration) and (lacks := find_missing_build_tools()):
        raise DependencyError(
            f"deepspeed: {name}: DeepSpeed compiles its code for offloading at first use, but {lacks}",
            hint="apt install g++ ninja-build python3-dev, set TORCH_EXTENSIONS_DIR, or use zero2-offload or "
            "zero3-offload, which compile nothing",
        )


def check_machine(plan: RunPlan, report: Report = silent) -> None:
    """Check that this machine has the base, the teacher and the GPUs."""
    base = find_base(plan.model.base, report=report)
    family = find_family(read_config(base), base, plan.model.base.family)
    if plan.data.kind == "labels":
        find_encoder_class(family.architecture, plan.data.objective)
    if plan.teacher is not None:
        find_teacher(plan.teacher, plan.model, report)
    if (problem := find_missing_gpus(plan.processes)) is not None:
        raise SettingsError(problem)


def find_missing_gpus(settings: RankSettings) -> str | None:
    """Describe why num_gpus doesn't fit this machine; None if it fits."""
    if settings.num_gpus is None:
        return None
    import torch

    found = torch.cuda.device_count()
    if found == 0 and (driver := read_nvidia_driver()):
        return f"num_gpus: {settings.num_gpus}: torch can't use the NVIDIA driver ({driver}); {DOCTOR_HINT}"
    if found < settings.num_gpus:
        return f"num_gpus: {settings.num_gpus}: this machine has {found}; use --num-processes for the CPU"
    return None


def check_starts_no_processes(settings: RankSettings, command: str, world: World) -> None:
    """Refuse num_gpus and num_processes in a call from Python: only the command line starts processes."""
    for name in ("num_gpus", "num_processes"):
        number = getattr(settings, name)
        if number not in (None, 1) and not world.launched:
            raise SettingsError(
                f"{name}: {number}: {command}() starts no processes",
                hint=f"start the script with torchrun --nproc-per-node {number}, or run t5tune {command}",
            )


def _find_useless_mixing(plan: RunPlan) -> list[str]:
    if plan.data.data is not None or len(plan.datasets) > 1:
        return []
    return [
        f"{name}: {value}: there is only one dataset; list several under data, in a YAML file"
        for name in ("mixing", "mixing_temperature", "mixing_cap")
        if (value := getattr(plan.data, name)) is not None
    ]


def _find_settings_of_other_objectives(plan: RunPlan) -> list[str]:
    objective = plan.data.objective
    problems = []
    for owner, names in {"dpo": DPO_SETTINGS, "orpo": ORPO_SETTINGS}.items():
        given = _list_changed(plan.given, names) if objective != owner else {}
        problems += [f"{name}: {value}: only for objective {owner}; leave it out" for name, value in given.items()]
    options = plan.objective.options if isinstance(plan.objective, PreferencePlan) else None
    if options is not None and options.dpo_loss == "ipo" and options.dpo_label_smoothing:
        problems.append(
            f"dpo_label_smoothing: {options.dpo_label_smoothing:g}: dpo_loss ipo doesn't use it; leave it out"
        )
    best, of_pairs = plan.evaluation.metric_for_best_model or "", plan.data.kind == "pairs"
    if (best.endswith(PREFERENCE_METRICS) and not of_pairs) or (best.endswith("perplexity") and of_pairs):
        problem = f"objective {objective} has no such metric; choose a different metric"
        problems.append(f"metric_for_best_model: {best}: {problem}")
    names = ("label_smoothing_factor", TEACHER) if of_pairs else ()
    why = f"objective {objective} doesn't use it"
    if plan.data.kind == "labels":
        names = ("eval_generate", "json_schema", "label_smoothing_factor", "metrics", "metric", TEACHER)
        why = f"objective {objective} generates nothing"
    given = _list_changed(plan.given, names)
    return problems + [f"{name}: {shorten(str(value), 80)}: {why}; leave it out" for name, value in given.items()]


def _list_changed(settings: Settings, names: Iterable[str]) -> dict[str, Any]:
    fields = type(settings).model_fields
    return {name: getattr(settings, name) for name in names if getattr(settings, name) != fields[name].default}


def _find_unknown_names(steps: StepSettings) -> list[str]:
    if all(getattr(steps, setting) in names for setting, names in COMMON_NAMES.items()):
        return []
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    known = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}
    names = {setting: [str(kind.value) for kind in kinds] for setting, kinds in known.items()}
    return [
        f"{setting}: {value}: unknown to transformers"
        + (suggest_name(value, names[setting]) or f"; choose from {', '.join(names[setting])}")
        for setting in known
        if (value := getattr(steps, setting)) not in names[setting]
    ]


def _find_unusable_schedule(steps: StepSettings) -> list[str]:
    """List problems of the learning-rate schedule: some need an argument, some have no warmup."""
    name, given = steps.lr_scheduler_type, steps.training_args.get("lr_scheduler_kwargs") or {}
    if steps.warmup_steps and name in WITHOUT_WARMUP:
        fix = "use constant_with_warmup, or set warmup_steps to 0" if name == "constant" else "set warmup_steps to 0"
        return [f"warmup_steps: {steps.warmup_steps:g}: lr_scheduler_type {name} has no warmup; {fix}"]
    # TrainingArguments parses a text as JSON; a list has a value for each optimizer group, and these aren't known yet
    if not isinstance(given, dict) or any(isinstance(value, list) for value in given.values()):
        return []
    if name in COMMON_NAMES["lr_scheduler_type"] and not given:
        return []
    import torch
    from transformers import SchedulerType, get_scheduler

    if name not in [kind.value for kind in SchedulerType]:
        return []
    assert steps.learning_rate is not None  # make_run_plan has chosen it
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=steps.learning_rate)
    try:
        with warnings.catch_warnings(action="ignore"):
            get_scheduler(name, optimizer, 0, 1, dict(given))
    except (TypeError, ValueError) as error:
        return [f"lr_scheduler_type: {name}: {join_lines(error)}; set lr_scheduler_kwargs under training_args"]
    return []


def _trains_on_cpu(processes: ProcessSettings) -> bool:
    if processes.use_cpu or processes.num_processes is not None:
        return True
    import torch

    return not torch.cuda.is_available()


def _find_unusable_evaluation(plan: RunPlan) -> list[str]:
    """List the settings that need evaluations although no examples are held out."""
    has_held_out = plan.data.eval_fraction or any(each.made_from.get("eval_fraction") for each in plan.datasets)
    if has_held_out or plan.eval_datasets:
        return []
    return [
        f"{name}: {value}: there are no held-out examples to evaluate on; set eval_data_path or eval_fraction"
        for name, value in plan.list_needing_evaluation().items()
    ]


def describe_copied_run(config: Path, output_dir: Path) -> str | None:
    """Describe a config in a run folder that was moved or copied, if its output_dir is a different folder."""
    folder = config.parent
    if config.name != SETTINGS_FILE or os.path.realpath(folder) == os.path.realpath(output_dir):
        return None
    if not any(True for name in FILES_OF_A_RUN for _ in folder.glob(name)):
        return None
    problem = f"{config}: is in the run folder {folder}, but its output_dir is {output_dir}, which this command uses"
    return f"{problem}; add --output-dir {folder} to use that run instead"
