"""Tasks of models with labels: their names, and how the names of several datasets are joined."""

import numpy as np
import pytest

from t5tune.data.labels import LabelTask, join_tasks, renumber, sort_names


def make_task(*names: str) -> LabelTask:
    return LabelTask("classify", per_token=False, several=False, names=names, source_words="text")


def test_whole_numbers_sort_by_their_values() -> None:
    assert sort_names(["10", "9", "-1", "9"]) == ("-1", "9", "10")
    assert sort_names(["10", "9", "a"]) == ("10", "9", "a")


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        ([(("b", "a"), True), (("b", "a"), True)], ("b", "a")),
        ([(("b", "a"), True), (("a", "b"), False)], ("b", "a")),
        ([(("b", "a"), True), (("b", "c"), False)], ("a", "b", "c")),
        ([(("b", "a"), True), (("a", "b"), True)], ("a", "b")),
        ([(("c", "b"), False), (("a",), False)], ("a", "b", "c")),
    ],
)
def test_several_datasets_keep_a_common_given_order(
    tasks: list[tuple[tuple[str, ...], bool]], names: tuple[str, ...]
) -> None:
    assert join_tasks([(make_task(*own), is_ordered) for own, is_ordered in tasks]) == make_task(*names)


def test_class_numbers_change_and_unlearned_values_stay() -> None:
    values = renumber(np.array([1, np.nan, 0], np.float32), np.array([5, 3], np.float32))
    assert values.tolist()[::2] == [3, 5]
    assert np.isnan(values[1])
