"""Scores equal values computed by hand and those of the libraries with their default settings."""

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from t5tune.metrics import score, score_one

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


def test_scores_of_ascii_text_equal_those_of_rouge_score_and_sacrebleu() -> None:
    stock = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = score(PREDICTIONS, REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL"):
        pairs = zip(REFERENCES, PREDICTIONS, strict=True)
        expected = sum(stock.score(*pair)[name].fmeasure for pair in pairs) / 3 * 100
        assert scores[name] == pytest.approx(expected, abs=1e-3)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score, abs=1e-3)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score, abs=1e-3)


def test_rouge_works_for_non_latin_scripts() -> None:
    assert score_one("мама мыла раму", "мама мыла раму")["rougeL"] == 100
    assert 0 < score_one("мама мыла окно", "мама мыла раму")["rougeL"] < 100


def test_an_empty_prediction_scores_zero_without_an_error() -> None:
    scores = score(["", "a"], ["b", "a"])
    assert scores["exact_match"] == 50
    assert 0 <= scores["bleu"] <= 100
