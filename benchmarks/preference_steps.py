"""Compare a step on preference pairs: its speed with two separate passes, its memory with SFT on the same tokens.

    python benchmarks/preference_steps.py

The model has the shape of Flan-T5-small and random weights. A batch has pairs of a source and two targets, all of them
packed. `shared` encodes a source once for both targets, as training does; `separate` twice, with the same loss. `sft`
has the same number of source and target tokens, a single target for each source. The three take turns in separate
processes. They train LoRA on q and v, LoRA with 19 token rows, or all weights; in the latter two, the gradient of the
head is computed from logits that the backward pass computes again.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sides import read_process_memory, run_self, write_base

from t5tune.model.attention.packing import use_packing
from t5tune.model.attention.segments import Segments
from t5tune.model.kernels.fused import use_fused_layers
from t5tune.model.load import load_base
from t5tune.model.lora import add_lora
from t5tune.model.preferences import compute_dpo_losses, sum_answers
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.settings.groups.lora import LoraSettings

WAYS = ("shared", "separate", "sft")
TRAINED = ("lora", "token rows", "full")
PAIRS, WARM_UP = 4, 2
TOKEN_ROWS = 19


def make_batch(way: str, source: int, target: int) -> tuple[dict[str, Any], Segments]:
    """Make a packed row of random tokens."""
    torch.manual_seed(0)
    sources = [torch.randint(3, 32000, (source,)) for _ in range(PAIRS)]
    targets = [torch.randint(3, 32000, (target,)) for _ in range(2 * PAIRS)]
    if way == "separate":
        sources = [each for each in sources for _ in range(2)]
    lengths = [len(each) for each in targets]
    if way == "sft":
        lengths = [2 * target] * PAIRS
    segments = Segments(tuple(map(len, sources)), tuple(lengths), targets_per_source=2 if way == "shared" else 1)
    row = torch.cat(targets)[None]
    batch = {"input_ids": torch.cat(sources)[None], "decoder_input_ids": row, "labels": row, "packing": segments}
    return batch, segments


def measure(way: str, trained: str, base: Path, source: int, target: int, steps: int) -> dict[str, float]:
    """Train some steps in this process. Return seconds per step, and the peak of memory above that before the first."""
    torch.manual_seed(0)
    model = load_base(base, torch.float32, torch.device("cpu"))
    if trained == "full":
        model.requires_grad_(True)
    else:
        rows = list(range(32100, 32100 + TOKEN_ROWS)) if trained == "token rows" else []
        model, _ = add_lora(model, base, LoraSettings(lora_dropout=0.0), rows, torch.float32)
    use_packing(model)
    use_fused_layers(model)
    batch, segments = make_batch(way, source, target)
    reference = torch.zeros(PAIRS, 2, dtype=torch.float64)
    before, seconds = read_process_memory("VmRSS"), []
    for step in range(WARM_UP + steps):
        started = time.perf_counter()
        if way == "sft":
            loss = model(**batch, reduction="sum")
        else:
            policy, _ = sum_answers(model(**batch, reduction="none"), batch["labels"], segments)
            loss = compute_dpo_losses(policy, reference, beta=0.1).sum()
        loss.backward()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - started)
        model.zero_grad()
    return {"seconds": statistics.median(seconds), "peak_mb": (read_process_memory("VmHWM") - before) / 1e6}


def compare(options: argparse.Namespace, base: Path) -> list[dict[str, Any]]:
    found = []
    for trained in TRAINED:
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way, results in rounds.items():
                arguments = ("--way", way, "--trained", trained, "--base", base, "--steps", options.steps)
                lengths = ("--source", options.source, "--target", options.target)
                results.append(run_self(*arguments, *lengths, OMP_NUM_THREADS="1"))
        best = {way: min(each["seconds"] for each in results) for way, results in rounds.items()}
        peaks = {way: max(each["peak_mb"] for each in results) for way, results in rounds.items()}
        tokens = PAIRS * (options.source + 2 * options.target)
        found.append(
            {
                "trained": trained,
                "tokens_per_second": {way: round(tokens / seconds, 1) for way, seconds in best.items()},
                "times_as_fast_as_separate": round(best["separate"] / best["shared"], 3),
                "peak_mb": {way: round(peak) for way, peak in peaks.items()},
                "memory_of_sft": round(peaks["shared"] / peaks["sft"], 3),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=int, default=512, help="tokens of each source")
    parser.add_argument("--target", type=int, default=128, help="tokens of each target")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--trained", choices=TRAINED)
    parser.add_argument("--base", type=Path)
    options = parser.parse_args()
    if options.way is not None:
        lengths = options.source, options.target, options.steps
        print(json.dumps(measure(options.way, options.trained, options.base, *lengths)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder, "base"), KNOWN_CONFIGS["google/flan-t5-small"])
        print(json.dumps({"source": options.source, "target": options.target, "results": compare(options, base)}))


if __name__ == "__main__":
    main()
