"""Scores equal values computed by hand and those of the libraries with their default settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from t5tune.errors import SettingsError
from t5tune.formatting import format_metric_name
from t5tune.metrics import (
    METRICS,
    choose_metrics,
    describe_signatures,
    prefix_metric,
    score,
    score_one,
    split_by_dataset,
)

REFERENCES = ["The cat sat on the mat.", "Send 3 cups to Riga!", "It's a_b 3.5, isn't it?"]
PREDICTIONS = ["The cat sat on a mat.", "Send 3 cups to Riga!", "It's a_b 3.5"]


def test_exact_match_is_the_share_of_equal_texts() -> None:
    assert score(PREDICTIONS, REFERENCES)["exact_match"] == pytest.approx(100 / 3, abs=1e-3)
    assert score_one("a ", "a")["exact_match"] == 0
    assert score_one("a", "a")["exact_match"] == 100


def test_rouge_equals_values_computed_by_hand() -> None:
    # precision and recall are 5 of 6 words and 3 of 5 bigrams; the longest common subsequence has 5 words
    scores = score_one("the cat sat on a mat", "the cat sat on the mat")
    assert scores["rouge1"] == pytest.approx(100 * 5 / 6, abs=1e-3)
    assert scores["rouge2"] == pytest.approx(100 * 3 / 5, abs=1e-3)
    assert scores["rougeL"] == pytest.approx(100 * 5 / 6, abs=1e-3)


def test_ascii_scores_equal_rouge_score_and_sacrebleu() -> None:
    stock = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = score(PREDICTIONS, REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL"):
        pairs = zip(REFERENCES, PREDICTIONS, strict=True)
        expected = sum(stock.score(*pair)[name].fmeasure for pair in pairs) / 3 * 100
        assert scores[name] == pytest.approx(expected, abs=1e-3)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score, abs=1e-3)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score, abs=1e-3)


@pytest.mark.slow
def test_scores_and_signatures_equal_those_of_sacrebleus_command_line(tmp_path: Path) -> None:
    texts = {
        "references": ["Mba'éichapa reiko?", "Che aiko porã.", "g̃uahẽ"],
        "predictions": ["Mba'éichapa", "Che aiko porã", "g̃"],
    }
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "references", "-i", "predictions", "-w", "4", "-m", "bleu", "chrf"]
    scores, signatures = score(**texts), describe_signatures(["rougeL", "chrf", "bleu", "chrf_pp"])
    assert [*signatures] == ["bleu", "chrf", "chrf_pp"]
    for more, names in (([], ["bleu", "chrf"]), (["--chrf-word-order", "2"], ["bleu", "chrf_pp"])):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=True)
        for name, theirs in zip(names, json.loads(done.stdout), strict=True):
            assert (scores[name], signatures[name]) == (theirs["score"], theirs["signature"])
            assert format_metric_name(name) == theirs["name"].replace("chrF2", "chrF")


def test_rouge_works_for_non_latin_scripts() -> None:
    assert score_one("мама мыла раму", "мама мыла раму")["rougeL"] == 100
    assert 0 < score_one("мама мыла окно", "мама мыла раму")["rougeL"] < 100


@pytest.mark.parametrize(
    ("prediction", "reference", "rouge1"),
    [
        ("मैं दान में आती हूँ", "मैं दिन में आता हूँ", 60),  # two of five words differ, in vowel signs alone
        ("தமிழ் படி", "தமிழ் பாட", 50),
        ("মেয়ে আছে", "ময় আছে", 50),
        ("cafe\u0301", "caf\u00e9", 100),  # é as a letter and an accent, or as one character
        ("กิน", "กาน", 40),  # Thai: กิ, น and ก, า, น
        ("ฉันกินข้าวเช้า", "ฉันกินข้าวเย็น", 80),  # 8 of 10 letters
        ("ใช้iPhone", "ใช้ iPhone", 100),
        ("我今天吃饭。", "我昨天吃饭。", 0),  # one word
        ("1\ufe0f\u20e3 Open \u2764\ufe0f it", "1. open it", 100),  # emoji: a keycap 1 and a heart
    ],
)
def test_marks_belong_to_the_words_that_rouge_compares(prediction: str, reference: str, rouge1: float) -> None:
    assert score_one(reference, reference, ["rouge1"])["rouge1"] == 100
    assert score_one(prediction, reference, ["rouge1"])["rouge1"] == pytest.approx(rouge1, abs=1e-3)


def test_an_empty_prediction_scores_zero_without_an_error() -> None:
    scores = score(["", "a"], ["b", "a"])
    assert scores["exact_match"] == 50
    assert 0 <= scores["bleu"] <= 100


def score_json(prediction: object, reference: object) -> float:
    """The F1 of two values that are written as JSON."""
    return score([json.dumps(prediction)], [json.dumps(reference)])["field_f1"]


@pytest.mark.parametrize(
    ("prediction", "reference", "f1"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, 100),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, 50),
        ({"a": 1}, {"a": 1, "b": 3, "c": None}, 50),  # 1 matched, of 1 and 3 fields
        ({}, {"a": 1}, 0),
        ({}, {}, 100),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 1}, "d": 2}}, 200 / 3),
        ({"b": 1}, {"a": {"b": 1}}, 0),
        ({"a.b": 1}, {"a": {"b": 1}}, 0),
        ({"a": [1, 2]}, {"a": [2, 1]}, 100),
        ({"a": [1, 1, 1]}, {"a": [1]}, 50),  # a field matches once
        ({"a": [1, 1, 1]}, {"a": [1, 1]}, 80),
        ({"a": [1]}, {"a": 1}, 0),
        ({"a": []}, {"a": {}}, 0),
        ({"a": []}, {"a": []}, 100),
        ([{"n": "x"}, {"n": "y"}], [{"n": "y"}, {"n": "z"}], 50),
        ({"a": "1"}, {"a": 1}, 0),
        ({"a": True}, {"a": 1}, 0),
        ({"a": 1.0}, {"a": 1}, 100),
    ],
)
def test_fields_are_pairs_of_a_leaf_s_path_and_value(prediction: object, reference: object, f1: float) -> None:
    assert score_json(prediction, reference) == pytest.approx(f1, abs=1e-4)


def test_field_f1_counts_the_fields_of_all_examples() -> None:
    references = ['{"a": 1, "b": 2, "c": 3}', '{"a": 1}', "text"]
    scores = score(['{"a": 1, "b": 2, "c": 3}', "nothing", '{"a": 1}'], references)
    assert scores["field_f1"] == pytest.approx(200 * 3 / (3 + 3 + 1), abs=1e-4)
    assert scores["valid_json"] == 50  # of the two examples whose reference is JSON


@pytest.mark.parametrize(
    "prediction",
    [
        "", "{", '{"a": 1} and more', '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": Infinity}', "17", "null", '"a"',
        "[" * 200_000, '{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}", '{"a": "\ud800"}', "{'a': 1}",
    ],
)  # fmt: skip
def test_text_that_is_not_strict_json_has_no_fields(prediction: str) -> None:
    scores = score([prediction], ['{"a": 1}'], ["valid_json", "field_f1"])
    assert scores == {"valid_json": 0, "field_f1": 0}


def test_a_deeply_nested_prediction_and_large_numbers_are_compared() -> None:
    deep = '{"a":' * 400 + "1" + "}" * 400
    assert score([deep], [deep])["field_f1"] == 100
    assert score(['{"a": 1e999}'], ['{"a": 1}'])["field_f1"] == 0
    assert score(['{"a": "\\ud800"}'], ['{"a": "\\ud800"}'])["field_f1"] == 100


def test_scores_of_json_are_absent_if_no_reference_is_json() -> None:
    references = ["text", "17", '"quoted"']
    assert not {"valid_json", "field_f1"} & score(references, references).keys()
    assert not {"valid_json", "field_f1"} & score_one('{"a": 1}', "text").keys()
    assert choose_metrics(None, references) == METRICS[:7]
    assert choose_metrics(None, [*references, "[]"]) == METRICS[:9]


def test_label_metrics_are_computed_for_references_that_are_labels() -> None:
    assert choose_metrics(None, ["yes", "no"] * 5) == (*METRICS[:7], "accuracy", "macro_f1", "mcc")
    assert choose_metrics(None, ["yes", "no"]) == METRICS[:7]
    assert choose_metrics(None, ["yes", "no"], labels=["no", "yes"])[-1] == "mcc"
    assert choose_metrics(["mcc"], ["yes", "no"]) == ("mcc",)
    assert score(["yes", "?"], ["yes", "no"], ["macro_f1", "accuracy"]) == {"accuracy": 50, "macro_f1": 50}


def test_only_the_chosen_metrics_are_computed() -> None:
    assert score(PREDICTIONS, REFERENCES, ["rougeL", "bleu"]) == {
        name: score(PREDICTIONS, REFERENCES)[name] for name in ("rougeL", "bleu")
    }
    assert set(score(["{}"], ["{}"], ["chrf", "field_f1"])) == {"chrf", "field_f1"}
    assert set(score_one("a", "{}", ["bleu", "chrf", "valid_json"])) == {"chrf", "valid_json"}
    assert choose_metrics(["chrf", "exact_match"], ["{}"]) == ("exact_match", "chrf")
    with pytest.raises(SettingsError, match="metrics: field_f1: none of the 2 targets is a JSON object or array"):
        choose_metrics(["bleu", "field_f1"], ["a", "b"])


@pytest.mark.parametrize("names", [("valid", "exact"), ("field", "a", "a_b"), ("chats", "own")])
def test_a_dataset_may_be_named_like_a_metric_s_beginning(names: tuple[str, ...]) -> None:
    overall = {name: 1.0 for name in ("loss", *METRICS, "samples_per_second", "own_score")}
    by_dataset = {name: {metric: 2.0 for metric in ("loss", *METRICS)} for name in names}
    joined = {prefix_metric(name, metric): 2.0 for name in names for metric in by_dataset[name]}
    assert split_by_dataset(overall | joined, names) == (overall, by_dataset)
