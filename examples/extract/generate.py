"""Generate messages about deliveries from a seed, and the JSON with the same content.

python examples/extract/generate.py --seed 0 --num 300 --output examples/extract/train.jsonl
"""

import argparse
import json
import random
from pathlib import Path

NAMES = ("Ada Lind", "Boris Katz", "Chen Wei", "Dora Maas", "Emil Novak", "Fatou Diop", "Gil Arad", "Hana Sato")
STREETS = ("Mill Lane", "Harbour Road", "Castle Street", "Oak Avenue", "Station Square")
GOODS = ("desk", "lamp", "sofa", "bookcase", "mirror", "carpet")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
OPENINGS = ("Hi,", "Hello,", "Good morning,", "")
NOTES = ("Please ring twice.", "The lift is broken.", "Call before you come.", "")


def message(source: random.Random) -> tuple[str, str]:
    """Generate a message and its JSON, over several lines."""
    name, street, number = source.choice(NAMES), source.choice(STREETS), source.randint(1, 99)
    day, note = source.choice(DAYS), source.choice(NOTES)
    goods = source.sample(GOODS, source.randint(1, 3))
    counts = [source.randint(1, 4) for _ in goods]
    listed = [f"{count} {what}{'s' if count > 1 else ''}" for count, what in zip(counts, goods, strict=True)]
    order = " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
    text = source.choice(
        (
            f"{name} here. Could you bring {order} to {number} {street} on {day}?",
            f"we need {order} by {day}, at {number} {street}. The name is {name}.",
            f"this is {name}, {number} {street}. I am waiting for {order}; {day} would be fine.",
        )
    )
    said = " ".join(part for part in (source.choice(OPENINGS), text, note) if part)
    found = {
        "name": name,
        "address": {"street": street, "number": number},
        "day": day,
        "goods": dict(zip(goods, counts, strict=True)),
        "note": note or None,
    }
    return said, json.dumps(found, indent=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    source = random.Random(given.seed)
    with given.output.open("w", encoding="utf-8") as file:
        for _ in range(given.num):
            prompt, completion = message(source)
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


if __name__ == "__main__":
    main()
