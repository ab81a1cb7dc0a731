"""What can be found wrong with a run's settings before anything is made or loaded."""

import dataclasses
import importlib.util
import os
import shutil
from pathlib import Path

from t5tune.checkpoints.base import find_base, read_config
from t5tune.compat.requirements import check_versions
from t5tune.data.cache import is_cache, read_manifest
from t5tune.data.templates import load_template
from t5tune.distributed.deepspeed_build import lack
from t5tune.errors import DependencyError, SettingsError, suggestion
from t5tune.families import family_of
from t5tune.model.device import nvidia_driver
from t5tune.settings import TrainSettings, packaged_templates
from t5tune.training.run_folder import SHAPING
from t5tune.training.trackers import chosen_trackers

DOCTOR = "t5tune doctor tells how to mend that"
EVALUATION = ("eval_strategy", "eval_steps", "eval_generate", "metric_for_best_model", "early_stopping_patience")
SECRETS = {"hub_token", "push_to_hub_token"}
OWN_ARGUMENTS = {
    "output_dir",
    "deepspeed",
    "report_to",
    "disable_tqdm",
    "remove_unused_columns",
    "fp16",
    "fsdp",
}


def check(settings: TrainSettings) -> None:
    """Raise what is wrong with the settings, wherever the run may be.

    Raises:
        SettingsError: an unknown field under training_args, a bad DeepSpeed configuration, another shape of examples
            than the cache's.
        DependencyError: DeepSpeed or a tracker is asked for and not there, or a library is older than t5tune needs.
    """
    check_versions("torch", "transformers", "accelerate", "peft")
    if settings.q_lora:
        check_versions("bitsandbytes")
    chosen_trackers(settings.report_to)
    problems = _nothing_to_evaluate_on(settings) + _not_the_cache_s(settings) + _no_such_names(settings)
    if settings.training_args:
        from transformers import TrainingArguments

        fields = {field.name for field in dataclasses.fields(TrainingArguments)}
        for name in settings.training_args:
            if name in TrainSettings.model_fields:
                problems.append(f"training_args.{name}: set {name} itself")
            elif name in SECRETS:  # settings are saved with the run
                problems.append(f"training_args.{name}: a secret doesn't belong into settings; set HF_TOKEN")
            elif name in OWN_ARGUMENTS:
                problems.append(f"training_args.{name}: t5tune sets this itself")
            elif name.startswith("torch_compile"):
                problems.append(f"training_args.{name}: t5tune chooses what is compiled; set torch_compile")
            elif name not in fields:
                problems.append(f"training_args.{name}: no such field of TrainingArguments{suggestion(name, fields)}")
    if settings.deepspeed is not None:
        configuration = packaged_templates.read_deepspeed(settings.deepspeed)
        if configuration.get("fp16", {}).get("enabled") is True:
            problems.append(f"deepspeed: {settings.deepspeed}: fp16: T5's feed-forward layers overflow in fp16")
        if settings.q_lora and settings.quant_type == "int8":
            problems.append("quant_type: int8 weights can't go through DeepSpeed; take nf4 or fp4, or no --deepspeed")
        if settings.loraplus_lr_ratio is not None and "optimizer" in configuration:
            problems.append(
                f"loraplus_lr_ratio: {settings.deepspeed} brings an optimizer of its own, which knows one rate; take "
                "its `optimizer` out"
            )
        if importlib.util.find_spec("deepspeed") is None:
            raise DependencyError(
                "deepspeed: the package isn't installed",
                hint="pip install deepspeed (Linux); without it one process, or several without --deepspeed, train",
            )
        check_versions("deepspeed")
        if "offload_optimizer" in configuration.get("zero_optimization", {}) and (lacks := lack()):
            raise DependencyError(
                f"deepspeed: {settings.deepspeed}: its optimizer on the CPU is compiled at first use, and {lacks}",
                hint="apt install g++ ninja-build, set TORCH_EXTENSIONS_DIR, or take zero2 or zero3",
            )
    if settings.torch_compile and _trains_on_cpu(settings) and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise DependencyError(
            "torch_compile: no C++ compiler is on the PATH", hint="apt install g++, set CXX, or leave it out"
        )
    if settings.optim.startswith("paged_") and _trains_on_cpu(settings):
        problems.append(f"optim: {settings.optim}: pages between a GPU's memory and the machine's; take adamw_bnb_8bit")
    if problems:
        raise SettingsError(*problems)


def check_machine(settings: TrainSettings) -> None:
    """Raise what keeps the run from this machine.

    Raises:
        SettingsError: missing GPUs.
        ModelError: no such base, or one of another family.
    """
    base = find_base(settings)
    family_of(read_config(base), base, settings.family)
    if (problem := missing_gpus(settings)) is not None:
        raise SettingsError(problem)


def missing_gpus(settings: TrainSettings) -> str | None:
    """What is wrong with num_gpus on this machine."""
    if settings.num_gpus is None:
        return None
    import torch

    found = torch.cuda.device_count()
    if found == 0 and (driver := nvidia_driver()):
        return f"num_gpus: {settings.num_gpus}: torch can't use the NVIDIA driver ({driver}); {DOCTOR}"
    if found < settings.num_gpus:
        return f"num_gpus: {settings.num_gpus}: this machine has {found}; --num-processes uses the CPU"
    return None


def _not_the_cache_s(settings: TrainSettings) -> list[str]:
    """What is asked for examples that a cache holds otherwise."""
    cache = Path(settings.data_path[0])
    if not is_cache(cache):
        return []
    inputs = read_manifest(cache)["inputs"]
    step = "leave it out, or give the conversations themselves"
    problems = [
        f"{name}: {getattr(settings, name)!r:.80} here, {inputs[name]!r:.80} in the cache {cache}; {step}"
        for name in sorted(SHAPING & settings.model_fields_set & inputs.keys())
        if getattr(settings, name) != inputs[name]
    ]
    if (layout := settings.conversation_template) and load_template(layout).hash != inputs.get("template"):
        problems.append(f"conversation_template: {layout}: the cache {cache} was made with another; {step}")
    return problems


def _no_such_names(settings: TrainSettings) -> list[str]:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    known = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}
    names = {setting: [str(kind.value) for kind in kinds] for setting, kinds in known.items()}
    return [
        f"{setting}: {value}: transformers has none of this name"
        + (suggestion(value, names[setting]) or f"; there are {', '.join(names[setting])}")
        for setting in known
        if (value := getattr(settings, setting)) not in names[setting]
    ]


def _trains_on_cpu(settings: TrainSettings) -> bool:
    import torch

    return settings.use_cpu or settings.num_processes is not None or not torch.cuda.is_available()


def _nothing_to_evaluate_on(settings: TrainSettings) -> list[str]:
    """What is asked of evaluation where there is nothing held out."""
    if settings.eval_fraction > 0 or settings.eval_data_path is not None:
        return []
    cache = Path(settings.data_path[0])
    if is_cache(cache) and read_manifest(cache)["eval_fraction"] > 0:
        return []
    asked = ((name, getattr(settings, name)) for name in EVALUATION)
    return [
        f"{name}: {value} has nothing to evaluate on; give eval_data_path or eval_fraction"
        for name, value in asked
        if value not in (None, "no")
    ]
