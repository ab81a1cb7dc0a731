"""The labels that an encoder predicts for texts, with their probabilities.

    logits = compute_logits(model, examples, collator)    # for each example (M, K): of its text, or of its M tokens
    predict_labels(logits[0], task)
    # {"prediction": "positive", "probability": 0.98, "probabilities": {"positive": 0.98, "negative": 0.02}}

K is the number of classes, or 1 for numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from t5tune.data.labels import LabelTask
from t5tune.data.tokens.encoding import Example
from t5tune.errors import ModelError
from t5tune.inference.target_scores import collate
from t5tune.model.batches import Collator, LabelCollator

Logits = npt.NDArray[np.float32]
MIN_PROBABILITY = 0.5  # of each of several labels that are predicted


def compute_logits(model: Any, examples: Sequence[Example], collator: Collator) -> list[Logits]:
    """Compute the logits of a batch, with a model in evaluation mode: of each text, or of each token of its source.

    Raises:
        ModelError: they aren't finite.
    """
    assert isinstance(collator, LabelCollator), "of this model"
    batch = {name: value for name, value in collate(model, examples, collator).items() if name != "labels"}
    with torch.no_grad():
        logits = model(**batch).float().cpu()
    if not logits.isfinite().all():
        raise ModelError(
            "the model's predictions aren't finite", hint="the learning rate was too high, or the checkpoint is damaged"
        )
    if not model.label_task.per_token:
        return [row.numpy() for row in logits[:, None]]
    lengths = [len(example.source_S) for example in examples]
    # padding follows a packed row, or each text
    rows = logits[0, : sum(lengths)].split(lengths) if collator.is_packed else logits.unbind()
    return [row[:length].numpy() for row, length in zip(rows, lengths, strict=True)]


def predict_labels(logits_MK: Logits, task: LabelTask) -> dict[str, Any]:
    """Describe a text's prediction: its label, labels or number, or lists of them for its M tokens.

    As in a line of predictions.jsonl, the keys are `prediction`; `probability` of one class; `probabilities`, of all
    classes by name, or of each token's class. Nothing is rounded, because metrics are computed from these numbers.
    """
    if task.objective == "regress":
        numbers = logits_MK[:, 0].tolist()
        return {"prediction": numbers if task.per_token else numbers[0]}
    probabilities_MK = compute_probabilities(logits_MK, task)
    if task.several:
        chosen = [name for name, value in zip(task.names, probabilities_MK[0], strict=True) if value >= MIN_PROBABILITY]
        return {"prediction": chosen, "probabilities": _name_probabilities(probabilities_MK[0], task)}
    best_M = probabilities_MK.argmax(1)
    names, best = [task.names[index] for index in best_M], probabilities_MK.max(1).tolist()
    if task.per_token:
        return {"prediction": names, "probabilities": best}
    named = _name_probabilities(probabilities_MK[0], task)
    return {"prediction": names[0], "probability": best[0], "probabilities": named}


def compute_probabilities(logits_MK: Logits, task: LabelTask) -> npt.NDArray[np.float64]:
    """Compute the probabilities of classes: a sigmoid for each of several labels, else a softmax over the classes."""
    values = torch.from_numpy(logits_MK).double()
    return (values.sigmoid() if task.several else values.softmax(-1)).numpy()


def _name_probabilities(values_K: npt.NDArray[np.float64], task: LabelTask) -> dict[str, float]:
    return dict(zip(task.names, values_K.tolist(), strict=True))
