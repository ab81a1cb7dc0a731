"""Compare scoring labels with one encoder pass per source, and with a pass per label.

    python benchmarks/labels.py

The models have the shapes of Flan-T5-small and -base and random weights. Each source has 60 to 240 random tokens and 8
labels of 2 to 4 tokens, as of a classifier. `shared` scores a source's labels together, as `evaluate --choices` does;
`separate` makes an example of each label, in the same packed batches. Both take turns in separate processes, with one
thread. The results must agree: `largest_difference` is in nats.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides import run_self, write_base

from t5tune.data.tokens.encoding import Example
from t5tune.evaluation.scoring import measure_targets
from t5tune.inference.target_scores import Candidates, score_targets, set_up_scoring
from t5tune.model.load import load_base
from t5tune.planning.known_configs import KNOWN_CONFIGS

SHAPES = {"flan-t5-small": "google/flan-t5-small", "flan-t5-base": "google/flan-t5-base"}
WAYS = ("shared", "separate")
NUM_LABELS, EOS = 8, 1


def make_sources(count: int) -> list[Example]:
    """Make sources with the same labels."""
    rng = np.random.default_rng(0)

    def make_ids(low: int, high: int) -> Any:
        return np.append(rng.integers(3, 32000, rng.integers(low, high)), EOS)

    first, *others = (make_ids(1, 4) for _ in range(NUM_LABELS))
    return [Candidates(make_ids(59, 240), first, tuple(others)) for _ in range(count)]


def score_labels(way: str, base: Path, count: int) -> dict[str, Any]:
    """Score the labels of some sources in this process."""
    model = load_base(base, torch.float32, torch.device("cpu"))
    collator = set_up_scoring(model, pad_token_id=0)
    sources = make_sources(count)
    examples = [Example(each.source_S, target) for each in sources for target in each.targets]
    examples = sources if way == "shared" else examples
    score_targets(model, examples[:2], collator)
    started = time.perf_counter()
    found = measure_targets(model, examples, collator, None, measure=score_targets)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "logprobs": [score.logprob for scores in found for score in scores]}


def compare_labels(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for shape, name in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = write_base(Path(folder, "base"), KNOWN_CONFIGS[name])
            rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way, results in rounds.items():
                    arguments = ("--way", way, "--base", base, "--sources", options.sources)
                    results.append(run_self(*arguments, OMP_NUM_THREADS="1"))
        best = {way: min(each["seconds"] for each in results) for way, results in rounds.items()}
        logprobs = [np.array(results[0]["logprobs"]) for results in rounds.values()]
        found.append(
            {
                "shape": shape,
                "labels": NUM_LABELS,
                "sources_per_second": {way: round(options.sources / seconds, 2) for way, seconds in best.items()},
                "times_as_fast_as_separate": round(best["separate"] / best["shared"], 2),
                "largest_difference": float(np.abs(logprobs[0] - logprobs[1]).max()),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sources", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(score_labels(options.way, options.base, options.sources)))
        return
    print(json.dumps({"sources": options.sources, "labels": compare_labels(options)}))


if __name__ == "__main__":
    main()
