"""The predictions of a model with labels: the classes of a text or of each word, or numbers.

    task = LabelTask("tag", per_token=True, several=False, names=("C", "E", "H"), source_words="residues")
    task.num_outputs, task.problem_type    # 3, "single_label_classification"

A text's words are encoded one by one, and a word's first token has its label.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from t5tune.settings.groups.record_format import LabelObjectiveName, SourceWords

Values = npt.NDArray[np.float64]
IDS_PER_VALUE = 2  # int32 ids that a value takes in a token cache
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class LabelTask:
    """The outputs of a model with labels.

    Args:
        per_token: whether each word has a label or a number, which its first token predicts; otherwise a text has.
        several: whether a text may have several labels, or no label.
        names: the classes, in the order of the logits; empty for numbers. While data is prepared, also empty if any
            name may occur.
    """

    objective: LabelObjectiveName
    per_token: bool
    several: bool
    names: tuple[str, ...]
    source_words: SourceWords

    @property
    def num_outputs(self) -> int:
        """The number of logits of a text or a token."""
        return len(self.names) or 1

    @property
    def problem_type(self) -> str:
        """The problem in transformers' words."""
        if self.objective == "regress":
            return "regression"
        return "multi_label_classification" if self.several else "single_label_classification"


@dataclass(frozen=True)
class TextLabels:
    """The labels of a record.

    Args:
        words: the words of the source; the characters of a string; without labels per word, also a text as a whole.
        values: the name of a class, or a number, for each word if `per_token`, else for the text. None: not learned.
    """

    words: Sequence[str]
    values: tuple[str | float | None, ...]
    per_token: bool
    several: bool


def describe_form(task: LabelTask | None) -> str:
    """Describe the form of the labels, which tasks share that differ only in the names."""
    if task is None:
        return "no labels"
    noun = "number" if task.objective == "regress" else "label"
    form = f"one {noun} per {'word' if task.per_token else 'text'}" if not task.several else "several labels per text"
    return f"{form} (objective {task.objective}, source_words {task.source_words})"


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort the names of classes: by their values if all are whole numbers, otherwise as texts."""
    found = set(names)
    if all(map(_INTEGER.fullmatch, found)):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def join_tasks(tasks: Sequence[tuple[LabelTask, bool]]) -> LabelTask:
    """Join the classes of several datasets; their tasks are equal apart from the names.

    Args:
        tasks: each task, and whether the order of its names is given.

    Returns:
        The task with all names: in the given order if there is only one and it has all of them, otherwise sorted.
    """
    names = {name for task, _ in tasks for name in task.names}
    given = {task.names for task, is_ordered in tasks if is_ordered}
    has_order = len(given) == 1 and names == {name for order in given for name in order}
    return replace(tasks[0][0], names=given.pop() if has_order else sort_names(names))


def read_values(ids: npt.NDArray[np.integer[Any]]) -> Values:
    """Return the values that are stored as ids, in the same memory if the ids are contiguous."""
    return np.ascontiguousarray(ids).view(np.float64)


def renumber(values: Values, numbers: Values) -> Values:
    """Replace each class number by its new number, and keep NaN.

    Args:
        numbers: the new number of each class.
    """
    renumbered, is_class = values.copy(), ~np.isnan(values)
    renumbered[is_class] = numbers[values[is_class].astype(np.int64)]
    return renumbered
