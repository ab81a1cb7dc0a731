"""The scores of an evaluation's outcome, and the file with a line for each prediction.

predictions = outcome.predict(chosen, answers=[], by_mean=False)
compute_scores(chosen, outcome, predictions, ["exact_match"])    # {"loss": 0.31, …, "exact_match": 62.5}
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t5tune.custom_metrics import compute_custom_metrics
from t5tune.data.tokens.tokenizer import decode_prediction, decode_reference
from t5tune.errors import SettingsError
from t5tune.evaluation.examples import EvaluationSet
from t5tune.evaluation.scoring import Losses
from t5tune.inference.target_scores import TargetScore
from t5tune.label_metrics import ALL, LabelTable, score_labels
from t5tune.metrics import choose_metrics, has_label_metrics, score, score_one
from t5tune.progress import Note, Report

RECALL_CUTOFFS = (1, 5, 10, 20, 50, 100)


Prediction = dict[str, Any]
"""The keys of predictions.jsonl: prediction (its text), logprob (in nats, of the whole text), probability, and the best
answers (ranking), if replies are chosen from a list of answers, or choice_logprobs, if choices are scored."""


@dataclass(frozen=True)
class Outcome:
    """A model's loss and replies for each example, or its scores of the choices.

    Args:
        replies: for each example, the ids of its replies, the best first; empty if choices were scored.
        scores: for each example, of its best reply, or of each choice.
        num_cut_off: the number of best replies that reached the maximum length.
    """

    losses: Losses
    replies: list[list[list[int]]]
    scores: list[tuple[TargetScore, ...]]
    num_cut_off: int

    def predict(self, chosen: EvaluationSet, answers: Sequence[str], by_mean: bool) -> list[Prediction]:
        """Decode the replies, or find the choices with the highest score.

        Args:
            answers: the choices, or the answers that replies were chosen from; empty: free replies.
            by_mean: compare choices by their means per token.
        """
        if not self.replies:
            return [_choose(answers, scores, by_mean) for scores in self.scores]
        known, found = set(answers), []
        for index, (replies, (best,)) in enumerate(zip(self.replies, self.scores, strict=True)):
            end, is_raw_text = chosen.templates[index].answer_suffix, index in chosen.raw_texts
            texts = [decode_prediction(chosen.tokenizer, ids, end, is_raw_text) for ids in replies]
            ranking = [text for text in dict.fromkeys(texts) if text in known]  # there may be fewer answers than beams
            more = {"ranking": ranking} if known else {}
            found.append(_make_prediction(texts[0], best.logprob, math.exp(best.logprob), **more))
        return found


def _choose(choices: Sequence[str], scores: Sequence[TargetScore], by_mean: bool) -> Prediction:
    values = np.array([each.logprob / (len(each.token_logprobs) if by_mean else 1) for each in scores])
    weights, best = np.exp(values - values.max()), int(values.argmax())
    logprobs = {choice: round(each.logprob, 6) for choice, each in zip(choices, scores, strict=True)}
    return _make_prediction(
        choices[best], scores[best].logprob, weights[best] / weights.sum(), choice_logprobs=logprobs
    )


def _make_prediction(text: str, logprob: float, probability: float, **more: Any) -> Prediction:
    return {"prediction": text, "logprob": round(logprob, 6), "probability": float(probability), **more}


def write_predictions(
    path: Path,
    chosen: EvaluationSet,
    metrics: Sequence[str],
    outcomes: Sequence[Outcome],
    predictions: Sequence[Sequence[Prediction]],
) -> None:
    """Write a line of JSON for each example.

    Args:
        outcomes, predictions: the model's, and the base's if it was evaluated.
    """
    names = {index: name for name, indices in chosen.datasets for index in indices}
    with open(path, "w", encoding="utf-8") as file:
        for index, (example, target) in enumerate(zip(chosen.examples, chosen.targets, strict=True)):
            prediction, *of_base = (each[index] for each in predictions)
            losses = (outcome.losses for outcome in outcomes)
            loss, *loss_of_base = (round(each.sums[index] / each.tokens[index], 6) for each in losses)
            line = {
                **({"dataset": dataset} if (dataset := names.get(index)) is not None else {}),
                "source": decode_reference(chosen.tokenizer, example.source_S, "", index in chosen.raw_texts),
                "target": target,
                **prediction,
                "loss": loss,
                **score_one(prediction["prediction"], target, metrics),
            }
            if of_base:
                line |= {f"base_{name}": value for name, value in (of_base[0] | {"loss": loss_of_base[0]}).items()}
            if chosen.prompts and (prompt := chosen.prompts[index]) is not None:
                line["prompt"] = prompt
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def compute_scores(
    chosen: EvaluationSet,
    outcome: Outcome,
    predictions: Sequence[Prediction],
    metrics: Sequence[str],
    indices: Sequence[int] | None = None,
) -> dict[str, float]:
    """Compute the built-in metrics of some examples; None: of all."""
    indices = range(len(predictions)) if indices is None else indices
    texts, targets, choices, probabilities = _select(chosen, predictions, indices)
    scores = _compute_losses(outcome.losses.select(indices), chosen, indices) | score(texts, targets, metrics, choices)
    if choices:
        scores["ece"] = score_labels(texts, targets, choices, probabilities)[0]["ece"]
    if "ranking" in predictions[0]:
        most, rankings = len(outcome.replies[0]), [predictions[index]["ranking"] for index in indices]
        for cutoff in (each for each in sorted({most, *RECALL_CUTOFFS}) if each <= most):
            found = sum(target in ranking[:cutoff] for ranking, target in zip(rankings, targets, strict=True))
            scores[f"recall_at_{cutoff}"] = round(100 * found / len(targets), 4)
    return scores


def _select(
    chosen: EvaluationSet, predictions: Sequence[Prediction], indices: Sequence[int]
) -> tuple[list[str], list[str], list[str], list[float]]:
    """Return the predicted texts and the targets of some examples; if choices were scored, them and probabilities."""
    predicted = [predictions[index] for index in indices]
    choices = [*predicted[0].get("choice_logprobs", ())]
    probabilities = [each["probability"] for each in predicted if choices]
    return (
        [each["prediction"] for each in predicted],
        [chosen.targets[index] for index in indices],
        choices,
        probabilities,
    )


def _compute_losses(losses: Losses, chosen: EvaluationSet, indices: Sequence[int]) -> dict[str, float]:
    found = {"loss": round(losses.mean, 6), "perplexity": round(math.exp(min(losses.mean, 700.0)), 4)}
    if chosen.raw_texts.isdisjoint(indices):
        characters = sum(len(chosen.targets[index]) for index in indices)
        found["bits_per_character"] = round(sum(losses.sums) / math.log(2) / characters, 6)
    return found


def tabulate_labels(
    chosen: EvaluationSet, predictions: Sequence[Prediction], scores: Mapping[str, Mapping[str, float]]
) -> dict[str, LabelTable]:
    """Tabulate the predicted labels of each dataset whose scores contain label metrics."""
    parts = {ALL: range(len(predictions)), **dict(chosen.datasets)}
    return {
        name: score_labels(*_select(chosen, predictions, parts[name]))[1]
        for name, values in scores.items()
        if has_label_metrics(values)
    }


def score_datasets(
    chosen: EvaluationSet,
    names: Sequence[str] | None,
    functions: list[str],
    outcomes: Sequence[Outcome],
    predictions: Sequence[Sequence[Prediction]],
    report: Report,
) -> dict[str, dict[str, float]] | None:
    """Compute the named metrics that fit the targets of each dataset (None: all), if there are several datasets.

    Custom metrics that aren't finite are left out: a dataset's examples may be too few, or too similar.
    """
    found: dict[str, dict[str, float]] = {}
    for dataset, indices in chosen.datasets:
        targets = [chosen.targets[index] for index in indices]
        labels = predictions[0][0].get("choice_logprobs")
        fitting = [each for each in choose_metrics(None, targets, labels) if names is None or each in names]
        values: dict[str, float] = {"examples": len(targets)}
        for prefix, outcome, predicted in zip(("", "base_"), outcomes, predictions, strict=False):
            selected = [predicted[index]["prediction"] for index in indices]
            scores = compute_scores(chosen, outcome, predicted, fitting, indices)
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
