"""Write conversations for the built-in model: seeded, and the same on every machine.

    python examples/pocket/generate.py --split train --seed 0 --num 400 --output train.jsonl

Task `quickstart`: somebody orders at a counter, and often corrects the order; the assistant answers with the
order as an object of JSON over several lines. The two splits of a seed share no conversation.
"""

import argparse
import json
import random
from pathlib import Path

NAMES = ["Mira", "Tomas", "Lena", "Omar", "Ines", "Karl", "Nora", "Davi", "Ruth", "Timo", "Aida", "Jon"]
ITEMS = ["coffee", "tea", "bread", "apple", "cake", "soup", "water", "juice", "pie", "egg"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
OPENINGS = [
    "Hello, {order} for {name} please.",
    "I would like {order}. My name is {name}.",
    "{name} here, can I get {order}?",
    "Could you bring {order} to {name}?",
    "An order for {name}: {order}.",
]
CHANGES = [
    "Sorry, make it {number} {item}.",
    "No wait, {number} {item} please.",
    "Can I change that to {number} {item}?",
    "I meant {number} {item}.",
]
ADDITIONS = ["And {number} {item} too.", "Please add {number} {item}.", "Also {number} {item}."]


def written(count: int, item: str) -> str:
    """A count and an item as a speaker says them: `two coffee`."""
    return f"{NUMBERS[count - 1]} {item}"


def as_json(name: str, order: dict[str, int]) -> str:
    """The answer: one line per entry, indented by two spaces."""
    return json.dumps({"name": name, **order}, indent=2)


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """One customer: an order, and up to two changes to it."""
    name = rng.choice(NAMES)
    order = {item: rng.randint(1, 9) for item in rng.sample(ITEMS, rng.randint(1, 3))}
    said = [written(count, item) for item, count in order.items()]
    listed = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    turns = [
        {"from": "human", "value": rng.choice(OPENINGS).format(order=listed, name=name)},
        {"from": "gpt", "value": as_json(name, order)},
    ]
    for _ in range(rng.choice([0, 1, 1, 2])):
        count = rng.randint(1, 9)
        missing = [item for item in ITEMS if item not in order]
        adds = rng.random() < 0.4
        item = rng.choice(missing if adds else list(order))
        order[item] = count
        text = rng.choice(ADDITIONS if adds else CHANGES).format(number=NUMBERS[count - 1], item=item)
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": as_json(name, order)}]
    return turns


def conversations(split: str, seed: int, num: int) -> list[dict[str, object]]:
    """`num` different conversations; those of a seed's two splits come from one stream, by turns of a hash."""
    rng = random.Random(f"quickstart {seed}")
    seen: set[str] = set()
    records: list[dict[str, object]] = []
    while len(records) < num:
        turns = conversation(rng)
        key = json.dumps(turns)
        # a string's own hash differs from process to process; this sum does not
        is_held_out = sum(key.encode()) % 5 == 0
        if key in seen or is_held_out != (split == "heldout"):
            continue
        seen.add(key)
        records.append({"id": f"quickstart-{split}-{seed}-{len(records)}", "conversations": turns})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["quickstart"], default="quickstart")
    parser.add_argument("--split", choices=["train", "heldout"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, required=True, help="conversations to write")
    parser.add_argument("--output", type=Path, required=True, help="a JSONL file")
    options = parser.parse_args()
    records = conversations(options.split, options.seed, options.num)
    options.output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
