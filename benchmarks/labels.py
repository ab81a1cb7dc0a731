"""Compare scoring labels with one encoder pass per source, and training an encoder with packed batches.

    python benchmarks/labels.py [--sources 24]
    python benchmarks/labels.py --training [--proteins 40]

The models have the shapes of Flan-T5-small and -base and random weights. Each source has 60 to 240 random tokens and 8
labels of 2 to 4 tokens, as of a classifier. `shared` scores a source's labels together, as `evaluate --choices` does;
`separate` makes an example of each label, in the same packed batches. Both take turns in separate processes, with one
thread. The results must agree: `largest_difference` is in nats.

With `--training`, LoRA with rank 4 on attention learns a label for each residue of random proteins of 30 to 1,000
residues (median 270, as in Swiss-Prot), with ProtT5-XL's proportions at a quarter of its width, three layers, in fp32
on one thread. `random` is transformers and PEFT with padded batches of 4 random proteins, as in ProtTrans notebooks;
`grouped` the same with proteins of like length; `packed` is t5tune with batches of 2,048 tokens. Each goes through all
proteins once; `loss` and `gradient`, the norm of its gradient, must agree.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sides import run_self, write_base
from transformers import T5ForTokenClassification

from t5tune.data.caches.batching import TokenBudget
from t5tune.data.labels import LabelTask
from t5tune.data.tokens.encoding import Example, LabeledExample
from t5tune.evaluation.scoring import measure_targets
from t5tune.inference.target_scores import Candidates, score_targets, set_up_scoring
from t5tune.model.attention.packing import use_packing
from t5tune.model.batches import LabelCollator
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.label_losses import compute_label_losses
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.settings.groups.lora import LoraSettings

SHAPES = {"flan-t5-small": "google/flan-t5-small", "flan-t5-base": "google/flan-t5-base"}
WAYS = ("shared", "separate")
NUM_LABELS, EOS = 8, 1
TRAINING_WAYS = ("random", "grouped", "packed")
PROTEIN_TASK = LabelTask("tag", per_token=True, several=False, names=("C", "E", "H"), source_words="residues")
PROTEIN_SHAPE = {
    **KNOWN_CONFIGS["google-t5/t5-3b"], "vocab_size": 128, "d_model": 256, "d_kv": 64, "d_ff": 4096, "num_heads": 16,
    "num_layers": 3, "num_decoder_layers": 1, "dropout_rate": 0.0,
}  # fmt: skip
PROTEINS_PER_BATCH, TOKENS_PER_BATCH = 4, 2048


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


def make_proteins(count: int) -> list[LabeledExample]:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(270), 0.75, count)), 30, 1000).astype(int)

    def make(length: int) -> LabeledExample:
        values = np.append(rng.integers(0, 3, length), np.nan).astype(np.float32)
        return LabeledExample(np.append(rng.integers(3, 23, length), EOS), np.zeros(0, np.int64), values)

    return [make(length) for length in lengths]


def make_training_batches(way: str, proteins: list[LabeledExample]) -> list[Any]:
    lengths = np.array([len(each.source_S) for each in proteins])
    if way == "packed":
        budget, none = TokenBudget(TOKENS_PER_BATCH, True, 1, 0), np.zeros_like(lengths)
        return budget.make_batches(lengths, none, budget.count_batches(lengths, none), 0)
    order = (
        np.random.default_rng(1).permutation(len(lengths)) if way == "random" else np.argsort(lengths, kind="stable")
    )
    return [order[start : start + PROTEINS_PER_BATCH] for start in range(0, len(order), PROTEINS_PER_BATCH)]


def train_encoder(way: str, base: Path, count: int) -> dict[str, Any]:
    """Compute the gradients of all proteins once, in this process."""
    torch.manual_seed(0)
    collator = LabelCollator(PROTEIN_TASK, pad_token_id=0, is_packed=way == "packed")
    model: Any
    if way == "packed":
        model = load_base(base, torch.float32, torch.device("cpu"), task=PROTEIN_TASK)
        lora = LoraSettings(lora_r=4, lora_alpha=4, lora_dropout=0, lora_target_modules=["attention"])
        model, _ = add_lora(model, base, lora, [], torch.float32)
        use_packing(model)
        use_fused_layers(model)
    else:
        model = T5ForTokenClassification.from_pretrained(base, num_labels=3)
        torch.nn.init.zeros_(model.classifier.weight)
        torch.nn.init.zeros_(model.classifier.bias)
        lora_config = LoraConfig("TOKEN_CLS", r=4, lora_alpha=4, target_modules=["q", "k", "v", "o"])
        model = get_peft_model(model, lora_config)
    model.train()
    proteins = make_proteins(count)
    total, num_labels = 0.0, sum(len(each.values) - 1 for each in proteins)

    def train_step(chosen: Any) -> float:
        batch = collator([proteins[index] for index in chosen])
        labels = batch.pop("labels")
        logits = model(**batch) if way == "packed" else model(**batch).logits
        loss = compute_label_losses(logits, labels, PROTEIN_TASK, 1.0).sum() / num_labels
        loss.backward()
        return float(loss.detach())

    batches = make_training_batches(way, proteins)
    train_step(batches[0])
    model.zero_grad()
    started = time.process_time()
    for chosen in batches:
        total += train_step(chosen)
    seconds = time.process_time() - started
    num_tokens = sum(len(each.source_S) for each in proteins)
    gradients = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.stack(gradients).norm())
    return {"loss": total, "gradient": norm, "tokens_per_second": round(num_tokens / seconds, 1)}


def compare_training(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder, "base"), PROTEIN_SHAPE)
        rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in TRAINING_WAYS}
        for _ in range(options.rounds):
            for way, results in rounds.items():
                arguments = ("--way", way, "--base", base, "--proteins", options.proteins)
                results.append(run_self(*arguments, OMP_NUM_THREADS="1"))
    best = {way: max(each["tokens_per_second"] for each in results) for way, results in rounds.items()}
    return {
        "proteins": options.proteins,
        "tokens_per_second": best,
        "packed_by_random": round(best["packed"] / best["random"], 2),
        "packed_by_grouped": round(best["packed"] / best["grouped"], 2),
        **{name: {way: round(found[0][name], 6) for way, found in rounds.items()} for name in ("loss", "gradient")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sources", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--proteins", type=int, default=40)
    parser.add_argument("--way", choices=(*WAYS, *TRAINING_WAYS))
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    if options.way in TRAINING_WAYS:
        print(json.dumps(train_encoder(options.way, options.base, options.proteins)))
        return
    if options.training:
        print(json.dumps(compare_training(options)))
        return
    if options.way is not None:
        print(json.dumps(score_labels(options.way, options.base, options.sources)))
        return
    print(json.dumps({"sources": options.sources, "labels": compare_labels(options)}))


if __name__ == "__main__":
    main()
