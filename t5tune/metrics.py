"""Score predictions against references from 0 to 100: exact match, ROUGE, BLEU, chrF, metrics of JSON and of labels.

    score(["Hello."], ["Hello."])["rougeL"]                              # 100.0
    score(['{"a": 1, "b": 2}'], ['{"a": 1, "b": 3}'])["field_f1"]        # 50.0

rouge-score computes ROUGE (Lin 2004), and sacrebleu BLEU, chrF and chrF++ with its defaults (Post 2018).
label_metrics.py has the metrics of labels, and custom_metrics.py the user's metrics.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import fsum
from typing import Any

from t5tune.errors import SettingsError
from t5tune.io.untrusted import parse_json
from t5tune.label_metrics import LABEL_METRICS, find_labels, score_labels

ROUGES = ("rouge1", "rouge2", "rougeL")
MEANS = ("exact_match", *ROUGES)  # metrics of a corpus that are means over its examples
JSON_METRICS = ("valid_json", "field_f1")
CHRF_WORD_ORDERS = {"chrf": 0, "chrf_pp": 2}  # chrF++ also compares words and pairs of words (Popović 2017)
SACREBLEU_METRICS = ("bleu", *CHRF_WORD_ORDERS)
METRICS = (*MEANS, *SACREBLEU_METRICS, *JSON_METRICS, *LABEL_METRICS)
PREFERENCE_METRICS = (
    "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
    "nll_loss", "log_odds_ratio", "log_odds_chosen",
)  # fmt: skip
"""Metrics of held-out preference pairs, by TRL's names."""
NOT_BEST = ("rewards/rejected", "logps/rejected")
"""Metrics where neither a high nor a low value is better."""
LOWER_IS_BETTER = (
    "loss",
    "perplexity",
    "bits_per_character",
    "ece",
    "kl",
    "rmse",
    "rewards/rejected",
    "logps/rejected",
)
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
"""A character of Thai, Lao, Burmese or Khmer."""
EMOJI_STYLE = "\ufe0f"  # also a combining mark; without it, the digit of a keycap emoji is the digit in other text


def score(
    predictions: Sequence[str], references: Sequence[str], names: Iterable[str] = METRICS, labels: Iterable[str] = ()
) -> dict[str, float]:
    """Score a corpus: exact match and ROUGE are means over the examples, BLEU and chrF are corpus scores.

    `valid_json` is the percentage of predictions that are JSON. `field_f1` is the micro-averaged F1 over the fields, as
    in Donut (Kim et al. 2022, `JSONParseEvaluator.cal_f1`): an example's fields are the pairs of path and value of all
    its leaves, as a multiset, so that each field matches at most one. List items have the same path whatever their
    order. Unlike Donut, values have a type ("1" is not 1) and are compared exactly, and an empty object or list is a
    leaf too. A prediction that isn't JSON has no fields. Both are computed over the examples whose reference is a JSON
    object or array, and left out without such examples.
    `labels` may be predicted in addition to the references.
    """
    names, pairs = set(names), list(zip(predictions, references, strict=True))
    means = [name for name in MEANS if name in names]
    examples = [score_one(*pair, means) for pair in pairs if means]
    scores = {name: fsum(example[name] for example in examples) / len(examples) for name in means}
    for name in SACREBLEU_METRICS:
        if name in names:
            scores[name] = float(_make_sacrebleu_metric(name).corpus_score(predictions, [references]).score)
    scores |= _score_json(pairs, names)
    if has_label_metrics(names):
        of_labels, _ = score_labels(predictions, references, labels)
        scores |= {name: value for name, value in of_labels.items() if name in names}
    return {name: round(value, 4) for name, value in scores.items()}


def score_one(prediction: str, reference: str, names: Iterable[str] = METRICS) -> dict[str, float]:
    """Score one prediction, without BLEU, which means little for a single sentence, and the metrics of labels."""
    names = set(names)
    scores = {"exact_match": 100.0 * (prediction == reference)} if "exact_match" in names else {}
    if rouges := [name for name in ROUGES if name in names]:
        from rouge_score.rouge_scorer import RougeScorer

        found = RougeScorer(rouges, tokenizer=_UnicodeTokenizer()).score(reference, prediction)
        scores |= {name: round(100.0 * found[name].fmeasure, 4) for name in rouges}
    for name in CHRF_WORD_ORDERS:
        if name in names:
            found = _make_sacrebleu_metric(name).sentence_score(prediction, [reference])
            scores[name] = round(float(found.score), 4)
    json_scores = _score_json([(prediction, reference)], names)
    return scores | {name: round(value, 4) for name, value in json_scores.items()}


def describe_signatures(names: Iterable[str]) -> dict[str, str]:
    """Return sacreBLEU's signature of each of its metrics among these: the settings and version that papers report."""
    metrics = {name: _make_sacrebleu_metric(name) for name in SACREBLEU_METRICS if name in names}
    for metric in metrics.values():
        metric.corpus_score(["a"], [["a"]])  # the signature has the number of references
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def _make_sacrebleu_metric(name: str) -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU() if name == "bleu" else CHRF(word_order=CHRF_WORD_ORDERS[name])


def prefix_metric(dataset: str, name: str) -> str:
    """Name a metric of one of several datasets: chats, loss -> chats_loss. All examples are the dataset ""."""
    return f"{dataset}_{name}" if dataset else name


def is_better_low(name: str) -> bool:
    """Whether a lower value of a metric is better. The name may begin with a dataset's or `evaluate`: chats_loss."""
    return any(name == low or name.endswith((f"_{low}", f" {low}")) for low in LOWER_IS_BETTER)


def split_by_dataset(
    metrics: Mapping[str, float], datasets: Iterable[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Split metrics into metrics of all examples, and metrics of each dataset, named by `prefix_metric`.

    A dataset has only metrics that all examples have, too, and metrics of labels, which a single dataset may have: with
    a dataset called `valid`, valid_json isn't its `json`.
    """
    known = {*metrics, *LABEL_METRICS}
    by_length = sorted(datasets, key=len, reverse=True)  # with datasets a and a_b, a_b_loss belongs to a_b
    overall: dict[str, float] = {}
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        splits = ((each, name.removeprefix(prefix_metric(each, ""))) for each in by_length)
        dataset, metric = next(((each, rest) for each, rest in splits if rest != name and rest in known), (None, name))
        if dataset is None:
            overall[name] = value
        else:
            found.setdefault(dataset, {})[metric] = value
    return overall, found


def choose_metrics(
    names: Sequence[str] | None, references: Sequence[str], labels: Collection[str] | None = None
) -> tuple[str, ...]:
    """Return the metrics to compute for these references: the named metrics, or all that fit.

    Args:
        labels: the labels among these and further references, or an empty list; None: find them.
    """
    chosen = tuple(name for name in METRICS if names is None or name in names)
    if names is None and not (find_labels(references) if labels is None else labels):
        chosen = tuple(name for name in chosen if name not in LABEL_METRICS)
    for_json = [name for name in chosen if name in JSON_METRICS]
    if not for_json or any(_is_json(_parse(reference)) for reference in references):
        return chosen
    if names is not None:
        problem = f"metrics: {for_json[0]}: none of the {len(references):,} targets is a JSON object or array"
        raise SettingsError(problem, hint="remove it from metrics")
    return tuple(name for name in chosen if name not in JSON_METRICS)


def has_label_metrics(names: Iterable[str]) -> bool:
    """Whether metrics of labels are among these metrics."""
    return not set(LABEL_METRICS).isdisjoint(names)


class _UnicodeTokenizer:
    """Word tokenizer for rouge-score that supports every script; the default tokenizer drops all non-ASCII characters.

    A word consists of letters, digits and the combining marks after them, such as the vowel signs of Hindi. In scripts
    without spaces between words that write vowels as marks (see `UNSPACED`), each letter with its marks counts as a
    word: otherwise a phrase would be one word, and all right or all wrong.
    """

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text.lower()).replace(EMOJI_STYLE, "")
        words = [""]
        for character in text:
            if words[-1] and unicodedata.category(character) in ("Mn", "Mc"):
                words[-1] += character
            elif not character.isalnum():
                words.append("")
            elif UNSPACED.search(words[-1][:1] + character):
                words.append(character)
            else:
                words[-1] += character
        return [word for word in words if word]


def _score_json(pairs: Iterable[tuple[str, str]], names: set[str]) -> dict[str, float]:
    """Score the pairs (prediction, reference) whose reference is JSON; {} without such pairs."""
    if not names & set(JSON_METRICS):
        return {}
    num_pairs = num_valid = num_matched = num_fields = 0
    for prediction, reference in pairs:
        wanted, found = _parse(reference), _parse(prediction)
        if _is_json(wanted):
            wanted_fields, found_fields = _count_fields(wanted), _count_fields(found) if _is_json(found) else Counter()
            num_pairs += 1
            num_valid += _is_json(found)
            num_matched += (wanted_fields & found_fields).total()
            num_fields += wanted_fields.total() + found_fields.total()
    if num_pairs == 0:
        return {}
    scores = {"valid_json": 100.0 * num_valid / num_pairs, "field_f1": 200.0 * num_matched / num_fields}
    return {name: value for name, value in scores.items() if name in names}


def _parse(text: str) -> Any:
    """Parse strictly: duplicate keys, NaN and text around the JSON are errors. None: can't be parsed."""
    try:
        return parse_json(text.encode())
    except ValueError:  # also for a lone surrogate, or an integer with more digits than Python converts
        return None


def _is_json(value: Any) -> bool:
    return isinstance(value, dict | list)  # a bare number or word is more likely plain text


def _count_fields(value: Any) -> Counter[tuple[Any, ...]]:
    """Count the leaves by path and value. Not recursive, because predictions can be nested very deeply."""
    fields: Counter[tuple[Any, ...]] = Counter()
    pending: list[tuple[tuple[str | None, ...], Any]] = [((), value)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, dict) and value:
            pending += [((*path, key), item) for key, item in value.items()]
        elif isinstance(value, list) and value:
            pending += [((*path, None), item) for item in value]
        else:
            leaf = type(value) if _is_json(value) else value
            fields[path, isinstance(value, bool), leaf] += 1  # in Python, True equals 1
    return fields
