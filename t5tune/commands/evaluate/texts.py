"""Evaluate a model that writes texts: its loss, and scores of generated predictions or of choices."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from t5tune.commands.evaluate.result import (
    PREDICTIONS_FILE,
    SCORES,
    EvaluateResult,
    choose_folder,
    inherit_settings,
    write_given_settings,
    write_scores,
)
from t5tune.constraints import Constraint
from t5tune.constraints.answers import AnswerMatcher
from t5tune.constraints.reading import read_constraint
from t5tune.custom_metrics import compute_custom_metrics, try_custom_metrics
from t5tune.data.tokens.encoding import Example
from t5tune.errors import ModelError, SettingsError
from t5tune.evaluation.constraints import check_constraint
from t5tune.evaluation.examples import (
    EvaluationPlan,
    EvaluationSet,
    load_evaluation_set,
)
from t5tune.evaluation.scores import Outcome, compute_scores, score_datasets, tabulate_labels, write_predictions
from t5tune.evaluation.scoring import Losses, find_max_target_length, generate_predictions, measure_targets
from t5tune.file_names import REPORT_FILE
from t5tune.inference.generation import Decoding, find_stop_ids
from t5tune.inference.loading import (
    LoadedModel,
    make_compiler,
)
from t5tune.inference.target_scores import CandidateList, score_targets
from t5tune.io.atomic import (
    write_folder_atomically,
)
from t5tune.label_metrics import ALL, LABEL_METRICS
from t5tune.metrics import choose_metrics, describe_signatures
from t5tune.model.device import use_gpu_kernels
from t5tune.progress import Note, Report
from t5tune.reports.page import render_labels, write_page
from t5tune.runs.data import find_held_out, find_trained_keys
from t5tune.settings import EvaluateSettings
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.training.attention_choice import set_up_evaluation


@dataclass(frozen=True)
class TextWork:
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
class TextTask:
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

    def make_work(self, num_ranks: int) -> TextWork:
        chosen, settings = self.chosen, self.settings
        examples = chosen.add_choices(self.answers) if settings.choices else chosen.examples
        examples = examples if num_ranks == 1 else list(examples)  # to be sent to all ranks
        eos, pad = chosen.tokenizer.eos_token_id, chosen.tokenizer.pad_token_id
        decodings, num_replies = {}, 1 if settings.choices_file is None else settings.num_beams
        for part in [indices for _, indices in chosen.datasets] or [range(len(chosen.targets))]:
            longest = settings.max_new_tokens or find_max_target_length(chosen.examples[index] for index in part)
            decoding = Decoding(eos, pad, longest, settings.num_beams, num_replies, keeps_stop=True)
            decodings[part] = (decoding, chosen.templates[part[0]].answer_suffix)
        return TextWork(examples, decodings, self.constraint)

    def select_base(self) -> "TextTask":
        """Return the base's task, with the examples encoded by its tokenizer."""
        assert self.chosen.base is not None, "compare_base is set"
        return replace(self, chosen=self.chosen.base, constraint=self.base_constraint)

    def count_partial_targets(self) -> int:
        """Count the targets that are truncated, or contain characters that the vocabulary lacks."""
        chosen, end, unknown = self.chosen, self.chosen.tokenizer.eos_token_id, self.chosen.tokenizer.unk_token_id
        texts = (example.target_T for index, example in enumerate(chosen.examples) if index not in chosen.raw_texts)
        return sum(target[-1] != end or unknown in target for target in texts)


def read_task(
    settings: EvaluateSettings, datasets: Sequence[DatasetSpec], folder: Path, loaded: LoadedModel, report: Report
) -> TextTask:
    """Read the data, and check that the scores can be computed. Only rank 0 does."""
    add_tokens = settings.add_tokens if "add_tokens" in settings.model_fields_set else None
    plan = EvaluationPlan(
        datasets=datasets,
        base=settings.select_part(BaseModelSettings),
        add_tokens=add_tokens,
        compares_base=settings.compare_base,
        find_held_out=partial(find_held_out, loaded.adapter or loaded.base),
        trained_keys=find_trained_keys(loaded.adapter or loaded.base),
    )
    chosen = load_evaluation_set(plan, loaded, report)
    if settings.choices and settings.metrics is None:
        settings = settings.model_copy(update={"metrics": [*LABEL_METRICS]})
    names = choose_metrics(settings.metrics, chosen.targets)
    try_custom_metrics(settings.metric or [], chosen.targets)
    settings, is_prepared = inherit_settings(settings, datasets)
    constraint = read_constraint(settings, loaded.json_schema)
    answers = [] if constraint is None else constraint.answers
    of_base = check_constraint(constraint, chosen, loaded, report)
    return TextTask(settings, is_prepared, folder, chosen, list(names), constraint, of_base, answers)


def finish(
    task: TextTask | None, tuned: Outcome, base: Outcome | None, started: float, report: Report
) -> EvaluateResult:
    """Compute the scores, and write the results. Only rank 0 does."""
    assert task is not None, "only rank 0 finishes"
    outcomes = [tuned] if base is None else [tuned, base]
    tasks = [task] if base is None else [task, task.select_base()]
    by_mean, pairs = task.settings.choices_by == "mean", zip(tasks, outcomes, strict=True)
    predictions = [outcome.predict(each.chosen, task.answers, by_mean) for each, outcome in pairs]
    task = replace(task, folder=choose_folder(task.settings))  # a later evaluation may have taken the folder
    with write_folder_atomically(task.folder, task.settings.overwrite) as staged:
        write_predictions(staged / PREDICTIONS_FILE, task.chosen, task.names, outcomes, predictions)
        write_given_settings(staged, task.settings, task.is_prepared)
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
    fixed = ("loss", *SCORES)
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
    write_scores(result, task.settings, task.is_prepared)
    return result


def run_model(settings: EvaluateSettings, loaded: LoadedModel, work: TextWork, report: Report) -> Outcome:
    """Generate a model's predictions, and measure its losses and scores. Call on every rank."""
    model, examples = loaded.model, work.examples
    with use_gpu_kernels(model.device):
        collator = set_up_evaluation(loaded, report)
        replies = [] if settings.choices else _generate_replies(settings, loaded, work, report)
        if replies:  # scored with the targets, so that a source is encoded once for both
            examples = CandidateList(work.examples, [[best] for best, *_ in replies])
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
    settings: EvaluateSettings, loaded: LoadedModel, work: TextWork, report: Report
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
def _explain_failures(task: TextTask) -> Iterator[None]:
    """Say in the errors of custom metrics that the predictions are in the folder."""
    try:
        yield
    except SettingsError as error:
        hint = f"{error.hint}; " if error.hint else ""
        replace = " (add --overwrite to replace them)" if task.settings.output_dir or task.settings.overwrite else ""
        hint += f"the predictions are in {task.folder / PREDICTIONS_FILE}{replace}"
        raise SettingsError(*error.problems, hint=hint) from error
