"""Score predictions against references from 0 to 100: exact match, ROUGE, BLEU and chrF.

    score(["Hello."], ["Hello."])["rougeL"]  # 100.0

ROUGE is computed by rouge-score (Lin 2004), BLEU and chrF by sacrebleu (Post 2018) with its defaults.
"""

import re
from collections.abc import Sequence
from statistics import fmean

ROUGES = ("rouge1", "rouge2", "rougeL")


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score a corpus: exact match and ROUGE are means over the examples, BLEU and chrF are corpus scores."""
    import sacrebleu

    examples = [score_one(*pair) for pair in zip(predictions, references, strict=True)]
    scores = {name: fmean(example[name] for example in examples) for name in ("exact_match", *ROUGES)}
    scores["bleu"] = float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)
    scores["chrf"] = float(sacrebleu.corpus_chrf(list(predictions), [list(references)]).score)
    return {name: round(value, 4) for name, value in scores.items()}


def score_one(prediction: str, reference: str) -> dict[str, float]:
    """Score one prediction, without BLEU, which means little for a single sentence."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(list(ROUGES), tokenizer=_UnicodeTokenizer()).score(reference, prediction)
    return {
        "exact_match": 100.0 * (prediction == reference),
        **{name: round(100.0 * rouge[name].fmeasure, 4) for name in ROUGES},
        "chrf": round(float(sacrebleu.sentence_chrf(prediction, [reference]).score), 4),
    }


class _UnicodeTokenizer:
    """Word tokenizer for rouge-score that supports every script; its default one drops all non-ASCII characters."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())
