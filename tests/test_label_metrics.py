"""Labels as targets: how they are recognized, and their scores."""

import html
import random
from math import sqrt

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from seqeval import metrics as seqeval_metrics
from seqeval.scheme import IOB2
from sklearn import metrics as sklearn_metrics

from t5tune.cli.results import render_labels as render_table
from t5tune.label_metrics import (
    ENTITY_METRICS,
    are_entity_tags,
    describe_labels,
    find_labels,
    find_similar_labels,
    score_entities,
    score_labels,
    score_numbers,
    score_several_labels,
    show_label,
)
from t5tune.reports.page import render_labels as render_page


@pytest.mark.parametrize(
    ("references", "labels"),
    [
        (["ham"] * 7 + ["spam"] * 8, ["spam", "ham"]),
        (["yes"] * 9 + ["no"], ["yes", "no"]),
        ([str(number) for number in range(100) for _ in range(5)], [*map(str, range(100))]),
        (["rare", *["frequent"] * 8], []),  # 4.5 examples per label
        ([str(number) for number in range(101) for _ in range(5)], []),
        (["one two three four five six seven eight nine"] * 9, []),
        (['["spam"]'] * 9, []),
        ([], []),
    ],
)
def test_few_short_repeated_targets_are_labels(references: list[str], labels: list[str]) -> None:
    assert find_labels(references) == labels


def test_any_targets_are_labels_if_the_user_says_so() -> None:
    assert find_labels(["a", "b", "b", '["c"]'], are_named=True) == ["b", "a", '["c"]']


def test_labels_that_differ_in_case_or_spaces_are_found() -> None:
    labels = ["Not sure", "yes", "not  sure", "no", "Yes "]
    assert find_similar_labels(labels) == [["Not sure", "not  sure"], ["yes", "Yes "]]


def test_scores_of_three_labels_by_hand() -> None:
    references = ["a", "a", "a", "a", "b", "b", "b", "c"]
    predictions = ["a", "a", "a", "b", "b", "c", "what?", "c"]
    metrics, table = score_labels(predictions, references)
    assert table["confusion"] == {"a": {"a": 3, "b": 1}, "b": {"b": 1, "c": 1}, "c": {"c": 1}}
    assert {name: tuple(scores.values()) for name, scores in table["classes"].items()} == {
        "a": (100.0, 75.0, 85.7143, 4, 0),
        "b": (50.0, 33.3333, 40.0, 3, 1),
        "c": (50.0, 100.0, 66.6667, 1, 0),
    }
    assert metrics["accuracy"] == 62.5
    assert metrics["macro_f1"] == pytest.approx((600 / 7 + 40 + 200 / 3) / 3, abs=1e-4)
    expected = "replies that match no label: 1 of 8; always replying 'a' would give an accuracy of 50"
    assert describe_labels(table) == expected


def test_a_label_outside_of_the_references_counts_once_predicted() -> None:
    metrics, table = score_labels(["b", "a"], ["a", "a"], more_labels=["b", "c"])
    assert table["confusion"] == {"a": {"b": 1, "a": 1}, "b": {}, "c": {}}
    assert table["classes"]["a"]["no_label"] == 0
    assert metrics["macro_f1"] == pytest.approx((200 / 3 + 0) / 2, abs=1e-4)  # of a and b; nothing is or was called c


def correlate(predictions: list[str], references: list[str]) -> float:
    """Correlate the indicators of all pairs of a class and an example, each centered: Matthews' for two classes."""
    classes = {*predictions, *references}
    indicators = (
        [[float(one == each) for each in classes] for one in predictions],
        [[float(one == each) for each in classes] for one in references],
    )

    def covary(left: list[list[float]], right: list[list[float]]) -> float:
        total = 0.0
        for columns in zip(zip(*left, strict=True), zip(*right, strict=True), strict=True):
            means = [sum(column) / len(column) for column in columns]
            total += sum((x - means[0]) * (y - means[1]) for x, y in zip(*columns, strict=True))
        return total

    found, wanted = indicators
    return 100 * covary(found, wanted) / sqrt(covary(found, found) * covary(wanted, wanted))


@pytest.mark.parametrize("seed", range(5))
def test_matthews_correlation_is_that_of_the_indicators(seed: int) -> None:
    draw = random.Random(seed)
    references = draw.choices("abcd", k=60)
    predictions = [each if draw.random() < 0.4 else draw.choice("abcd?") for each in references]
    metrics, _ = score_labels(predictions, references)
    assert metrics["mcc"] == pytest.approx(correlate(predictions, references), abs=1e-3)


def test_a_constant_prediction_has_no_correlation() -> None:
    metrics, _ = score_labels(["a"] * 4, ["a", "a", "b", "b"])
    assert metrics == {"accuracy": 50.0, "macro_f1": 33.3333, "mcc": 0.0}


def test_a_label_with_spaces_around_it_is_quoted() -> None:
    assert [*map(show_label, ["yes", "not sure", "yes ", "\nno", ""])] == ["yes", "not sure", "'yes '", "'\\nno'", "''"]


def test_tables_and_pages_quote_such_a_label() -> None:
    _, table = score_labels(["yes", "yes "], ["yes ", "yes "])
    page = html.unescape("".join(render_page({"all": table})))
    assert "'yes ' → 'yes ': 1 of 2" in page
    assert "<td>'yes '</td>" in page
    with (console := Console()).capture() as capture:
        console.print(render_table("all", table))
    assert "'yes '" in capture.get().splitlines()[1]


def test_the_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    """Four bins: 0.2 is the upper edge of the third of 15 bins, and 0.95 and 1 share the last bin."""
    predictions, references = ["a", "b", "a", "a", "b"], ["a", "a", "a", "a", "b"]
    metrics, table = score_labels(predictions, references, [], [0.95, 0.92, 0.5, 1.0, 0.2])
    assert table["calibration"] == [
        {"count": 1, "confidence": 20.0, "accuracy": 100.0},
        {"count": 1, "confidence": 50.0, "accuracy": 100.0},
        {"count": 1, "confidence": 92.0, "accuracy": 0.0},
        {"count": 2, "confidence": 97.5, "accuracy": 100.0},
    ]
    assert metrics["ece"] == pytest.approx((80 + 50 + 92 + 2 * 2.5) / 5)
    assert score_labels(["a", "a"], ["a", "b"], [], [0.2, 0.21])[1]["calibration"][1]["count"] == 1
    assert "ece" not in score_labels(predictions, references)[0]


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_several_labels_equal_scikit_learns(seed: int) -> None:
    rng, labels = np.random.default_rng(seed), [f"label {number}" for number in range(7)]
    found_NK, wanted_NK = rng.random((2, 60, 7)) < 0.3
    predictions, references = (
        [[labels[index] for index in row.nonzero()[0]] for row in rows] for rows in (found_NK, wanted_NK)
    )
    metrics, table = score_several_labels(predictions, references, labels)
    assert metrics == {
        "accuracy": pytest.approx(100 * sklearn_metrics.accuracy_score(wanted_NK, found_NK), abs=1e-4),
        "macro_f1": pytest.approx(100 * sklearn_metrics.f1_score(wanted_NK, found_NK, average="macro"), abs=1e-4),
        "micro_f1": pytest.approx(100 * sklearn_metrics.f1_score(wanted_NK, found_NK, average="micro"), abs=1e-4),
    }
    supports = [scores["support"] for scores in table["classes"].values()]
    assert supports == sorted(wanted_NK.sum(0).tolist(), reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_entities_equal_seqevals_strict_mode(seed: int) -> None:
    rng, tags = np.random.default_rng(seed), ["O", "O", "B-city", "I-city", "B-name", "I-name"]
    lengths = rng.integers(1, 30, 40)
    predictions, references = ([[tags[i] for i in rng.integers(0, 6, size)] for size in lengths] for _ in range(2))
    # half of the predictions are right, so that there are hits
    predictions = [
        wanted if i % 2 else found for i, (found, wanted) in enumerate(zip(predictions, references, strict=True))
    ]
    assert are_entity_tags(tags)
    scores = score_entities(predictions, references)
    expected = [
        function(references, predictions, mode="strict", scheme=IOB2)
        for function in (seqeval_metrics.f1_score, seqeval_metrics.precision_score, seqeval_metrics.recall_score)
    ]
    assert [*scores.values()] == pytest.approx([100 * value for value in expected], abs=1e-4)
    assert [*scores] == [*ENTITY_METRICS]


def test_classes_of_residues_are_no_entities() -> None:
    assert not are_entity_tags(["H", "E", "C"])
    assert not are_entity_tags(["O", "B-city", "other"])


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_numbers_equal_scipys_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = rng.integers(0, 9, 50).astype(float)
    found = np.round(wanted + rng.normal(0, 3, 50))
    scores = score_numbers(found.tolist(), wanted.tolist())
    assert scores == {
        "spearman": pytest.approx(100 * stats.spearmanr(found, wanted)[0], rel=1e-12),
        "pearson": pytest.approx(100 * stats.pearsonr(found, wanted)[0], rel=1e-12),
        "rmse": pytest.approx(sqrt(np.mean((found - wanted) ** 2)), rel=1e-12),
    }


def test_equal_predictions_have_no_correlation() -> None:
    assert score_numbers([2.0, 2.0], [1.0, 3.0]) == {"spearman": 0.0, "pearson": 0.0, "rmse": 1.0}
    # the mean of three of them isn't the number, so a formula would give a correlation
    assert score_numbers([-485595.8576436414] * 3, [1.0, 2.0, 4.0])["pearson"] == 0


def test_the_calibration_error_is_not_rounded() -> None:
    probabilities = [0.9123456789, 0.31, 0.7000000001]
    metrics, _ = score_labels(["a", "b", "a"], ["a", "a", "a"], [], probabilities)
    expected = (1 - probabilities[0] + probabilities[1] + 1 - probabilities[2]) / 3
    assert metrics["ece"] == pytest.approx(100 * expected, rel=1e-12)
