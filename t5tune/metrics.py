"""Scores of predictions against references, 0 to 100: exact match, ROUGE, BLEU and chrF.

    score(["Hello."], ["Hello."])["rougeL"]  # 100.0

ROUGE is rouge-score's (Lin 2004), BLEU and chrF are sacrebleu's (Post 2018) with its own defaults.
"""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

ROUGES = ("rouge1", "rouge2", "rougeL")


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The corpus's scores: means over examples, but for BLEU and chrF, which count over all of it."""
    import sacrebleu

    examples = [score_one(*pair) for pair in zip(predictions, references, strict=True)]
    scores = {name: fmean(example[name] for example in examples) for name in ("exact_match", *ROUGES)}
    scores["bleu"] = float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)
    scores["chrf"] = float(sacrebleu.corpus_chrf(list(predictions), [list(references)]).score)
    return {name: round(value, 4) for name, value in scores.items()}


def score_one(prediction: str, reference: str) -> dict[str, float]:
    """Scores of one prediction; there is no BLEU of a single sentence that would mean much."""
    import sacrebleu

    rouge = _rouge_scorer().score(reference, prediction)
    return {
        "exact_match": 100.0 * (prediction == reference),
        **{name: round(100.0 * rouge[name].fmeasure, 4) for name in ROUGES},
        "chrf": round(float(sacrebleu.sentence_chrf(prediction, [reference]).score), 4),
    }


class _UnicodeWords:
    """rouge-score's words, of every script: its own tokenizer drops all that isn't ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGES), tokenizer=_UnicodeWords())
