"""Predict the labels of examples with an encoder, and score them: for `train` and `evaluate`.

    outcome = measure_labels(model, examples, collator, batch_size, task)
    outcome.score(indices)    # ({"loss": 0.21, "accuracy": 91.3, …}, the table of classes)

An item is a labeled text, or a labeled token.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from t5tune.data.labels import LabelTask
from t5tune.data.tokens.encoding import Example, LabeledExample
from t5tune.evaluation.scoring import EVALUATE_TASK, measure_targets
from t5tune.inference.label_predictions import (
    Logits,
    compute_logits,
    compute_probabilities,
    predict_labels,
)
from t5tune.label_metrics import (
    CALIBRATED_METRICS,
    ENTITY_METRICS,
    NUMBER_METRICS,
    SEVERAL_METRICS,
    LabelTable,
    are_entity_tags,
    score_entities,
    score_labels,
    score_numbers,
    score_several_labels,
)
from t5tune.model.batches import Collator
from t5tune.model.label_losses import compute_label_losses
from t5tune.progress import Report, silent


def list_label_metrics(task: LabelTask) -> tuple[str, ...]:
    """List the metrics of predicted labels, besides the loss."""
    if task.objective == "regress":
        return NUMBER_METRICS
    if task.several:
        return SEVERAL_METRICS
    return (*CALIBRATED_METRICS, *(ENTITY_METRICS if are_entity_tags(task.names) else ()))


@dataclass(frozen=True)
class LabelOutcome:
    """The logits of each example's items, and their labels.

    Args:
        labels: class numbers or numbers, one for each item; of several labels, their class numbers.
        scale: the loss of numbers divides them by it.
    """

    task: LabelTask
    logits: Sequence[Logits]
    labels: Sequence[list[float]]
    scale: float = 1.0

    def predict(self, index: int) -> dict[str, Any]:
        """Describe an example's prediction, as in predictions.jsonl."""
        return predict_labels(self.logits[index], self.task)

    def find_probabilities(self, index: int) -> list[float]:
        """Return the probability of the predicted class of each item."""
        return [*compute_probabilities(self.logits[index], self.task).max(1).tolist()]

    def name_labels(self, index: int) -> Any:
        """Return an example's label, labels or number, or a list of them for its labeled tokens."""
        return _name_values(self.labels[index], self.task)

    def measure_losses(self, index: int) -> torch.Tensor:
        """Compute the loss of each of an example's items."""
        task, labels = self.task, torch.tensor(self.labels[index], dtype=torch.float64)
        if task.several:
            labels = torch.zeros(1, task.num_outputs, dtype=torch.float64).index_fill(1, labels.long(), 1.0)
        return compute_label_losses(
            torch.from_numpy(self.logits[index]).double() / self.scale, labels, task, self.scale
        )

    def score(self, indices: Iterable[int]) -> tuple[dict[str, float], LabelTable | None]:
        """Score the predictions for some examples, and tabulate the classes; no table of numbers."""
        indices, task = list(indices), self.task
        losses = torch.cat([self.measure_losses(index) for index in indices])
        metrics = {"loss": float(losses.mean())}
        found = [self.predict(index)["prediction"] for index in indices]
        wanted = [self.name_labels(index) for index in indices]
        if task.several:
            scores, table = score_several_labels(found, wanted, task.names)
            return metrics | scores, table
        items = [[item for each in side for item in each] if task.per_token else side for side in (found, wanted)]
        if task.objective == "regress":
            return metrics | score_numbers(items[0], items[1]), None
        probabilities = [self.find_probabilities(index) for index in indices]
        scores, table = score_labels(items[0], items[1], task.names, [each for row in probabilities for each in row])
        for scores_of_class in table["classes"].values():
            del scores_of_class["no_label"]  # there is always a label
        if are_entity_tags(task.names):
            scores |= score_entities(found, wanted)
        return metrics | scores, table


def name_labels(example: LabeledExample, task: LabelTask) -> Any:
    """Return an example's label, labels or number, or a list of them for its labeled tokens."""
    return _name_values(example.values[_find_labeled(example)].tolist(), task)


def _name_values(values: list[float], task: LabelTask) -> Any:
    names = [task.names[int(value)] for value in values] if task.names else values
    return names if task.per_token or task.several else names[0]


def _find_labeled(example: LabeledExample) -> npt.NDArray[np.bool_]:
    return ~np.isnan(example.values)


def measure_labels(
    model: Any,
    examples: Sequence[Any],
    collator: Collator,
    batch_size: int | None,
    report: Report = silent,
    is_stopped: Callable[[], bool] = lambda: False,
    scale: float = 1.0,
) -> LabelOutcome:
    """Compute the logits of every example, with the arguments of `measure_losses`. Call on every rank.

    Args:
        examples: LabeledExample of all of them.
        scale: the unit of a model's numbers in training.
    """
    task: LabelTask = model.label_task
    is_labeled = [_find_labeled(each) if task.per_token else slice(None) for each in examples]

    def measure(model: Any, part: Sequence[Example], collator: Collator) -> list[Logits]:
        return [logits * scale for logits in compute_logits(model, part, collator)]

    found = measure_targets(model, examples, collator, batch_size, report, is_stopped, EVALUATE_TASK, measure)
    logits = [each[chosen] for each, chosen in zip(found, is_labeled, strict=True)]
    labels = [each.values[chosen].tolist() for each, chosen in zip(examples, is_labeled, strict=True)]
    return LabelOutcome(task, logits, labels, scale)
