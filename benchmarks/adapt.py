"""Adapt the built-in model to a made-up domain with span corruption, and see whether it tunes better.

    python benchmarks/adapt.py --seeds 0 1

The domain is a language of made-up words. Each creature has a home and a food, which the raw text says in many ways. A
question is answered with both. The models are tuned on questions about some creatures, and asked about the remaining
creatures, which only the raw text describes. The base is compared with the base that was first trained on the raw text.
Both are tuned with the same settings.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from t5tune import EvaluateSettings, TrainSettings, evaluate, train

CREATURES, HOMES, FOODS = 60, 12, 12
TUNED_ON = 30  # creatures
DOCUMENTS, SENTENCES = 400, 8
HELD_OUT = 40  # documents
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


class Domain:
    """Made-up words, and which creature has which home and food."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        words = set[str]()
        while len(words) < CREATURES + HOMES + FOODS:
            words.add("".join(self.random.choices(SYLLABLES, k=3)))
        names = sorted(words)
        self.random.shuffle(names)
        self.creatures, rest = names[:CREATURES], names[CREATURES:]
        self.facts = {
            name: (self.random.choice(rest[:HOMES]), self.random.choice(rest[HOMES:])) for name in self.creatures
        }

    def write_sentence(self) -> str:
        name = self.random.choice(self.creatures)
        home, food = self.facts[name]
        return self.random.choice(
            [
                f"The {name} lives in {home} and eats {food}.",
                f"In {home} there is a {name} that eats {food}.",
                f"A {name} of {home} wants {food}.",
            ]
        )

    def write_document(self) -> str:
        return " ".join(self.write_sentence() for _ in range(SENTENCES))

    def write_question(self, name: str) -> dict[str, str]:
        home, food = self.facts[name]
        return {
            "source": f"Where the {name} lives and what it eats: the {name} lives in",
            "target": f"{home} and eats {food}.",
        }


def write_lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(seed: int, folder: Path, steps: int) -> dict[str, Any]:
    """Adapt, tune and score with one seed."""
    domain = Domain(seed)
    texts = [{"text": domain.write_document()} for _ in range(DOCUMENTS)]
    raw, unseen = (
        write_lines(folder / "raw.jsonl", texts[HELD_OUT:]),
        write_lines(folder / "unseen.jsonl", texts[:HELD_OUT]),
    )
    questions = [domain.write_question(name) for name in domain.creatures]
    tuned_on = write_lines(folder / "train.jsonl", questions[:TUNED_ON])
    asked = write_lines(folder / "test.jsonl", questions[TUNED_ON:])
    common = {"use_cpu": True, "report_samples": 0, "seed": seed, "logging_steps": 50}
    text = {"objective": "span-corruption", "model_max_length": 128}
    adapted = train(
        TrainSettings(
            model_name_or_path="pocket", data_path=raw, output_dir=folder / "adapted", max_steps=steps,
            learning_rate=1e-3, per_device_train_batch_size=16, lr_scheduler_type="cosine", warmup_steps=0.05,
            save_strategy="no", add_tokens=["none"], train_mode="full", **common, **text,
        )
    )  # fmt: skip
    found: dict[str, Any] = {"seed": seed, "adapting": {"steps": adapted.steps, "seconds": adapted.seconds}}
    for name, model in (("base", "pocket"), ("adapted", str(folder / "adapted"))):
        of_text = evaluate(
            EvaluateSettings(
                model_name_or_path=model, data_path=unseen, output_dir=folder / f"{name}-text", use_cpu=True,
                add_tokens=["none"], max_new_tokens=1, **text,
            )
        )  # fmt: skip
        tuned = train(
            TrainSettings(
                model_name_or_path=model, data_path=tuned_on, output_dir=folder / f"{name}-tuned", max_steps=60,
                learning_rate=2e-3, per_device_train_batch_size=10, save_strategy="no", add_tokens=["none"],
                conversation_template="plain", **common,
            )
        )  # fmt: skip
        answers = evaluate(
            EvaluateSettings(
                model_name_or_path=str(tuned.run), data_path=asked, output_dir=folder / f"{name}-answers", use_cpu=True
            )
        )
        found[name] = {
            "text_loss": of_text.loss,
            "tuning_loss": tuned.train_loss,
            "question_loss": answers.loss,
            "exact_match": answers.exact_match,
            "chrf": answers.chrf,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=900, help="of adapting")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        folder = Path(tempfile.mkdtemp(prefix="t5tune-adapt-"))
        try:
            results.append(run(seed, folder, options.steps))
        finally:
            shutil.rmtree(folder)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
