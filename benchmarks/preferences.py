"""Teach the built-in model which of two styles is preferred, with DPO and with ORPO, and see whether the content stays.

    python benchmarks/preferences.py --seeds 0 1

An order is written down in one of two styles, `Mira: two teas` or `two teas for Mira`. Supervised tuning sees both as
often, so that the model writes either. Then it learns from pairs of the same content that the second one is better.
Measured are the share of replies in the preferred style, and the share whose name, number and thing are right in
either style, for held-out orders. ORPO learns from the pairs alone, without supervised tuning before it.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from t5tune import EvaluateSettings, TrainSettings, evaluate, train

NAMES = [
    "Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Leo", "Mira", "Nils",
    "Olga", "Paul", "Rosa", "Sam", "Tara", "Vera"
]  # fmt: skip
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
THINGS = [
    "teas", "cakes", "apples", "books", "lamps", "chairs", "tables", "boxes", "cups", "plates", "spoons", "pens",
    "cards", "keys", "stones", "roses"
]  # fmt: skip
QUESTIONS = ("{name} would like {number} {thing}, please.", "Please note that {name} wants {number} {thing}.")
ORDERS, HELD_OUT = 600, 200


class Order:
    """An order, and the two ways to write it down."""

    def __init__(self, source: random.Random) -> None:
        self.name, self.number, self.thing = map(source.choice, (NAMES, NUMBERS, THINGS))
        self.question = source.choice(QUESTIONS).format(name=self.name, number=self.number, thing=self.thing)
        self.plain = f"{self.name}: {self.number} {self.thing}"
        self.preferred = f"{self.number} {self.thing} for {self.name}"


def write_lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_orders(seed: int) -> tuple[list[Order], list[Order]]:
    """Make different orders: those to learn from, and the held-out ones."""
    source, found = random.Random(seed), dict[str, Order]()
    while len(found) < ORDERS + HELD_OUT:
        order = Order(source)
        found.setdefault(order.plain, order)
    orders = list(found.values())
    return orders[HELD_OUT:], orders[:HELD_OUT]


def score(run: Path, asked: Path, orders: list[Order], folder: Path) -> dict[str, float]:
    """Predict greedily, and return the percentages of replies in the preferred style and with the right content."""
    evaluate(EvaluateSettings(model_name_or_path=str(run), data_path=asked, output_dir=folder, use_cpu=True))
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    replies = [json.loads(line)["prediction"] for line in lines]
    pairs = list(zip(replies, orders, strict=True))
    in_style = sum(" for " in reply and ":" not in reply for reply, _ in pairs)
    is_right = sum(reply in (order.plain, order.preferred) for reply, order in pairs)
    return {"preferred_style": 100 * in_style / len(pairs), "right_content": 100 * is_right / len(pairs)}


def run(seed: int, dpo_learning_rate: float, folder: Path) -> dict[str, Any]:
    """Tune with one seed: supervised, then with DPO, and with ORPO."""
    orders, held_out = make_orders(seed)
    styles = random.Random(seed)
    sft = [{"source": each.question, "target": styles.choice((each.plain, each.preferred))} for each in orders]
    pairs, held_out_pairs = (
        [{"prompt": each.question, "chosen": each.preferred, "rejected": each.plain} for each in part]
        for part in (orders, held_out)
    )
    data = write_lines(folder / "sft.jsonl", sft), write_lines(folder / "pairs.jsonl", pairs)
    asked = write_lines(folder / "asked.jsonl", [{"source": e.question, "target": e.preferred} for e in held_out])
    judged = write_lines(folder / "held-out.jsonl", held_out_pairs)
    common: dict[str, Any] = {
        "model_name_or_path": "pocket", "use_cpu": True, "report_samples": 0, "seed": seed, "logging_steps": 20,
        "per_device_train_batch_size": 16, "lora_r": 16, "lora_target_modules": "all-linear", "save_strategy": "no",
        "conversation_template": "plain", "lr_scheduler_type": "cosine",
    }  # fmt: skip
    of_pairs: dict[str, Any] = {"data_path": data[1], "eval_data_path": judged}
    tuned = train(
        TrainSettings(**common, data_path=data[0], output_dir=folder / "sft", num_train_epochs=8, learning_rate=3e-3)
    )
    found: dict[str, Any] = {"seed": seed, "sft": score(tuned.run, asked, held_out, folder / "sft-replies")}
    ways = {
        "dpo": {"objective": "dpo", "adapter": tuned.run, "num_train_epochs": 1, "learning_rate": dpo_learning_rate},
        "orpo": {"objective": "orpo", "num_train_epochs": 8, "learning_rate": 3e-3},
    }
    for name, options in ways.items():
        learned = train(TrainSettings(**common, **of_pairs, **options, output_dir=folder / name))
        found[name] = score(learned.run, asked, held_out, folder / f"{name}-replies")
        found[name] |= {"reward_accuracy": 100 * learned.eval["rewards/accuracies"], "steps": learned.steps}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dpo-learning-rate", type=float, default=2e-4)
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        folder = Path(tempfile.mkdtemp(prefix="t5tune-preferences-"))
        try:
            results.append(run(seed, options.dpo_learning_rate, folder))
        finally:
            shutil.rmtree(folder)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
