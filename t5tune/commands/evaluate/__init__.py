"""`t5tune evaluate`: loss, perplexity and scores of generated predictions against the targets of examples.

    result = evaluate(EvaluateSettings(model_name_or_path="run", data_path="heldout.jsonl", output_dir="scores"))
    result.exact_match, result.predictions

Runs in the current process: alone, or as one rank under torchrun, the deepspeed launcher or `--num-gpus`.
Then each rank loads the model and computes its share; rank 0 alone reads the data, writes and computes the scores.
"""

import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from t5tune.checkpoints.training_data import read_label_task, read_training_data
from t5tune.commands.evaluate.labels import evaluate_labels
from t5tune.commands.evaluate.result import EXAMPLE_SETTINGS, EvaluateResult, choose_folder
from t5tune.commands.evaluate.texts import finish, read_task, run_model
from t5tune.constraints.reading import read_constraint
from t5tune.custom_metrics import load_custom_metric
from t5tune.data.caches.prepared import find_caches, is_prepared
from t5tune.distributed.collectives import (
    broadcast_from_rank_0,
    report_lost_ranks,
    run_on_rank_0,
    run_only_on_rank_0,
)
from t5tune.distributed.process_group import join_process_group
from t5tune.distributed.signals import handle_signals
from t5tune.distributed.watch import watch_ranks
from t5tune.distributed.world import World
from t5tune.errors import SettingsError
from t5tune.inference.loading import (
    LoadedModel,
    find_base_and_adapter,
    load_for_inference,
    pin_to_commits,
    read_model_files,
    select_base,
)
from t5tune.inference.precision import read_trained_precision, resolve_precision, select_precision
from t5tune.io.atomic import (
    check_overwrite,
    check_replaceable,
)
from t5tune.model.device import explain_out_of_memory, manage_memory_for_loading
from t5tune.preparing.resolve_datasets import resolve_datasets
from t5tune.progress import Note, Report, silent, without_notes
from t5tune.runs.checkpoints import replace_stopped_runs
from t5tune.runs.checks import check_starts_no_processes
from t5tune.settings import EvaluateSettings
from t5tune.settings.calls import refuse_text_settings
from t5tune.settings.dataset_spec import DatasetSpec, list_shared
from t5tune.settings.packaged_templates import read_zero3_config

WHEN_INTERRUPTED = "before the evaluation was complete"


def evaluate(settings: EvaluateSettings, report: Report = silent) -> EvaluateResult:
    """Generate a prediction for each example's source, and compare the predictions with the targets.

    Raises:
        DataError: the data can't be used, or the token cache was prepared with a different tokenizer.
        ModelError, CheckpointError: the base or the adapter can't be used, or its loss isn't finite.
        SettingsError: a custom metric can't be computed, or there is no base to compare with.
        RankLost: a different rank died or doesn't answer.
        Stopped: a signal asked a rank to stop.
    """
    started = time.monotonic()
    world = World.from_environment()
    check_starts_no_processes(settings, "evaluate", world)
    if settings.deepspeed is not None:
        read_zero3_config(settings.deepspeed)  # raises before anything is loaded
    report = report if world.rank == 0 else silent
    with ExitStack() as stack:
        if world.launched:  # else Ctrl-C raises KeyboardInterrupt, as in other commands
            stop = stack.enter_context(handle_signals(report))
            # outside of the process group: a rank that is interrupted must not wait for other ranks
            stack.enter_context(stop.interruptible(WHEN_INTERRUPTED))
        chosen = "cpu" if settings.use_cpu else settings.device
        device = stack.enter_context(join_process_group(world, settings, chosen, report))
        stack.enter_context(watch_ranks(world, settings.process_group_timeout))
        stack.enter_context(report_lost_ranks(world))
        stack.enter_context(_explain_out_of_memory(settings))
        folder, settings, pinned, datasets = run_on_rank_0(world, lambda: _prepare(settings, device, report))
        loaded = _load_model(pinned, device, report)
        if loaded.model.label_task is not None:
            return evaluate_labels(settings, datasets, loaded, world, started, report)
        task = run_only_on_rank_0(world, lambda: read_task(settings, datasets, folder, loaded, report))
        work = broadcast_from_rank_0(None if task is None else task.make_work(world.size))
        assert work is not None
        tuned, base = run_model(settings, loaded, work, report), None
        if settings.compare_base:
            base_settings = select_base(settings, loaded)
            report(Note("evaluating the base without the adapter on the same texts"))
            del loaded  # so that only one model is in memory
            gc.collect()
            loaded = _load_model(base_settings, device, report)
            work = broadcast_from_rank_0(None if task is None else task.select_base().make_work(world.size))
            assert work is not None
            base = run_model(base_settings, loaded, work, report)
        return run_on_rank_0(world, lambda: finish(task, tuned, base, started, report))


def _explain_out_of_memory(settings: EvaluateSettings) -> AbstractContextManager[None]:
    size = settings.per_device_eval_batch_size
    batch = "" if size is None else f" with per_device_eval_batch_size {size}"
    return explain_out_of_memory(
        f"evaluating{batch}",
        "--per-device-eval-batch-size 1 gives the same scores; --q-lora, if it isn't set yet, loads the base in 4 bits",
    )


def _prepare(
    settings: EvaluateSettings, device: Any, report: Report
) -> tuple[Path, EvaluateSettings, EvaluateSettings, Sequence[DatasetSpec]]:
    """Check what can be checked before the model is loaded.

    Returns:
        The output folder; the settings with the model's folder, its precision and its quantization; the same with the
        commits of models on the Hub, so that every rank loads the same; how the data is read.
    """
    folder = choose_folder(settings)
    scripts = [function.rpartition(":")[0] for function in settings.metric or []]
    adapters = [] if settings.adapter is None else [str(settings.adapter)]
    read = [settings.model_name_or_path, *adapters, *settings.data_path, *scripts]
    check_replaceable(folder, settings.overwrite, read)
    for function in settings.metric or []:
        load_custom_metric(function)
    read_constraint(settings, None)  # raises before the model is loaded
    settings = replace_stopped_runs(settings, report)
    base, adapter = find_base_and_adapter(settings, without_notes(report))  # loading reports the notes later
    if read_label_task(adapter or base) is not None:
        refuse_text_settings(settings)
    if settings.overwrite:
        caches = [cache for path in map(Path, settings.data_path) if is_prepared(path) for cache in find_caches(path)]
        check_overwrite(folder, [base, *caches] if adapter is None else [base, adapter, *caches])
    if settings.compare_base and adapter is None:
        raise SettingsError(
            f"compare_base: {settings.model_name_or_path} is a whole model, not an adapter, so there is no base to "
            "compare it with",
            hint="give the run or the adapter that it was merged from, or evaluate its base separately",
        )
    datasets = _resolve_datasets(settings, base, adapter, report)
    trained = read_trained_precision(base, adapter)
    precision = resolve_precision(select_precision(settings), trained, device, report)
    settings = settings.model_copy(update=precision.to_settings())
    return folder, settings, pin_to_commits(settings, base, adapter), datasets


def _resolve_datasets(
    settings: EvaluateSettings, base: Path, adapter: Path | None, report: Report
) -> Sequence[DatasetSpec]:
    given = EXAMPLE_SETTINGS & settings.model_fields_set
    return resolve_datasets(
        settings.list_datasets(),
        list_shared(settings),
        setting="data_path" if settings.data is None else "data",
        recorded=read_training_data(adapter or base),
        must_match={name: getattr(settings, name) for name in given},
        find_template=lambda name: read_model_files(base, adapter).find_template(name),
        allows_several=True,
        report=report,
    )


def _load_model(settings: EvaluateSettings, device: Any, report: Report) -> LoadedModel:
    zero3 = None if settings.deepspeed is None else read_zero3_config(settings.deepspeed)
    with manage_memory_for_loading(device, is_partitioned=zero3 is not None):
        return load_for_inference(settings, report, device, zero3)
