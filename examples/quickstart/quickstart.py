"""Run the whole chain on the built-in model: prepare, train with LoRA and QLoRA, export, merge, evaluate and chat.

python examples/quickstart/quickstart.py [--output-dir runs/quickstart]
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPT = "Hello, three coffees and one sandwich for Mira please."


def t5tune(*arguments: str | Path) -> dict[str, Any]:
    """Print and run a command; its progress goes to the terminal. Returns its JSON result."""
    words = [str(argument) for argument in arguments]
    print("\n$ t5tune " + " ".join(f'"{word}"' if " " in word else word for word in words), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "t5tune", *words, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return dict(json.loads(done.stdout))


def into(folder: Path) -> list[str | Path]:
    """Return the flags that write to a folder, and replace leftovers of an interrupted quickstart."""
    return ["--output-dir", folder, *(["--overwrite"] if folder.exists() else [])]


def size(folder: Path) -> str:
    """Format the total size of the files in a folder, in KiB or MiB."""
    total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return f"{total / 1024:.0f} KiB" if total < 1 << 20 else f"{total / (1 << 20):.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--max-steps", default="120", help="steps of each training; 120 show that it works")
    options = parser.parse_args()
    out = options.output_dir
    if (out / "after").exists():
        print(f"replacing {out} of an earlier quickstart", file=sys.stderr)
        shutil.rmtree(out)
    elif out.exists():
        print(f"resuming the interrupted quickstart in {out}", file=sys.stderr)
    cache, lora, run, adapter, merged = (out / name for name in ("cache", "lora", "run", "adapter", "merged"))
    started = time.monotonic()

    base = ["--model-name-or-path", "pocket"]
    held_out = ["--data-path", HERE / "heldout.jsonl", "--num-data", "200"]
    prepared = t5tune("prepare", *base, "--data-path", HERE / "train.jsonl", "--output-dir", cache)
    before = t5tune("evaluate", *base, *held_out, *into(out / "before"))
    train = ["train", "--config", "pocket", "--data-path", cache, "--max-steps", options.max_steps]
    plain = t5tune(*train, "--output-dir", lora)
    with_lora = t5tune("evaluate", "--model-name-or-path", lora, *held_out, *into(out / "after-lora"))
    trained = t5tune(*train, "--q-lora", "--output-dir", run)
    exported = t5tune("export", run, *into(adapter))
    t5tune("merge", *base, "--adapter", adapter, *into(merged))
    after = t5tune("evaluate", "--model-name-or-path", merged, *held_out, *into(out / "after"))
    answer = t5tune("chat", "--model-name-or-path", merged, "--prompt", PROMPT, "--max-new-tokens", "80")

    rows = [
        ("token cache", cache, f"{prepared['examples']} examples from {prepared['conversations']} conversations"),
        ("LoRA run", lora, told(lora, plain)),
        ("QLoRA run", run, told(run, trained)),
        ("adapter", adapter, f"{exported['lora_tensors']} LoRA tensors, {size(adapter)}"),
        ("merged model", merged, f"loads with AutoModelForSeq2SeqLM, {size(merged)}"),
    ]
    print(f"\nCreated in {time.monotonic() - started:.0f} seconds:\n")
    for what, where, facts in rows:
        print(f"  {what:<14}{where!s:<28}{facts}")
    print(f"\nScores on {after['examples']} held-out examples:\n")
    for name, label in (("exact_match", "exact match"), ("rougeL", "RougeL"), ("perplexity", "perplexity")):
        values = (("before", before), ("LoRA", with_lora), ("QLoRA", after))
        print(f"  {label:<14}" + "    ".join(f"{when} {scores[name]:>7.2f}" for when, scores in values))
    question, target, was = sample(out / "before")
    _, _, now = sample(out / "after")
    for label, text in (("source", question), ("target", target), ("before", was), ("after", now)):
        print(f"\n  {label:<14}" + text.replace("\n", "\n" + " " * 16))
    print(f"\n  you:          {PROMPT}\n  model:        " + answer["reply"].replace("\n", "\n" + " " * 16))
    own_data = "--data-path YOURS.jsonl --learning-rate 3e-4 --output-dir tuned"
    print(f"\n  report        {run / 'report.html'}")
    print(f"  next          t5tune chat {shlex.quote(str(merged))}")
    print(f"                t5tune train --model-name-or-path google/flan-t5-base {own_data}")


def sample(folder: Path) -> tuple[str, str, str]:
    """Return the source, target and prediction of the first held-out example."""
    line = json.loads((folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return line["source"], line["target"], line["prediction"]


def told(run: Path, trained: dict[str, Any]) -> str:
    """Describe a run: steps, seconds, and its first and last training loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return f"{trained['steps']} steps in {trained['seconds']:.0f} s, loss {losses[0]:.2f} → {losses[-1]:.2f}"


if __name__ == "__main__":
    main()
