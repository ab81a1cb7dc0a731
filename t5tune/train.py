"""`t5tune train`: a base and conversations -> a run folder with an adapter.

    result = train(TrainSettings(model_name_or_path="pocket", data_path="pocket", output_dir="run"))
    result.adapter

It runs in whatever processes there are: alone, or as one rank under torchrun, deepspeed or `--num-gpus`.
"""

import dataclasses
import importlib.util
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from t5tune import presets
from t5tune.data.cache import Cache, is_cache, open_cache, read_manifest
from t5tune.data.templates import template_from
from t5tune.data.tokenizer import load_tokenizer
from t5tune.errors import CheckpointError, DependencyError, SettingsError, Stopped, TrainingError
from t5tune.model.device import choose_device, keep_freed_memory, memory_is_named, peak_memory
from t5tune.prepare import prepare
from t5tune.progress import Note, Report, silent
from t5tune.publish import write_file, write_json
from t5tune.settings import PrepareSettings, TrainSettings, dump_settings
from t5tune.training.checkpoint import checkpoints, newest, remove_staged
from t5tune.training.compiler import SHARED_MEMORY_OP, has_compiler
from t5tune.training.identity import check_same, identity
from t5tune.training.launch import World
from t5tune.training.ranks import barrier, by_rank_0, default_timeout, loss_of_ranks
from t5tune.training.space import bytes_of_checkpoint, check_space
from t5tune.training.stopping import StopRequest, listening
from t5tune.training.trackers import chosen_trackers
from t5tune.weights.adapter import TEMPLATE, config_without_start
from t5tune.weights.base import find_base, read_config
from t5tune.weights.card import data_line, settings_line
from t5tune.weights.fingerprint import base_facts
from t5tune.yaml_file import read_yaml

AGAIN = "the same command goes on from there"
SETTINGS = "settings.yaml"
RESULT = "result.json"
# what a checkpoint holds for use, beside what resuming needs
RESULTS = (
    "adapter_", "non_lora_state", "tokenizer", "special_", "added_tokens", "spiece", "template", "README",
    "model.", "config.", "generation_config",
)  # fmt: skip
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


@dataclass(frozen=True)
class Trained:
    """What train made. Times in seconds, memory in bytes; `tokens` are source and target tokens trained on."""

    run: Path
    adapter: Path
    steps: int
    epochs: float
    train_loss: float | None
    eval: dict[str, float]
    examples: int
    tokens: int
    tokens_per_second: float
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    world_size: int
    resumed_from: Path | None
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run folder that is ready to be trained in."""

    folder: Path
    settings_path: Path
    cache: Path
    eval_cache: Path | None
    finished: bool


def train(settings: TrainSettings, report: Report = silent) -> Trained:
    """Train in this process, as the rank that the environment says.

    Raises:
        SettingsError, DataError, ModelError: the input is wrong.
        TrainingError: the loss is no longer finite, or a checkpoint can't be written.
        RankLost: another rank died or doesn't answer.
        Stopped: a signal asked to stop; the work so far is sealed.
    """
    world = World.from_environment()
    report = report if world.rank == 0 else silent
    timeout = timedelta(seconds=settings.process_group_timeout)
    group = _process_group(world, settings, report)
    with listening() as stop, default_timeout(timeout), group as device, loss_of_ranks(world):
        stop.waits = world.rank > 0
        if not world.run_is_open:
            by_rank_0(world, lambda: open_run(settings, report))
        stop.waits = True
        run = _existing_run(settings)
        if run.finished:
            return read_result(run.folder)
        with _memory_is_named(settings):
            return _train(settings, run, world, device, stop, report)


def _memory_is_named(settings: TrainSettings) -> AbstractContextManager[None]:
    batch = (
        f"tokens_per_batch {settings.tokens_per_batch}"
        if settings.tokens_per_batch
        else f"per_device_train_batch_size {settings.per_device_train_batch_size}"
    )
    smaller = "a smaller one with more gradient_accumulation_steps gives the same steps"
    checkpointing = "" if settings.gradient_checkpointing else ", --gradient-checkpointing"
    return memory_is_named(
        f"training with {batch} and model_max_length {settings.model_max_length}",
        f"{smaller}{checkpointing}; t5tune plan --config {settings.output_dir / 'settings.yaml'} reckons what fits",
    )


def open_run(settings: TrainSettings, report: Report = silent) -> Run:
    """Check what can be checked without loading the model, make the cache, and save the settings."""
    check(settings)
    folder = settings.output_dir
    if settings.fresh:
        _move_aside(folder, report)
    run = _existing_run(settings)
    if run.finished:
        report(Note(f"{folder}: this run is finished; --fresh trains anew"))
        return run
    if settings.preprocessed_path is not None and settings.preprocessed_path.is_file():
        raise SettingsError(
            f"preprocessed_path: {settings.preprocessed_path}: a file; the token cache is a folder",
            hint="name a new folder: FastChat's JSON cache can't be read, many of its labels are not the answers",
        )
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"output_dir: {folder}: a file stands there")
    if folder.is_dir() and any(folder.iterdir()) and not run.settings_path.is_file():
        raise SettingsError(
            f"output_dir: {folder}: holds something that is no run of t5tune", hint="name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not run.settings_path.is_file():  # by which a run is known
        _save_settings(settings, run)
    in_use = bool(checkpoints(folder)) and "data" not in settings.allow_change
    for data, cache in ((settings.data_path, run.cache), (settings.eval_data_path, run.eval_cache)):
        if data and cache and not is_cache(Path(data[0])):
            prepare(_prepare_settings(settings, data, cache), report, in_use=in_use)
    return run


def check(settings: TrainSettings) -> None:
    """Raise what is wrong with the settings before anything is made.

    Raises:
        SettingsError: an unknown field under training_args, a bad DeepSpeed configuration, missing GPUs.
        ModelError: no such base, or one of another family.
        DependencyError: DeepSpeed or a tracker is asked for and not there.
    """
    from t5tune.model.family import family_of

    base = find_base(settings)
    family_of(read_config(base), base)
    chosen_trackers(settings.report_to)
    problems = _nothing_to_evaluate_on(settings)
    if settings.training_args:
        from transformers import TrainingArguments

        from t5tune.settings.loading import suggestion

        fields = {field.name for field in dataclasses.fields(TrainingArguments)}
        for name in settings.training_args:
            if name in TrainSettings.model_fields:
                problems.append(f"training_args.{name}: set {name} itself")
            elif name in SECRETS:  # settings are saved with the run
                problems.append(f"training_args.{name}: a secret doesn't belong into settings; set HF_TOKEN")
            elif name in OWN_ARGUMENTS:
                problems.append(f"training_args.{name}: t5tune sets this itself")
            elif name not in fields:
                problems.append(f"training_args.{name}: no such field of TrainingArguments{suggestion(name, fields)}")
    if settings.deepspeed is not None:
        configuration = presets.read_deepspeed(settings.deepspeed)
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
        if "offload_optimizer" in configuration.get("zero_optimization", {}) and not has_compiler():
            raise DependencyError(
                f"deepspeed: {settings.deepspeed}: its optimizer on the CPU is compiled at first use, and no C++ "
                "compiler or no ninja is on the PATH",
                hint="apt install g++ ninja-build, or take zero2 or zero3",
            )
    if settings.optim.startswith("paged_") and _trains_on_cpu(settings):
        problems.append(f"optim: {settings.optim}: pages between a GPU's memory and the machine's; take adamw_bnb_8bit")
    if settings.num_gpus:
        import torch

        found = torch.cuda.device_count()
        if found < settings.num_gpus:
            problems.append(f"num_gpus: {settings.num_gpus}: this machine has {found}; --num-processes uses the CPU")
    if problems:
        raise SettingsError(*problems)


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


def read_result(folder: Path) -> Trained:
    """The result of a finished run.

    Raises:
        TrainingError: the run isn't finished.
    """
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / RESULT}: missing or broken: {error}") from error
    for name in ("run", "adapter", "resumed_from"):
        values[name] = Path(values[name]) if values[name] is not None else None
    return Trained(**values)


def _existing_run(settings: TrainSettings) -> Run:
    """The run folder's paths, whether or not they exist yet."""
    folder = settings.output_dir
    cache = Path(settings.data_path[0])
    if not is_cache(cache):
        cache = settings.preprocessed_path or folder / "data"
    eval_cache = None
    if settings.eval_data_path:
        eval_cache = Path(settings.eval_data_path[0])
        if not is_cache(eval_cache):
            eval_cache = folder / "eval-data"
    return Run(folder, folder / SETTINGS, cache, eval_cache, (folder / RESULT).is_file())


def _prepare_settings(settings: TrainSettings, data: list[str], cache: Path) -> PrepareSettings:
    values = {name: getattr(settings, name) for name in PrepareSettings.model_fields}
    # train itself holds out, so another seed needs no other cache
    return PrepareSettings(**{**values, "data_path": data, "output_dir": cache, "eval_fraction": 0.0, "seed": 0})


def _move_aside(folder: Path, report: Report) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    aside = folder.with_name(f"{folder.name}.{number}")
    folder.rename(aside)
    report(Note(f"{folder}: moved to {aside}"))


def _train(settings: TrainSettings, run: Run, world: World, device: Any, stop: StopRequest, report: Report) -> Trained:
    import torch
    from transformers import set_seed

    from t5tune.model.load import count_parameters, load_base
    from t5tune.model.lora import add_lora, start_from
    from t5tune.training.batches import PackedCollator, PaddedCollator
    from t5tune.training.non_finite import NonFiniteSteps
    from t5tune.training.trainer import Answers, T5Trainer
    from t5tune.weights.adapter import WEIGHTS, TrainedWith, write_adapter
    from t5tune.weights.model_folder import MODEL, write_model
    from t5tune.weights.tensors import Tensor

    started = time.monotonic()
    cache, held_out = _data(settings, run)
    base = find_base(settings)
    facts, made_of, resume = by_rank_0(world, lambda: _beginning(settings, run, cache, base, world, report))
    tokenizer = load_tokenizer(cache.tokenizer_folder)
    layout = template_from(read_yaml(cache.folder / TEMPLATE), cache.folder / TEMPLATE)
    deepspeed = presets.read_deepspeed(settings.deepspeed) if settings.deepspeed else None
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    # DeepSpeed keeps fp32 masters of bf16 adapters itself; alone, the adapters are their own masters
    adapter_dtype = dtype if deepspeed is not None else torch.float32

    set_seed(settings.seed)
    sharded = _stage(deepspeed) == 3
    # what ZeRO-3 will shard need not fit one GPU: it is loaded on the CPU, and goes over a parameter at a time
    place = torch.device("cpu") if sharded and not settings.q_lora else device
    # what trains in place without DeepSpeed is its own master too
    is_full = settings.train_mode == "full"
    model = load_base(base, adapter_dtype if is_full else dtype, place, settings)
    tied = bool(model.config.tie_word_embeddings)
    taken_out: dict[str, Tensor] = {}
    if is_full:
        model.requires_grad_(True)
    else:
        model, taken_out = add_lora(model, base, settings, list(cache.manifest["added_token_ids"]), adapter_dtype)
    if settings.adapter is not None:
        start_from(model, settings.adapter)
    packs = _packs(settings, model, report)
    trainable, total = count_parameters(model)
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    if deepspeed is not None and sharded:
        _shard(model, deepspeed, dtype)

    report(Note(f"{trainable:,} of {total:,} parameters train; {len(cache):,} examples; {world.size} × {device.type}"))
    trained_with = TrainedWith(
        {} if is_full else _adapter_config(model, settings, bool(taken_out)),
        cache.tokenizer_folder,
        cache.folder / TEMPLATE,
        {} if is_full else facts,
        data_line(cache.manifest) + settings_line(settings.model_dump()),
    )

    def write(folder: Path, state: dict[str, Tensor]) -> None:
        if is_full:
            write_model(folder, state, base, tied, trained_with)
        else:
            write_adapter(folder, state, trained_with, non_lora={})

    trainer = T5Trainer(
        model=model,
        args=_training_arguments(settings, deepspeed, held_out is not None, world, device),
        train=cache,
        held_out=held_out,
        collator=PaddedCollator(tokenizer.pad_token_id, model.config.decoder_start_token_id),
        packed=PackedCollator(model.config.decoder_start_token_id) if packs else None,
        write=write,
        weights_file=MODEL if is_full else WEIGHTS,
        taken_out=taken_out,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        group_by_length=settings.group_by_length,
        tokens_per_batch=settings.tokens_per_batch,
        label_smoothing=settings.label_smoothing_factor,
        made_of=made_of,
        keep=settings.save_total_limit,
        answers=Answers(tokenizer, layout.answer_end, settings.eval_generate) if settings.eval_generate else None,
        patience=settings.early_stopping_patience,
        stop=stop,
        non_finite=NonFiniteSteps(run.folder, settings.on_non_finite == "skip", settings.max_skipped_steps, report),
        report=report,
    )
    samples = _samples(settings, run, held_out or cache, tokenizer, layout) if settings.report_samples else None
    if samples is not None:
        trainer.add_callback(samples)
    size = bytes_of_checkpoint(trainable, deepspeed is not None, cache.tokenizer_folder)
    by_rank_0(world, lambda: check_space(run.folder, size, settings.save_total_limit or 1, report))
    before = int(resume.name.partition("-")[2]) if resume else 0
    output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.is_stopped:
        sealed = run.folder / f"checkpoint-{trainer.state.global_step}"
        raise Stopped(f"stopped by {stop.name or 'a signal to another rank'}; all work stands in {sealed}", hint=AGAIN)
    if samples is not None:
        samples.finish(trainer.model, trainer.is_world_process_zero())
    tokens = trainer.total_tokens()
    best = trainer.state.best_global_step if _best_by(settings) else None
    if best is not None:
        report(Note(f"the adapter is that of step {best}: {_best_by(settings)} {trainer.state.best_metric:.4g}"))
    result = Trained(
        run=run.folder,
        adapter=run.folder,
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0.0, 4),
        train_loss=output.training_loss if trainer.state.global_step > before else None,
        eval=_evaluation(trainer.state, best),
        examples=len(cache),
        tokens=tokens,
        tokens_per_second=round(tokens / max(output.metrics["train_runtime"], 1e-9), 1),
        trainable_parameters=trainable,
        total_parameters=total,
        peak_memory_bytes=peak_memory(device),
        world_size=world.size,
        resumed_from=resume,
        seconds=round(time.monotonic() - started, 3),
    )
    if world.rank == 0:
        _finish(run, settings, cache, trainer.state, result, best or result.steps)
    barrier()
    return result


def _beginning(
    settings: TrainSettings, run: Run, cache: Cache, base: Path, world: World, report: Report
) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """(what tells its base from others, what the run is made of, the checkpoint to go on from; None: there is none).

    Raises:
        CheckpointError: none is whole, or of another number of ranks than these.
        SettingsError: the run began with something else.
    """
    facts = _base_facts(base, settings)
    made_of = identity(settings, cache, facts["sha256"], world.size)
    resume, damaged = newest(run.folder)
    for problem in damaged:
        report(Note(f"passed over a damaged checkpoint: {problem}", warning=True))
    if damaged and resume is None:
        raise CheckpointError(f"{run.folder}: none of its checkpoints is whole", hint="--fresh begins anew")
    if resume:
        for change in check_same(resume, made_of, settings.allow_change):
            report(Note(f"changed on purpose: {change}", warning=True))
        report(Note(f"resuming from {resume}"))
    remove_staged(run.folder)
    _save_settings(settings, run)
    return facts, made_of, resume


def _save_settings(settings: TrainSettings, run: Run) -> None:
    """The saved settings are to resume, not to begin anew or to change something once more."""
    again = settings.model_copy(update={"fresh": False, "allow_change": []})
    write_file(run.settings_path, dump_settings(again).encode())


def _data(settings: TrainSettings, run: Run) -> tuple[Cache, Cache | None]:
    cache = open_cache(run.cache)
    if settings.num_data is not None:
        cache = cache.first(settings.num_data)
    if run.eval_cache is not None:
        return cache, open_cache(run.eval_cache)
    if settings.eval_fraction > 0:
        return cache.split(settings.eval_fraction, settings.seed)
    return cache.parts()


def _packs(settings: TrainSettings, model: Any, report: Report) -> bool:
    """Make the model pack, where it is to and can.

    Raises:
        SettingsError: it is to and can't.
    """
    from t5tune.model.attention import can_pack, use_packing

    if settings.packing == "off":
        return False
    if not can_pack(model):
        reason = f"packing: the attention of {model.config.model_type} can't go through packed rows"
        if settings.packing == "on":
            raise SettingsError(reason, hint="leave it at auto, or say off: batches are padded then")
        report(Note(f"{reason}; batches are padded"))
        return False
    use_packing(model)
    return True


def _shard(model: Any, configuration: dict[str, Any], dtype: Any) -> None:
    """Give each rank its part of every parameter, as ZeRO-3 keeps them.

    DeepSpeed's way, inside `from_pretrained`, replaces Flan-T5's untied head by its embedding. Here the
    model has been loaded right, and its parameters are sharded one by one.
    """
    import deepspeed
    from torch import nn

    zero = {k: v for k, v in configuration["zero_optimization"].items() if v != "auto"}
    deepspeed.zero.Init(
        module=model,
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero},
        dtype=dtype,
        mem_efficient_linear=False,
    )
    for module in model.modules():
        # no module's forward owns the rows' container, so no hook would gather them without this
        rows = getattr(module, "trainable_tokens_delta", None)
        if isinstance(rows, nn.ParameterDict):
            for row in rows.values():
                deepspeed.zero.register_external_parameter(module, row)
        # DoRA's module owns the norms alone, and reads the weights of three others
        for name, norms in getattr(module, "lora_magnitude_vector", {}).items():
            for read in (module.get_base_layer(), module.lora_A[name], module.lora_B[name]):
                deepspeed.zero.register_external_parameter(norms, read.weight)


def _adapter_config(model: Any, settings: TrainSettings, without_start: bool) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it, in a fixed order."""
    config = model.peft_config["default"].to_dict()
    if without_start:
        config = config_without_start(config)
    config["base_model_name_or_path"] = settings.model_name_or_path
    config["revision"] = settings.revision
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    for key in ("peft_type", "task_type"):
        plain[key] = getattr(plain[key], "value", plain[key])
    return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]


def _base_facts(base: Path, settings: TrainSettings) -> dict[str, Any]:
    """What tells merge whether a base is this one, and what of it the adapter saw."""
    facts: dict[str, Any] = dict(base_facts(base, settings.model_name_or_path))
    if settings.q_lora:
        compute = "bfloat16" if settings.bf16 else "float32"
        facts |= {"onto": settings.quant_type, "double_quant": settings.double_quant, "compute": compute}
    return facts


def _training_arguments(
    settings: TrainSettings, deepspeed: dict[str, Any] | None, evaluates: bool, world: World, device: Any
) -> Any:
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in fields)

    values = {
        name: getattr(settings, name)
        for name in (
            "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
            "max_grad_norm", "optim", "bf16", "tf32", "seed", "dataloader_num_workers",
            "save_strategy", "save_steps", "logging_steps", "eval_steps",
        )
    }  # fmt: skip
    on_cpu = device.type == "cpu"
    if not on_cpu:
        values |= _on_cuda(settings, device)
    values |= {
        "output_dir": str(settings.output_dir),
        "max_steps": settings.max_steps or -1,
        "eval_strategy": settings.eval_strategy or ("steps" if settings.eval_steps else "epoch" if evaluates else "no"),
        "metric_for_best_model": _best_by(settings),
        "greater_is_better": _best_by(settings) not in {None, "loss", "perplexity"},
        "save_total_limit": None,  # rotation follows the seal: see training/checkpoint.py
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and world.size > 1 else None,
        "ddp_timeout": settings.process_group_timeout,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": not on_cpu,
        "deepspeed": deepspeed,
        # ZeRO-3 frees a weight after its forward; only the reentrant way fetches it again when it recomputes
        checkpointing: settings.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": _stage(deepspeed) == 3},
        "report_to": chosen_trackers(settings.report_to),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "average_tokens_across_devices": True,
        "prediction_loss_only": True,
        "log_level": "error",
        **settings.training_args,
    }
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise SettingsError(f"training settings: {' '.join(str(error).split())}") from error


def _on_cuda(settings: TrainSettings, device: Any) -> dict[str, Any]:
    """What a GPU does as well faster: an optimizer step in one kernel, and fp32 products in TF32 where it can."""
    import torch

    has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
    return {
        "optim": "adamw_torch_fused" if settings.optim == "adamw_torch" else settings.optim,
        "tf32": has_tf32 if settings.tf32 is None else settings.tf32,
    }


def _best_by(settings: TrainSettings) -> str | None:
    """The figure that says which checkpoint is best; None: the last one is what counts."""
    return settings.metric_for_best_model or ("loss" if settings.early_stopping_patience else None)


def _stage(deepspeed: dict[str, Any] | None) -> int:
    return int((deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def _evaluation(state: Any, step: int | None) -> dict[str, float]:
    """The held-out figures of a step (None: the last ones)."""
    for line in reversed(state.log_history):
        if "eval_loss" in line and step in (None, line["step"]):
            return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    return {}


def _samples(settings: TrainSettings, run: Run, examples: Cache, tokenizer: Any, layout: Any) -> Any:
    """The callback that replies to a few evenly spread examples."""
    from t5tune.training.evaluation import spread
    from t5tune.training.samples import SampleReplies

    chosen = [examples[index] for index in spread(len(examples), settings.report_samples)]
    return SampleReplies(run.folder, chosen, tokenizer, layout.answer_end, settings.per_device_eval_batch_size)


def _finish(run: Run, settings: TrainSettings, cache: Cache, state: Any, result: Trained, step: int) -> None:
    """Put the adapter of a step's checkpoint at the top of the run folder, the report of the run beside it, then
    the result that says it is over.
    """
    from t5tune.report_page import write_report

    last = run.folder / f"checkpoint-{step}"
    for file in sorted(last.iterdir()):
        if file.name.startswith(RESULTS):
            shutil.copyfile(file, run.folder / file.name)
    state.save_to_json(str(run.folder / "trainer_state.json"))
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(result).items()}
    write_report(run.folder, settings, values, cache.lengths())
    write_json(run.folder / RESULT, values)


@contextmanager
def _process_group(world: World, settings: TrainSettings, report: Report) -> Iterator[Any]:
    """Choose the device and, where there are several processes or DeepSpeed, be in their group for a while."""
    device = choose_device(settings.use_cpu or settings.num_processes is not None, world.local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=settings.process_group_timeout)
    environment = dict(os.environ)
    import torch.distributed as dist

    failed = True
    try:
        if world.launched:
            os.environ.update(world.environment())
        if settings.deepspeed is not None:
            if not world.launched:
                _meet_oneself()
            # it announces the op that it compiles on stdout
            with redirect_stdout(io.StringIO()):
                import deepspeed

                if device.type == "cpu" and not has_compiler():
                    # its sums through shared memory are compiled at first use; without them gloo sums
                    deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
                    report(Note("no C++ compiler here: DeepSpeed's ranks talk by gloo alone"))
                deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        elif world.size > 1:
            dist.init_process_group(backend, timeout=timeout)
        try:
            yield device
        except Stopped:  # all ranks leave together
            failed = False
            raise
        failed = False
    finally:
        # Left in order, or torchrun restarts a job that has finished. But a rank that failed among others goes
        # at once: they may be waiting in a collective, and would hold it here.
        if dist.is_available() and dist.is_initialized() and not (failed and world.size > 1):
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def _meet_oneself() -> None:
    """DeepSpeed wants a rendezvous even for a process that is alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | address)
