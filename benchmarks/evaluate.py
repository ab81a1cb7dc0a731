"""Compare the peak memory of evaluation with that of training, on the same base and conversations.

    python benchmarks/evaluate.py --config mt5-small.json --data chats.json [--num-conversations 40] [--steps 8]
        [--num-beams 1] [--max-new-tokens N] [--model-max-length 2048] [--tokenizer FOLDER] [--vocabulary N]

Makes a random base with the shape of a config.json (`--vocabulary` sets another number of embedding rows), prepares
the conversations, then runs `t5tune train` and `t5tune evaluate` with their default settings, each in its own process.
Prints one JSON line: the peak memory of both (MB, VmHWM) and the ratio of evaluate to train.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sides import run_script, t5tune, write_base

TRAIN = """
from t5tune.cli import run
base, cache, folder, steps = arguments
run(["train", "--model-name-or-path", base, "--data-path", cache, "--output-dir", folder, "--max-steps", steps,
     "--report-samples", "0", "--quiet"])
"""
EVALUATE = """
from t5tune.cli import run
base, cache, folder, *options = arguments
run(["evaluate", "--model-name-or-path", base, "--data-path", cache, "--output-dir", folder, *options, "--quiet"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num-conversations", type=int, default=40)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--model-max-length", type=int, default=2048)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--vocabulary", type=int)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        print(json.dumps(compare(chosen, Path(folder))))


def compare(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the peak memory of both commands."""
    config = json.loads(chosen.config.read_text())
    if chosen.vocabulary:
        config["vocab_size"] = chosen.vocabulary
    base = write_base(folder / "base", config)
    for file in chosen.tokenizer.iterdir() if chosen.tokenizer else []:
        if not file.name.startswith(("config", "generation")):
            shutil.copy(file, base)
    records = json.loads(chosen.data.read_text())[: chosen.num_conversations]
    (folder / "data.json").write_text(json.dumps(records))
    cache = folder / "cache"
    t5tune(
        "prepare", "--model-name-or-path", base, "--data-path", folder / "data.json", "--output-dir", cache,
        "--model-max-length", chosen.model_max_length,
    )  # fmt: skip
    manifest = json.loads((cache / "manifest.json").read_text())
    train = run_script(TRAIN, [base, cache, folder / "run", str(chosen.steps)], folder / "train")
    options = ["--num-beams", str(chosen.num_beams)]
    if chosen.max_new_tokens:
        options += ["--max-new-tokens", str(chosen.max_new_tokens)]
    evaluate = run_script(EVALUATE, [base, cache, folder / "scores", *options], folder / "evaluate")
    return {
        "config": chosen.config.name,
        "vocabulary": config["vocab_size"],
        "examples": manifest["examples"],
        "longest": [manifest[f"{side}_length"]["p100"] for side in ("source", "target")],
        "num_beams": chosen.num_beams,
        "train_mb": train["peak_mb"],
        "evaluate_mb": evaluate["peak_mb"],
        "ratio": round(evaluate["peak_mb"] / train["peak_mb"], 3),
    }


if __name__ == "__main__":
    main()
