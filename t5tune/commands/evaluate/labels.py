"""Evaluate a model that predicts labels with its encoder: its loss, and scores of the predicted labels or numbers."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from t5tune.commands.evaluate.result import (
    PREDICTIONS_FILE,
    EvaluateResult,
    choose_folder,
    inherit_settings,
    write_given_settings,
    write_scores,
)
from t5tune.data.tokens.encoding import LabeledExample
from t5tune.data.tokens.tokenizer import decode_reference
from t5tune.distributed.collectives import broadcast_from_rank_0, run_on_rank_0, run_only_on_rank_0
from t5tune.distributed.world import World
from t5tune.evaluation.examples import EvaluationPlan, load_labeled_examples
from t5tune.evaluation.labels import LabelOutcome, measure_labels
from t5tune.file_names import REPORT_FILE
from t5tune.inference.loading import LoadedModel
from t5tune.io.atomic import write_folder_atomically
from t5tune.label_metrics import ALL
from t5tune.model.device import use_gpu_kernels
from t5tune.progress import Report
from t5tune.reports.page import render_labels, write_page
from t5tune.runs.data import find_held_out, find_trained_keys
from t5tune.settings import EvaluateSettings
from t5tune.settings.dataset_spec import DatasetSpec
from t5tune.settings.groups.base import BaseModelSettings
from t5tune.training.attention_choice import set_up_evaluation


@dataclass(frozen=True)
class LabelData:
    """The examples, which only rank 0 reads.

    Args:
        settings: with the values that were taken from training.
        is_prepared: whether all data is in token caches.
        datasets: the name and the examples of each dataset, if there are several.
    """

    settings: EvaluateSettings
    is_prepared: bool
    examples: Sequence[LabeledExample]
    datasets: list[tuple[str, range]]


def evaluate_labels(
    settings: EvaluateSettings,
    datasets: Sequence[DatasetSpec],
    loaded: LoadedModel,
    world: World,
    started: float,
    report: Report,
) -> EvaluateResult:
    """Predict the labels of all examples, and write the results. Call on every rank."""
    data = run_only_on_rank_0(world, lambda: _read_data(settings, datasets, loaded, report))
    examples = broadcast_from_rank_0(None if data is None else list(data.examples))
    assert examples is not None
    model, batch_size = loaded.model, settings.per_device_eval_batch_size
    with use_gpu_kernels(model.device):
        collator = set_up_evaluation(loaded, report)
        outcome = measure_labels(model, examples, collator, batch_size, report)
    return run_on_rank_0(world, lambda: _finish(data, outcome, loaded, started))


def _read_data(
    settings: EvaluateSettings, datasets: Sequence[DatasetSpec], loaded: LoadedModel, report: Report
) -> LabelData:
    plan = EvaluationPlan(
        datasets=datasets,
        base=settings.select_part(BaseModelSettings),
        add_tokens=None,
        compares_base=False,
        find_held_out=partial(find_held_out, loaded.adapter or loaded.base),
        trained_keys=find_trained_keys(loaded.adapter or loaded.base),
    )
    examples, ranges = load_labeled_examples(plan, loaded, report)
    return LabelData(*inherit_settings(settings, datasets), examples, ranges)


def _finish(data: LabelData | None, outcome: LabelOutcome, loaded: LoadedModel, started: float) -> EvaluateResult:
    assert data is not None, "only rank 0 finishes"
    parts = {ALL: range(len(data.examples)), **dict(data.datasets)}
    scored = {name: outcome.score(indices) for name, indices in parts.items()}
    scores, tables = scored[ALL][0], {name: table for name, (_, table) in scored.items() if table is not None}
    folder = choose_folder(data.settings)
    with write_folder_atomically(folder, data.settings.overwrite) as staged:
        _write_predictions(staged / PREDICTIONS_FILE, data, outcome, loaded)
        write_given_settings(staged, data.settings, data.is_prepared)
        if tables:
            write_page(staged / REPORT_FILE, str(folder), render_labels(tables))
    by_dataset = {name: {"examples": len(indices), **scored[name][0]} for name, indices in data.datasets}
    result = EvaluateResult(
        predictions=folder / PREDICTIONS_FILE,
        examples=len(data.examples),
        **scores,  # type: ignore[arg-type]
        seconds=round(time.monotonic() - started, 3),
        datasets=by_dataset or None,
        labels=tables or None,
    )
    write_scores(result, data.settings, data.is_prepared)
    return result


def _write_predictions(path: Path, data: LabelData, outcome: LabelOutcome, loaded: LoadedModel) -> None:
    """Write a line of JSON for each example; of a text with labeled words, for these in order."""
    names = {index: name for name, indices in data.datasets for index in indices}
    with open(path, "w", encoding="utf-8") as file:
        for index, example in enumerate(data.examples):
            line = {
                **({"dataset": dataset} if (dataset := names.get(index)) is not None else {}),
                "source": decode_reference(loaded.tokenizer, example.source_S, ""),
                "target": outcome.name_labels(index),
                **outcome.predict(index),
                "loss": round(float(outcome.measure_losses(index).mean()), 6),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
