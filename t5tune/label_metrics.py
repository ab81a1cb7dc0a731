"""Score predicted labels: accuracy, macro-averaged F1, Matthews' correlation, each class, and a confusion matrix.

    find_labels(["spam", "ham", …])                                  # ["ham", "spam"]: the most frequent label first
    metrics, table = score_labels(["spam", "?"], ["spam", "ham"])    # {"accuracy": 50.0, …}, {"classes": {…}, …}
    score_entities([["B-city", "O"]], [["B-city", "I-city"]])        # {"entity_f1": 0.0, …}
    score_numbers([1.5, 2.5], [1.0, 3.0])                            # {"spearman": 100.0, …, "rmse": 0.5}

As in scikit-learn, with all replies that match no label as one more class, which the averages leave out.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil, sqrt
from statistics import StatisticsError, correlation, fmean
from typing import Any

LABEL_METRICS = ("accuracy", "macro_f1", "mcc")
SEVERAL_METRICS = ("accuracy", "macro_f1", "micro_f1")
ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")
NUMBER_METRICS = ("spearman", "pearson", "rmse")
CALIBRATED_METRICS = (*LABEL_METRICS, "ece")
HEAD_METRICS = (*dict.fromkeys((*CALIBRATED_METRICS, *SEVERAL_METRICS)), *ENTITY_METRICS, *NUMBER_METRICS)
"""The metrics of labels that an encoder predicts; which of them depends on the labels."""
LABELS = "labels"  # all of them, in the setting `metrics`; and their tables, in results
ALL = "all"  # key of the table of all datasets together
MAX_LABELS, MAX_WORDS, MIN_EXAMPLES = 100, 8, 5  # words of each label; examples per label, on average

CALIBRATION_BINS = 15  # of equal width

LabelTable = dict[str, Any]
"""classes: label, the most frequent first -> precision, recall, f1 (from 0 to 100), support (how many examples it has)
and, of text labels, no_label (how many of their replies match no label); confusion: label -> predicted label -> how
often, if at all, or empty if there may be several labels; calibration, with probabilities: bins with the count of
predictions, their mean confidence, and their accuracy."""


def find_labels(references: Iterable[str], are_named: bool = False) -> list[str]:
    """Return the labels, the most frequent one first; an empty list if the references aren't labels.

    `are_named`: the user says that they are labels, however many, rare or long, or JSON, which has other metrics.
    """
    counts: Counter[str] = Counter()
    for reference in references:
        counts[reference] += 1
        if len(counts) > MAX_LABELS and not are_named:
            return []
    are_repeated = counts.total() >= MIN_EXAMPLES * len(counts)
    are_short = all(len(label.split()) <= MAX_WORDS and not label.startswith(("{", "[")) for label in counts)
    return [label for label, _ in counts.most_common() if are_named or (are_repeated and are_short)]


def find_similar_labels(labels: Sequence[str]) -> list[list[str]]:
    """Return groups of labels that differ only in case or spaces."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault("".join(label.casefold().split()), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def describe_similar_labels(groups: Sequence[Sequence[str]]) -> str:
    """Say that groups of labels differ only in case or spaces."""
    names = "; ".join(", ".join(map(repr, group)) for group in groups)
    problem = f"labels that differ only in case or spaces are different labels: {names}"
    return f"{problem}; if they mean the same, spell them alike in the data"


def show_label(label: str) -> str:
    """Quote a label that would look like a different one: with spaces around it, or empty."""
    return label if label and label == label.strip() else repr(label)


def score_labels(
    predictions: Sequence[str],
    references: Sequence[str],
    more_labels: Iterable[str] = (),
    probabilities: Sequence[float] = (),
) -> tuple[dict[str, float], LabelTable]:
    """Score predictions from 0 to 100, Matthews' correlation for several classes (Gorodkin 2004) from -100 to 100.

    Labels may also be `more_labels`. The mean of macro_f1 is over labels among the references or the predictions.
    `probabilities` of the predictions also give the expected calibration error (`ece`).
    """
    supports = Counter(dict.fromkeys(more_labels, 0))
    supports.update(references)
    found = Counter(prediction for prediction in predictions if prediction in supports)
    confusion: dict[str, dict[str, int]] = {label: {} for label, _ in supports.most_common()}
    for (reference, prediction), count in Counter(zip(references, predictions, strict=True)).most_common():
        if prediction in supports:
            confusion[reference][prediction] = count
    sizes = {label: found[label] + supports[label] for label in confusion}
    classes: dict[str, dict[str, Any]] = {
        label: {
            "precision": _percent(hits := row.get(label, 0), found[label]),
            "recall": _percent(hits, supports[label]),
            "f1": _percent(2 * hits, sizes[label]),
            "support": supports[label],
            "no_label": supports[label] - sum(row.values()),
        }
        for label, row in confusion.items()
    }
    total, hits = len(references), sum(row.get(label, 0) for label, row in confusion.items())
    f1s = [200 * row.get(label, 0) / sizes[label] for label, row in confusion.items() if sizes[label]]
    columns = [*found.values(), total - found.total()]
    spreads = [total**2 - sum(count**2 for count in counts) for counts in (columns, supports.values())]
    covariance = hits * total - sum(found[label] * support for label, support in supports.items())
    metrics = {
        "accuracy": _percent(hits, total),
        "macro_f1": round(fmean(f1s), 4),
        "mcc": round(100 * covariance / sqrt(spreads[0] * spreads[1]), 4) if all(spreads) else 0.0,
    }
    table: LabelTable = {"classes": classes, "confusion": confusion}
    if probabilities:
        are_right = map(str.__eq__, predictions, references)
        metrics["ece"], table["calibration"] = _measure_calibration(zip(probabilities, are_right, strict=True))
    return metrics, table


def score_several_labels(
    predictions: Sequence[Iterable[str]], references: Sequence[Iterable[str]], labels: Sequence[str]
) -> tuple[dict[str, float], LabelTable]:
    """Score predicted sets of labels from 0 to 100: the share of equal sets, and F1 of single labels.

    The mean of macro_f1 is over labels among the references or the predictions.
    """
    pairs = [(set(found), set(wanted)) for found, wanted in zip(predictions, references, strict=True)]
    counts = {
        label: [sum(label in each[side] for each in pairs) for side in (0, 1)]
        + [sum(label in found & wanted for found, wanted in pairs)]
        for label in labels
    }
    classes = {
        label: {
            "precision": _percent(hits, found),
            "recall": _percent(hits, wanted),
            "f1": _percent(2 * hits, found + wanted),
            "support": wanted,
        }
        for label, (found, wanted, hits) in sorted(counts.items(), key=lambda item: -item[1][1])
    }
    f1s = [200 * hits / (found + wanted) for found, wanted, hits in counts.values() if found + wanted]
    found, wanted, hits = map(sum, zip(*counts.values(), strict=True))
    metrics = {
        "accuracy": _percent(sum(found == wanted for found, wanted in pairs), len(pairs)),
        "macro_f1": round(fmean(f1s or [0.0]), 4),
        "micro_f1": _percent(2 * hits, found + wanted),
    }
    return metrics, {"classes": classes, "confusion": {}}


def are_entity_tags(labels: Iterable[str]) -> bool:
    """Whether labels are tags of entities in the scheme IOB2: `O`, and `B-` or `I-` before an entity's class."""
    tags = {*labels} - {"O"}
    return any(tag.startswith("B-") for tag in tags) and all(tag.startswith(("B-", "I-")) for tag in tags)


def score_entities(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score the entities of tagged texts from 0 to 100, micro-averaged, as seqeval does in its strict mode with IOB2.

    An entity is right if its class and both of its ends are.
    """
    found, wanted = ([{*_find_entities(tags)} for tags in texts] for texts in (predictions, references))
    hits = sum(len(one & other) for one, other in zip(found, wanted, strict=True))
    num_found, num_wanted = (sum(map(len, texts)) for texts in (found, wanted))
    values = _percent(2 * hits, num_found + num_wanted), _percent(hits, num_found), _percent(hits, num_wanted)
    return dict(zip(ENTITY_METRICS, values, strict=True))


def _find_entities(tags: Sequence[str]) -> Iterable[tuple[str, int, int]]:
    """Yield (class, first tag, end) of each entity: a `B-` tag, and the `I-` tags of its class that follow it."""
    for start, tag in enumerate(tags):
        if tag.startswith("B-"):
            inside, end = f"I-{tag[2:]}", start + 1
            while end < len(tags) and tags[end] == inside:
                end += 1
            yield tag[2:], start, end


def score_numbers(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Compute the correlations by ranks (Spearman) and by values (Pearson), from -100 to 100, and the error (RMSE).

    Nothing is rounded. The error has the unit of the numbers. A correlation with numbers that are all equal isn't
    defined; it is 0 here.
    """
    errors = ((found - wanted) ** 2 for found, wanted in zip(predictions, references, strict=True))
    return {
        "spearman": _correlate(_rank(predictions), _rank(references)),
        "pearson": _correlate(predictions, references),
        "rmse": sqrt(fmean(errors)),
    }


def _correlate(first: Sequence[float], second: Sequence[float]) -> float:
    if len({*first}) == 1 or len({*second}) == 1:  # their rounded mean may differ from them, and give a correlation
        return 0.0
    try:
        return 100 * correlation(first, second)
    except StatisticsError:  # the squared differences underflow
        return 0.0


def _rank(values: Sequence[float]) -> list[float]:
    """Rank values; equal values get the mean of their ranks."""
    counts, ranks, below = Counter(values), dict[float, float](), 0
    for value in sorted(counts):
        ranks[value] = below + (counts[value] + 1) / 2
        below += counts[value]
    return [ranks[value] for value in values]


def _measure_calibration(pairs: Iterable[tuple[float, bool]]) -> tuple[float, list[dict[str, float]]]:
    """Compute the expected calibration error (Guo et al. 2017), and the bins that contain predictions."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for pair in pairs:
        bins.setdefault(ceil(pair[0] * CALIBRATION_BINS), []).append(pair)
    rows = []
    gaps = []
    for _, members in sorted(bins.items()):
        confidence, accuracy = (100 * fmean(values) for values in zip(*members, strict=True))
        rows.append({"count": len(members), "confidence": round(confidence, 4), "accuracy": round(accuracy, 4)})
        gaps.append(len(members) * abs(confidence - accuracy))
    return sum(gaps) / sum(row["count"] for row in rows), rows


def describe_labels(table: LabelTable) -> str:
    """Say how many replies match no label, and the accuracy of the most frequent label as the only reply."""
    (label, first), *_ = table["classes"].items()
    total, no_label = (sum(each.get(key, 0) for each in table["classes"].values()) for key in ("support", "no_label"))
    if not table["confusion"]:
        return f"{total:,} labels in all; an example counts in each of its classes"
    only = f"always predicting {label!r} would give an accuracy of {100 * first['support'] / total:.4g}"
    if "no_label" not in first:
        return only
    return f"replies that match no label: {no_label:,} of {total:,}; {only.replace('predicting', 'replying')}"


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 4) if whole else 0.0
