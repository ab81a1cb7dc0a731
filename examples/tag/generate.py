"""Generate messages about deliveries from a seed, with a tag for each word: names, streets, days and goods.

python examples/tag/generate.py --seed 0 --num 300 --output examples/tag/train.jsonl
"""

import argparse
import json
import random
from pathlib import Path

FIRST_NAMES = ("Ada", "Boris", "Chen", "Dora", "Emil", "Fatou", "Gil", "Hana", "Omar", "Rosa")
LAST_NAMES = ("Lind", "Katz", "Wei", "Maas", "Novak", "Diop", "Arad", "Sato", "West", "Brook")
STREETS = ("Mill Lane", "Harbour Road", "Castle Street", "Oak Avenue", "Station Square", "Rose Hill")
GOODS = ("desk", "lamp", "sofa", "bookcase", "mirror", "carpet")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
SENTENCES = (
    "{name} here . Could you bring a {goods} to {street} on {day} ?",
    "We need a {goods} by {day} , at {street} . The name is {name} .",
    "This is {name} , {street} . I am waiting for the {goods} ; {day} would be fine .",
    "Please bring the {goods} and the {goods} to {name} , {street} .",
    "The {goods} that you brought to {street} on {day} is broken .",
    "Is {day} a good day ? {name} is not at home .",
)


def tag(source: random.Random) -> tuple[list[str], list[str]]:
    """Generate a message's words, and their tags in the scheme IOB2."""
    values = {
        "name": lambda: f"{source.choice(FIRST_NAMES)} {source.choice(LAST_NAMES)}",
        "street": lambda: f"{source.randint(1, 99)} {source.choice(STREETS)}",
        "goods": lambda: source.choice(GOODS),
        "day": lambda: source.choice(DAYS),
    }
    tokens, tags = list[str](), list[str]()
    for word in source.choice(SENTENCES).split():
        kind = word.strip("{}")
        words = values[kind]().split() if word.startswith("{") else [word]
        tokens += words
        tags += ["O"] if word == kind else [f"B-{kind}", *[f"I-{kind}"] * (len(words) - 1)]
    return tokens, tags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    source = random.Random(given.seed)
    with given.output.open("w", encoding="utf-8") as file:
        for _ in range(given.num):
            tokens, tags = tag(source)
            file.write(json.dumps({"tokens": tokens, "ner_tags": tags}) + "\n")


if __name__ == "__main__":
    main()
