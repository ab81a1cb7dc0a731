"""Compare how well each tuning method learns with full fine-tuning: every method, several seeds, one table.

    python benchmarks/parity.py --train examples/quickstart/train.jsonl --held-out examples/quickstart/heldout.jsonl

Trains the built-in model with each method in its own process and evaluates it on the held-out set. Prints a row of a
Markdown table after each method, and finally one JSON line with all metrics.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sides import t5tune

Q_LORA = ["--q-lora", "--no-bf16"]
Q_V = ["--lora-target-modules", "q", "v", "--learning-rate", "5e-3"]
ATTENTION = ["--lora-target-modules", "attention", "--learning-rate", "3e-3"]
ALL_LINEAR = ["--lora-target-modules", "all-linear", "--learning-rate", "2e-3"]
# some LoRA variants need a lower learning rate; the last of two equal flags counts
LOWER_LEARNING_RATE = ["--learning-rate", "1e-3"]

METHODS: dict[str, list[str]] = {
    "full": ["--train-mode", "full", "--learning-rate", "1e-3"],
    "LoRA q,v": Q_V,
    "LoRA attention": ATTENTION,
    "LoRA all-linear": ALL_LINEAR,
    "QLoRA nf4 q,v": [*Q_LORA, "--no-double-quant", *Q_V],
    "QLoRA nf4 + DQ q,v": [*Q_LORA, *Q_V],
    "QLoRA nf4 + DQ attention": [*Q_LORA, *ATTENTION],
    "QLoRA nf4 + DQ all-linear": [*Q_LORA, *ALL_LINEAR],
    "QLoRA fp4 q,v": [*Q_LORA, "--quant-type", "fp4", *Q_V],
    "int8 q,v": [*Q_LORA, "--quant-type", "int8", *Q_V],
}
VARIANTS: dict[str, list[str]] = {
    "DoRA q,v": [*Q_V, "--use-dora"],
    "rsLoRA all-linear": [*ALL_LINEAR, "--use-rslora", *LOWER_LEARNING_RATE],
    # these initialize B with large values, so the learning rate for B = 0 is too high
    "PiSSA q,v": [*Q_V, "--init-lora-weights", "pissa", *LOWER_LEARNING_RATE],
    "OLoRA q,v": [*Q_V, "--init-lora-weights", "olora", *LOWER_LEARNING_RATE],
    "LoRA+ q,v": [*Q_V, "--loraplus-lr-ratio", "4", "--learning-rate", "2e-3"],
    "QLoRA q,v, LoftQ": [*Q_LORA, *Q_V, "--init-lora-weights", "loftq"],
    "LoRA q,v + layer norms in full": [*Q_V, "--modules-to-save", "layer_norm", "final_layer_norm"],
}
TOKENS: dict[str, list[str]] = {
    "LoRA q,v, no tokens added": [*Q_V, "--add-tokens", "none"],
    "LoRA q,v, frozen mean rows (as in FastChat)": [*Q_V, "--no-train-token-rows"],
}
ROWS = {**METHODS, **VARIANTS, **TOKENS}
SCORES = ("exact_match", "rougeL", "chrf", "loss")


def make_base_with_mean_rows(folder: Path) -> Path:
    """Copy the built-in model as FastChat prepares a base: the rows for added tokens are the mean of all old rows."""
    from transformers import AutoTokenizer

    from t5tune.checkpoints.pocket import pocket_folder

    shutil.copytree(pocket_folder(), folder)
    count = len(AutoTokenizer.from_pretrained(folder))
    tensors = load_file(folder / "model.safetensors")
    for name in ("shared.weight", "lm_head.weight"):
        rows = tensors[name].float()
        rows[count:] = rows[:count].mean(0)
        tensors[name] = rows.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(method: str, flags: list[str], seed: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train and evaluate once."""
    base = "pocket"
    if "frozen mean" in method:
        base = str(make_base_with_mean_rows(folder / "base"))
    epochs = [] if options.epochs is None else ["--num-train-epochs", options.epochs]
    trained = t5tune(
        "train", "--config", "pocket", "--model-name-or-path", base, "--data-path", options.train,
        "--output-dir", folder / "run", "--seed", seed, "--save-strategy", "no", *epochs, *flags,
    )  # fmt: skip
    quantization = [flag for flag in flags if flag in {"--q-lora", "--quant-type", "fp4", "int8", "--no-double-quant"}]
    tokens = ["--add-tokens", "none"] if "--add-tokens" in flags else []
    scores = t5tune(
        "evaluate", "--model-name-or-path", folder / "run", "--data-path", options.held_out, *quantization, *tokens,
        "--output-dir", folder / "scores", *(["--num-data", options.num_data] if options.num_data else []),
    )  # fmt: skip
    shutil.rmtree(folder)
    return {name: scores[name] for name in SCORES} | {"trainable": trained["trainable_parameters"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="conversations to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="conversations to evaluate on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=float, help="passes over the data; default: the run config's")
    parser.add_argument("--num-data", type=int, help="evaluate on the first N examples")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", choices=list(ROWS), default=list(ROWS), help="rows of the table"
    )
    options = parser.parse_args()
    print("| method | trained | exact match | mean | RougeL | chrF | loss |", flush=True)
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    table: dict[str, list[dict[str, float]]] = {}
    for method in options.methods:
        with tempfile.TemporaryDirectory(prefix="t5tune-parity-") as folder:
            results = [run(method, ROWS[method], seed, options, Path(folder) / str(seed)) for seed in options.seeds]
        table[method] = results
        mean = {name: statistics.fmean(result[name] for result in results) for name in results[0]}
        each = " / ".join(f"{result['exact_match']:.1f}" for result in results)
        print(
            f"| {method} | {int(mean['trainable']):,} | {each} | {mean['exact_match']:.1f} | {mean['rougeL']:.2f} "
            f"| {mean['chrf']:.2f} | {mean['loss']:.4f} |",
            flush=True,
        )
    print(json.dumps({"seeds": options.seeds, "results": table}))


if __name__ == "__main__":
    main()
