"""Write conversations in ShareGPT form, generated from a seed and the same on every machine.

    python examples/pocket/generate.py --split train --seed 0 --num 400 --output train.jsonl

`--task` is one of the tasks for fine-tuning (default: quickstart), one of the task families that the built-in model
was pretrained on, or `pretraining`, which draws from all of these families. The two splits of a seed share no
conversation.
"""

import argparse
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

from families import FAMILIES, SHARES, Turns
from tuning import TASKS

HELD_OUT_PART = 5  # one conversation in five is held out


def pretraining(rng: random.Random) -> Turns:
    """Draw a conversation from any of the task families, with the shares of pretraining."""
    return FAMILIES[rng.choices(list(SHARES), list(SHARES.values()))[0]](rng)


ALL: dict[str, Callable[[random.Random], Turns]] = {**TASKS, **FAMILIES, "pretraining": pretraining}


def conversations(task: str, split: str, seed: int, num: int) -> list[dict[str, object]]:
    """Generate `num` different conversations. A checksum assigns each conversation of a seed to one of its splits."""
    rng = random.Random(f"{task} {seed}")
    seen: set[str] = set()
    records: list[dict[str, object]] = []
    draws = 0
    while len(records) < num:
        draws += 1
        if draws > 1000 * (num + 10):
            raise SystemExit(f"{task}: only {len(records)} different conversations exist for {split}; lower --num")
        turns = ALL[task](rng)
        key = json.dumps(turns)
        is_held_out = zlib.crc32(key.encode()) % HELD_OUT_PART == 0
        if key in seen or is_held_out != (split == "heldout"):
            continue
        seen.add(key)
        said = [
            entry
            for question, answer in turns
            for entry in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
        ]
        records.append({"id": f"{task}-{split}-{seed}-{len(records)}", "conversations": said})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(ALL), default="quickstart", metavar="TASK", help=", ".join(ALL))
    parser.add_argument("--split", choices=["train", "heldout"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, required=True, help="conversations to write")
    parser.add_argument("--output", type=Path, required=True, help="a JSONL file")
    options = parser.parse_args()
    records = conversations(options.task, options.split, options.seed, options.num)
    options.output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
