"""Measure the built-in model before and after fine-tuning; prints two tables.

    python examples/pocket/report.py

The first table has the exact match on held-out conversations of each task family of pretraining. The second has the
exact match on the tasks that pretraining left out, before and after fine-tuning with the packaged run config, for seeds
0 and 1. Takes about 40 minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from families import FAMILIES
from generate import conversations
from tuning import TASKS

RECIPE = ("train", "--config", "pocket", "--save-strategy", "no")
WAYS = {"LoRA": (), "QLoRA": ("--q-lora", "--no-bf16")}


def t5tune(*arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "t5tune", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def written(folder: Path, task: str, split: str, num: int) -> Path:
    path = folder / f"{task}-{split}.jsonl"
    records = conversations(task, split, seed=1, num=num)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def exact_match(model: Path | str, data: Path, folder: Path, *flags: str) -> float:
    output = ("--output-dir", folder / "scores", "--overwrite")
    return float(t5tune("evaluate", "--model-name-or-path", model, "--data-path", data, *output, *flags)["exact_match"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket", help="the model, or a folder that pretrain.py made")
    families = [
        family for family in FAMILIES if family != "spans"
    ]  # its sentinels would be plain text in a conversation
    parser.add_argument(
        "--only", nargs="+", choices=[*families, *TASKS], metavar="NAME", help="only these rows of the tables"
    )
    options = parser.parse_args()
    asked = options.only or [*families, *TASKS]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("| family | exact match |\n|---|--:|")
        for family in filter(asked.__contains__, families):
            data = written(folder, family, "heldout", 100)
            print(f"| {family} | {exact_match(options.model, data, folder):.1f} |", flush=True)
        print("\n| task | before | LoRA | QLoRA | seconds |\n|---|--:|--:|--:|--:|")
        for task in filter(asked.__contains__, TASKS):
            train, held_out = written(folder, task, "train", 400), written(folder, task, "heldout", 200)
            cells, seconds = [f"{exact_match(options.model, held_out, folder):.1f}"], []
            for flags in WAYS.values():
                scores = []
                for seed in (0, 1):
                    given = ("--model-name-or-path", options.model, "--data-path", train, "--seed", seed, "--fresh")
                    seconds.append(t5tune(*RECIPE, *given, "--output-dir", folder / "run", *flags)["seconds"])
                    scores.append(exact_match(folder / "run", held_out, folder, *flags[:1]))
                cells.append(" / ".join(f"{score:.1f}" for score in scores))
            print(f"| {task} | {' | '.join(cells)} | {max(seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
