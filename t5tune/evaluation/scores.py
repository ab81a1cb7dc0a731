"""The scores of an evaluation's outcome, and the file with a line for each prediction.

compute_scores(chosen, outcome, predictions, ["exact_match"])    # {"loss": 0.31, …, "exact_match": 62.5}
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t5tune.custom_metrics import compute_custom_metrics
from t5tune.data.tokens.tokenizer import decode_prediction, decode_reference
from t5tune.errors import SettingsError
from t5tune.evaluation.examples import EvaluationSet
from t5tune.evaluation.scoring import Losses
from t5tune.label_metrics import ALL, LabelTable, score_labels
from t5tune.metrics import choose_metrics, has_label_metrics, score, score_one
from t5tune.progress import Note, Report


@dataclass(frozen=True)
class Outcome:
    """A model's loss and the ids of its prediction for each example.

    Args:
        num_cut_off: the number of predictions that reached the maximum length.
    """

    losses: Losses
    predicted_ids: list[list[int]]
    num_cut_off: int

    def decode(self, chosen: EvaluationSet) -> list[str]:
        """Decode the predictions."""
        pairs = zip(self.predicted_ids, chosen.answer_ends, strict=True)
        return [
            decode_prediction(chosen.tokenizer, ids, end, index in chosen.raw_texts)
            for index, (ids, end) in enumerate(pairs)
        ]


def write_predictions(
    path: Path,
    chosen: EvaluationSet,
    metrics: Sequence[str],
    outcomes: Sequence[Outcome],
    predictions: Sequence[Sequence[str]],
) -> None:
    """Write a line of JSON for each example.

    Args:
        outcomes, predictions: the model's, and the base's if it was evaluated.
    """
    names = {index: name for name, indices in chosen.datasets for index in indices}
    with open(path, "w", encoding="utf-8") as file:
        for index, (example, target) in enumerate(zip(chosen.examples, chosen.targets, strict=True)):
            prediction, *of_base = (texts[index] for texts in predictions)
            losses = (outcome.losses for outcome in outcomes)
            loss, *loss_of_base = (round(each.sums[index] / each.tokens[index], 6) for each in losses)
            line = {
                **({"dataset": dataset} if (dataset := names.get(index)) is not None else {}),
                "source": decode_reference(chosen.tokenizer, example.source_S, "", index in chosen.raw_texts),
                "target": target,
                "prediction": prediction,
                "loss": loss,
                **score_one(prediction, target, metrics),
            }
            if of_base:
                line |= {"base_prediction": of_base[0], "base_loss": loss_of_base[0]}
            if chosen.prompts and (prompt := chosen.prompts[index]) is not None:
                line["prompt"] = prompt
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def compute_scores(
    chosen: EvaluationSet, outcome: Outcome, predictions: Sequence[str], metrics: Sequence[str]
) -> dict[str, float]:
    """Compute the built-in metrics."""
    losses = _compute_losses(outcome.losses, chosen, range(len(predictions)))
    return losses | score(list(predictions), chosen.targets, list(metrics))


def _compute_losses(losses: Losses, chosen: EvaluationSet, indices: range) -> dict[str, float]:
    found = {"loss": round(losses.mean, 6), "perplexity": round(math.exp(min(losses.mean, 700.0)), 4)}
    if chosen.raw_texts.isdisjoint(indices):
        characters = sum(len(chosen.targets[index]) for index in indices)
        found["bits_per_character"] = round(sum(losses.sums) / math.log(2) / characters, 6)
    return found


def tabulate_labels(
    chosen: EvaluationSet, predictions: Sequence[str], scores: Mapping[str, Mapping[str, float]]
) -> dict[str, LabelTable]:
    """Tabulate the predicted labels of each dataset whose scores contain label metrics."""
    parts = {ALL: range(len(predictions)), **dict(chosen.datasets)}
    return {
        name: score_labels(*([texts[index] for index in parts[name]] for texts in (predictions, chosen.targets)))[1]
        for name, values in scores.items()
        if has_label_metrics(values)
    }


def score_datasets(
    chosen: EvaluationSet,
    names: Sequence[str] | None,
    functions: list[str],
    outcomes: Sequence[Outcome],
    predictions: Sequence[Sequence[str]],
    report: Report,
) -> dict[str, dict[str, float]] | None:
    """Compute the named metrics that fit the targets of each dataset (None: all), if there are several datasets.

    Custom metrics that aren't finite are left out: a dataset's examples may be too few, or too similar.
    """
    found: dict[str, dict[str, float]] = {}
    for dataset, indices in chosen.datasets:
        targets = [chosen.targets[index] for index in indices]
        fitting = [each for each in choose_metrics(None, targets) if names is None or each in names]
        values: dict[str, float] = {"examples": len(targets)}
        for prefix, outcome, texts in zip(("", "base_"), outcomes, predictions, strict=False):
            selected = [texts[index] for index in indices]
            losses = _compute_losses(outcome.losses.select(indices), chosen, indices)
            scores = losses | score(selected, targets, fitting)
            try:
                custom = compute_custom_metrics(functions, selected, targets, allow_non_finite=True)
            except SettingsError as error:
                raise SettingsError(
                    *(f"dataset {dataset}: {each}" for each in error.problems), hint=error.hint
                ) from error
            for metric in (metric for metric, value in custom.items() if not math.isfinite(value)):
                text = f"metric: the scores of dataset {dataset} omit {prefix}{metric}, which is {custom[metric]}"
                report(Note(text, warning=True))
            scores |= {metric: value for metric, value in custom.items() if math.isfinite(value)}
            values |= {prefix + metric: value for metric, value in scores.items()}
        found[dataset] = values
    return found or None
