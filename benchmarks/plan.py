"""Compare the memory that `plan` estimates with the memory of the run, on the CPU, for five shapes.

    python benchmarks/plan.py [NAME …]

Makes a random base of the shape and examples of one length, plans from config.json and the cache, trains two steps,
and compares with the peak memory of the process (VmHWM). Prints one JSON line per shape.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sides import t5tune, write_base

from t5tune.planning.known_configs import KNOWN_CONFIGS

SHAPES: dict[str, dict[str, Any]] = {
    # name: shape of config.json, lengths, and the settings of the run
    "small-fp32": {
        "size": "google/flan-t5-small",
        "lengths": (384, 96),
        "flags": ["--per-device-train-batch-size", "8"],
    },
    # computes in fp32, so that it can be measured on CPUs without bf16 arithmetic
    "base-nf4": {
        "size": "google/flan-t5-base",
        "lengths": (384, 64),
        "flags": ["--per-device-train-batch-size", "4", "--q-lora", "--no-bf16"],
    },
    "base-nf4-light": {
        "size": "google/flan-t5-base",
        "lengths": (384, 64),
        "flags": ["--per-device-train-batch-size", "4", "--q-lora", "--no-bf16", "--gradient-checkpointing"],
    },
    "base-light": {
        "size": "google/flan-t5-base",
        "lengths": (384, 64),
        "flags": ["--per-device-train-batch-size", "4", "--gradient-checkpointing"],
    },
    "small-full-padded": {
        "size": "google/flan-t5-small",
        "lengths": (256, 64),
        "flags": ["--per-device-train-batch-size", "8", "--train-mode", "full", "--packing", "off"],
    },
}


def main(names: list[str]) -> None:
    for name in names or SHAPES:
        print(json.dumps({"shape": name, **compare(**SHAPES[name])}), flush=True)


def compare(size: str, lengths: tuple[int, int], flags: list[str]) -> dict[str, Any]:
    """Return planned and measured bytes, and their ratio."""
    with tempfile.TemporaryDirectory(prefix="t5tune-plan-") as text:
        folder = Path(text)
        base = write_base(folder / "base", KNOWN_CONFIGS[size])
        data = make_examples(folder / "data.jsonl", *lengths)
        common = ["--model-name-or-path", base, "--use-cpu", *flags]
        cache = ["--data-path", data, "--output-dir", folder / "cache", "--model-max-length", "2048"]
        t5tune("prepare", "--model-name-or-path", base, *cache, "--add-tokens", "none")
        planned = t5tune("plan", *common, "--data-path", folder / "cache")
        run = ["--data-path", folder / "cache", "--output-dir", folder / "run", "--max-steps", "2"]
        measured = t5tune("train", *common, *run, "--report-samples", "0")["peak_memory_bytes"]
    (chosen,) = [stage for stage in planned["stages"] if stage["stage"] == planned["chosen"]]
    return {"planned": chosen["total"], "measured": measured, "ratio": round(chosen["total"] / measured, 3), **chosen}


def make_examples(path: Path, source: int, target: int, count: int = 64) -> Path:
    """Write examples of about these numbers of tokens, from short words of one or two tokens each."""
    words = ["the", "cat", "and", "a", "pie", "for", "me"]

    def text(length: int, start: int) -> str:
        return " ".join(words[(start + place) % len(words)] for place in range(length))

    lines = (json.dumps({"source": text(source, i), "target": text(target, i + 1)}) for i in range(count))
    path.write_text("\n".join(lines))
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
