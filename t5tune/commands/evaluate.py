"""`t5tune evaluate`: loss, perplexity and scores of generated predictions against the targets of examples.

    result = evaluate(EvaluateSettings(model_name_or_path="run", data_path="heldout.jsonl", output_dir="scores"))
    result.exact_match, result.predictions

Runs in the current process: alone, or as one rank under torchrun, the deepspeed launcher or `--num-gpus`.
Then each rank loads the model and computes its share; rank 0 alone reads the data, writes and computes the scores.
"""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.checkpoints.training_data import read_training_data
from t5tune.constraints import Constraint
from t5tune.constraints.answers import AnswerMatcher
from t5tune.constraints.reading import read_constraint
from t5tune.custom_metrics import compute_custom_metrics, load_custom_metric, try_custom_metrics
from t5tune.data.caches.prepared import find_caches, is_prepared
from t5tune.data.reading.remote_files import hide_data_queries
from t5tune.data.tokens.encoding import Example
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
from t5tune.errors import ModelError, SettingsError
from t5tune.evaluation.constraints import check_constraint
from t5tune.evaluation.examples import (
    EvaluationPlan,
    EvaluationSet,
    load_evaluation_set,
)
from t5tune.evaluation.scores import Outcome, compute_scores, score_datasets, tabulate_labels, write_predictions
from t5tune.evaluation.scoring import Losses, find_max_target_length, generate_predictions, measure_targets
from t5tune.file_names import REPORT_FILE, SCORES_FILE
from t5tune.inference.generation import Decoding, find_stop_ids
from t5tune.inference.loading import (
    LoadedModel,
    find_base_and_adapter,
    load_for_inference,
    make_compiler,
    pin_to_commits,
    read_model_files,
    select_base,
)
from t5tune.inference.precision import read_trained_precision, resolve_precision, select_precision
from t5tune.inference.target_scores import Candidates, score_targets, set_up_scoring
from t5tune.io.atomic import (
    check_overwrite,
    check_replaceable,
    find_unused_folder,
    write_folder_atomically,
    write_json,
)
from t5tune.label_metrics import ALL, LABEL_METRICS, LabelTable
from t5tune.metrics import METRICS, choose_metrics, describe_signatures
from t5tune.model.device import explain_out_of_memory, manage_memory_for_loading, use_gpu_kernels
from t5tune.preparing.resolve_datasets import resolve_datasets
from t5tune.progress import Note, Report, silent, without_notes
from t5tune.reports.page import render_labels, write_page
from t5tune.runs.checkpoints import replace_stopped_runs
from t5tune.runs.checks import check_starts_no_processes
from t5tune.runs.data import find_held_out
from t5tune.settings import EvaluateSettings, write_settings
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.dataset_spec import SHARED, DatasetSpec, list_shared
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.settings.packaged_templates import read_zero3_config

PREDICTIONS_FILE = "predictions.jsonl"
ALWAYS_SAVED = ("model_name_or_path", "adapter", "data_path", "max_new_tokens", "num_beams", "bf16", "q_lora")
"""Settings that scores.json always contains, even if they have their default values."""
EXAMPLE_SETTINGS = {*select_settings(EvaluateSettings, Affects.CACHE), "conversation_template"} - {"num_data"}
"""Settings that determine the examples in a token cache, except those that evaluate can apply to a cache."""
WHEN_INTERRUPTED = "before the evaluation was complete"


@dataclass(frozen=True)
class EvaluateResult:
    """The metrics: loss in nats per target token, scores from 0 to 100, time in seconds.

    Args:
        bits_per_character: the loss of the whole targets per character of their texts, in bits, to compare models
            with different tokenizers; None if spans of raw text were masked.
        exact_match, …, mcc: None: not among the chosen metrics, or no target is JSON or a label.
        ece: expected calibration error of scored choices.
        recall: recall_at_K -> the percentage of targets among the best K answers of choices_file.
        custom_metrics: the results of custom functions.
        base: the same metrics of the base without the adapter, by name; None without compare_base.
        datasets: the number of examples and the same metrics of each dataset, if there are several; the
            base's metrics have `base_` before their names.
        cut_off: the number of predictions that reached max_new_tokens; under a constraint, they are incomplete.
        signatures: sacreBLEU's signature of BLEU, chrF and chrF++, by name.
        labels: "all" and each dataset, if there are several, whose targets are labels -> how each label was predicted.
    """

    predictions: Path
    examples: int
    loss: float
    perplexity: float
    bits_per_character: float | None
    exact_match: float | None
    rouge1: float | None
    rouge2: float | None
    rougeL: float | None
    bleu: float | None
    chrf: float | None
    chrf_pp: float | None
    valid_json: float | None
    field_f1: float | None
    accuracy: float | None
    macro_f1: float | None
    mcc: float | None
    ece: float | None
    recall: dict[str, float] | None
    custom_metrics: dict[str, float]
    base: dict[str, float] | None
    seconds: float
    cut_off: int
    signatures: dict[str, str]
    datasets: dict[str, dict[str, float]] | None = None
    labels: dict[str, LabelTable] | None = None


@dataclass(frozen=True)
class _Work:
    """The input of every rank.

    Args:
        examples: if choices are scored, with the choices as further targets.
        decodings: how to generate the predictions, by the examples of each dataset, and the text after an answer.
        constraint: of all predictions.
    """

    examples: Sequence[Example]
    decodings: dict[range, tuple[Decoding, str]]
    constraint: Constraint | None


@dataclass(frozen=True)
class _Task:
    """The data and the output folder, which only rank 0 has.

    Args:
        settings: with the values that were taken from training.
        is_prepared: whether all data is in token caches.
        names: the built-in metrics to compute.
        constraint: of all predictions.
        base_constraint: of the base's predictions; None: they are free, perhaps because its tokenizer can't follow it.
        answers: the scored choices, or the only possible predictions; empty: free predictions.
    """

    settings: EvaluateSettings
    is_prepared: bool
    folder: Path
    chosen: EvaluationSet
    names: list[str]
    constraint: Constraint | None
    base_constraint: Constraint | None
    answers: list[str]

    def make_work(self, num_ranks: int) -> _Work:
        chosen, settings = self.chosen, self.settings
        examples = chosen.examples if num_ranks == 1 else list(chosen.examples)  # to be sent to the other ranks
        if settings.choices:
            examples = chosen.add_choices(self.answers)
        eos, pad = chosen.tokenizer.eos_token_id, chosen.tokenizer.pad_token_id
        decodings, num_replies = {}, 1 if settings.choices_file is None else settings.num_beams
        for part in [indices for _, indices in chosen.datasets] or [range(len(chosen.targets))]:
            longest = settings.max_new_tokens or find_max_target_length([chosen.examples[index] for index in part])
            decoding = Decoding(eos, pad, longest, settings.num_beams, num_replies, keeps_stop=True)
            decodings[part] = (decoding, chosen.templates[part[0]].answer_suffix)
        return _Work(examples, decodings, self.constraint)

    def select_base(self) -> "_Task":
        """Return the base's task, with the examples encoded by its tokenizer."""
        assert self.chosen.base is not None, "compare_base is set"
        return replace(self, chosen=self.chosen.base, constraint=self.base_constraint)

    def count_partial_targets(self) -> int:
        """Count the targets that are truncated, or contain characters that the vocabulary lacks."""
        chosen, end, unknown = self.chosen, self.chosen.tokenizer.eos_token_id, self.chosen.tokenizer.unk_token_id
        texts = (example.target_T for index, example in enumerate(chosen.examples) if index not in chosen.raw_texts)
        return sum(target[-1] != end or unknown in target for target in texts)


def evaluate(settings: EvaluateSettings, report: Report = silent) -> EvaluateResult:
    """Generate a prediction for each example's source, and compare the predictions with the targets.

    Raises:
        DataError: the data can't be used, or the token cache was prepared with a different tokenizer.
        ModelError, CheckpointError: the base or the adapter can't be used, or its loss isn't finite.
        SettingsError: a custom metric can't be computed, or there is no base to compare with.
        RankLost: another rank died or doesn't answer.
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
        task = run_only_on_rank_0(world, lambda: _read_task(settings, datasets, folder, loaded, report))
        work = broadcast_from_rank_0(None if task is None else task.make_work(world.size))
        assert work is not None
        tuned, base = _run_model(settings, loaded, work, report), None
        if settings.compare_base:
            base_settings = select_base(settings, loaded)
            report(Note("evaluating the base without the adapter on the same texts"))
            del loaded  # so that only one model is in memory
            gc.collect()
            loaded = _load_model(base_settings, device, report)
            work = broadcast_from_rank_0(None if task is None else task.select_base().make_work(world.size))
            assert work is not None
            base = _run_model(base_settings, loaded, work, report)
        return run_on_rank_0(world, lambda: _finish(task, tuned, base, started, report))


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
    folder = _choose_folder(settings)
    scripts = [function.rpartition(":")[0] for function in settings.metric or []]
    adapters = [] if settings.adapter is None else [str(settings.adapter)]
    read = [settings.model_name_or_path, *adapters, *settings.data_path, *scripts]
    check_replaceable(folder, settings.overwrite, read)
    for function in settings.metric or []:
        load_custom_metric(function)
    read_constraint(settings, None)  # raises before the model is loaded
    settings = replace_stopped_runs(settings, report)
    base, adapter = find_base_and_adapter(settings, without_notes(report))  # loading reports the notes later
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


def _choose_folder(settings: EvaluateSettings) -> Path:
    default = Path("evaluation")
    return settings.output_dir or (default if settings.overwrite else find_unused_folder(default))


def _load_model(settings: EvaluateSettings, device: Any, report: Report) -> LoadedModel:
    zero3 = None if settings.deepspeed is None else read_zero3_config(settings.deepspeed)
    with manage_memory_for_loading(device, is_partitioned=zero3 is not None):
        return load_for_inference(settings, report, device, zero3)


def _read_task(
    settings: EvaluateSettings, datasets: Sequence[DatasetSpec], folder: Path, loaded: LoadedModel, report: Report
) -> _Task:
    add_tokens = settings.add_tokens if "add_tokens" in settings.model_fields_set else None
    base, held_out = settings.select_part(BaseModelSettings), partial(find_held_out, loaded.adapter or loaded.base)
    plan = EvaluationPlan(datasets, base, add_tokens, settings.compare_base, held_out)
    chosen = load_evaluation_set(plan, loaded, report)
    if settings.choices and settings.metrics is None:
        settings = settings.model_copy(update={"metrics": [*LABEL_METRICS]})
    names = choose_metrics(settings.metrics, chosen.targets)
    try_custom_metrics(settings.metric or [], chosen.targets)
    is_prepared = all(each.cache is not None for each in datasets)
    if settings.data is None and not is_prepared:
        inherited = datasets[0].list_given(SHARED - settings.model_fields_set)
        settings = settings.model_copy(update=inherited)
    constraint = read_constraint(settings, loaded.json_schema)
    answers = [] if constraint is None else constraint.answers
    of_base = check_constraint(constraint, chosen, loaded, report)
    return _Task(settings, is_prepared, folder, chosen, list(names), constraint, of_base, answers)


def _finish(task: _Task | None, tuned: Outcome, base: Outcome | None, started: float, report: Report) -> EvaluateResult:
    assert task is not None, "only rank 0 finishes"
    outcomes = [tuned] if base is None else [tuned, base]
    tasks = [task] if base is None else [task, task.select_base()]
    by_mean, pairs = task.settings.choices_by == "mean", zip(tasks, outcomes, strict=True)
    predictions = [outcome.predict(each.chosen, task.answers, by_mean) for each, outcome in pairs]
    task = replace(task, folder=_choose_folder(task.settings))  # another evaluation may have taken the folder
    with write_folder_atomically(task.folder, task.settings.overwrite) as staged:
        write_predictions(staged / PREDICTIONS_FILE, task.chosen, task.names, outcomes, predictions)
        write_settings(
            staged,
            hide_data_queries(task.settings),
            # token caches have their own values; the defaults would be refused when the file is used again
            leave_out=EXAMPLE_SETTINGS if task.is_prepared else (),
        )
    built_in = [
        compute_scores(task.chosen, outcome, predicted, task.names)
        for outcome, predicted in zip(outcomes, predictions, strict=True)
    ]
    for whose, each in zip(("the model", "the base"), tasks, strict=False):
        if partial := each.count_partial_targets():
            targets = f"{partial:,} of {len(each.chosen.targets):,} targets are truncated or have characters that"
            lost = f"{targets} {whose}'s vocabulary lacks, so it can't be compared between models"
            report(Note(f"{whose}'s bits_per_character: {lost}", warning=True))
    functions = task.settings.metric or []
    with _explain_failures(task):
        texts = [[each["prediction"] for each in predicted] for predicted in predictions]
        custom = [compute_custom_metrics(functions, each, task.chosen.targets) for each in texts]
        by_dataset = score_datasets(task.chosen, task.settings.metrics, functions, outcomes, predictions, report)
    if labels := tabulate_labels(task.chosen, predictions[0], {ALL: built_in[0], **(by_dataset or {})}):
        write_page(task.folder / REPORT_FILE, str(task.folder), render_labels(labels))
    fixed = ("loss", "perplexity", "bits_per_character", *METRICS, "ece")
    result = EvaluateResult(
        predictions=task.folder / PREDICTIONS_FILE,
        examples=len(task.chosen.targets),
        **{name: built_in[0].get(name) for name in fixed},  # type: ignore[arg-type]
        recall={name: value for name, value in built_in[0].items() if name not in fixed} or None,
        custom_metrics=custom[0],
        base=None if base is None else built_in[1] | custom[1],
        seconds=round(time.monotonic() - started, 3),
        cut_off=tuned.num_cut_off,
        signatures=describe_signatures(built_in[0]),
        datasets=by_dataset,
        labels=labels or None,
    )
    values = {**asdict(result), "predictions": str(result.predictions), "settings": _describe_settings(task)}
    write_json(task.folder / SCORES_FILE, values)
    return result


def _describe_settings(task: _Task) -> dict[str, Any]:
    values = hide_data_queries(task.settings).model_dump(mode="json")
    defaults = {name: field.get_default() for name, field in EvaluateSettings.model_fields.items()}
    unused = EXAMPLE_SETTINGS if task.is_prepared else set[str]()
    return {
        name: value
        for name, value in values.items()
        if (name in ALWAYS_SAVED or value != defaults[name]) and name not in unused
    }


def _run_model(settings: EvaluateSettings, loaded: LoadedModel, work: _Work, report: Report) -> Outcome:
    """Generate a model's predictions, and measure its losses and scores. Call on every rank."""
    model, examples = loaded.model, work.examples
    with use_gpu_kernels(model.device):
        replies = [] if settings.choices else _generate_replies(settings, loaded, work, report)
        if replies:  # scored with the targets, so that a source is encoded once for both
            pairs = zip(work.examples, replies, strict=True)
            examples = [Candidates(each.source_S, each.target_T, (np.array(best),)) for each, (best, *_) in pairs]
        collator = set_up_scoring(model, next(iter(work.decodings.values()))[0].pad_token_id)
        batch_size = settings.per_device_eval_batch_size
        scores = measure_targets(model, examples, collator, batch_size, report, measure=score_targets)
    losses = Losses([-target.logprob for target, *_ in scores], [len(each.target_T) for each in work.examples])
    if not math.isfinite(losses.mean):
        problem = f"model_name_or_path: {settings.model_name_or_path}: its loss is {losses.mean}"
        raise ModelError(problem, hint="the checkpoint may be damaged")
    stop_ids = find_stop_ids(model, loaded.tokenizer.eos_token_id)
    num_cut_off = sum(best[-1] not in stop_ids for best, *_ in replies)
    replies = [[ids[:-1] if ids[-1] in stop_ids else ids for ids in each] for each in replies]
    return Outcome(losses, replies, [each[1:] for each in scores], num_cut_off)


def _generate_replies(
    settings: EvaluateSettings, loaded: LoadedModel, work: _Work, report: Report
) -> list[list[list[int]]]:
    """Generate replies to each example, the best first, with the tokens that ended them."""
    batch_size, replies = settings.per_device_eval_batch_size, []
    for part, (decoding, end) in work.decodings.items():
        matcher = None
        if work.constraint is not None:
            matcher = make_compiler(loaded.model, loaded.tokenizer, end).start(work.constraint)
        if isinstance(matcher, AnswerMatcher) and settings.max_new_tokens is None:
            decoding = replace(decoding, max_new_tokens=int(np.diff(matcher.answers.starts).max()))
        examples = [work.examples[index] for index in part] if len(work.decodings) > 1 else work.examples
        replies += generate_predictions(loaded.model, examples, decoding, batch_size, report, constraint=matcher)
    return replies


@contextmanager
def _explain_failures(task: _Task) -> Iterator[None]:
    """Say in the errors of custom metrics that the predictions are in the folder."""
    try:
        yield
    except SettingsError as error:
        hint = f"{error.hint}; " if error.hint else ""
        replace = " (--overwrite replaces them)" if task.settings.output_dir or task.settings.overwrite else ""
        hint += f"the predictions are in {task.folder / PREDICTIONS_FILE}{replace}"
        raise SettingsError(*error.problems, hint=hint) from error
