"""Distill into a model of half the depth, and compare the gain from the teacher with the gain from more data.

    python benchmarks/distillation.py --seeds 0 1

Made-up animals eat several foods, with different frequencies. The answer to a question about an animal and a day is one
of its foods, so no answer is certain, and only many answers show the frequencies. The teacher, the built-in model, is
tuned on all questions. Students with half of its layers are tuned on a tenth of the questions: on the answers alone,
and with the teacher's probabilities. A third student is tuned on all questions. The result is the loss on held-out
questions, and the gain (alone - distilled) / (alone - all).
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from t5tune import EvaluateSettings, TrainSettings, evaluate, train
from t5tune.checkpoints.pocket import pocket_folder

ANIMALS, FOODS, CHOICES = 40, 24, 4
QUESTIONS, HELD_OUT, SHARE = 4000, 600, 10
STEPS = 500
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class World:
    """Which animal eats which foods, and how often."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        words = set[str]()
        while len(words) < ANIMALS + FOODS:
            words.add("".join(self.random.choices(SYLLABLES, k=3)))
        names = sorted(words)
        self.random.shuffle(names)
        foods = names[ANIMALS:]
        self.foods = {name: self.random.sample(foods, CHOICES) for name in names[:ANIMALS]}

    def ask(self) -> dict[str, str]:
        animal, day = self.random.choice(list(self.foods)), self.random.choice(DAYS)
        (food,) = self.random.choices(self.foods[animal], weights=range(CHOICES, 0, -1))
        return {"source": f"On {day} the {animal} eats what?", "target": food}


def write_lines(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def halve(folder: Path) -> Path:
    """Save the built-in model with three of its six layers: two of the encoder, and one of the decoder."""
    base = pocket_folder()
    model = T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    model.encoder.block = torch.nn.ModuleList([model.encoder.block[0], model.encoder.block[-1]])
    model.decoder.block = torch.nn.ModuleList([model.decoder.block[0]])
    model.config.num_layers, model.config.num_decoder_layers = 2, 1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def run(seed: int, folder: Path) -> dict[str, Any]:
    """Tune a teacher and three students with one seed."""
    world = World(seed)
    asked = [world.ask() for _ in range(QUESTIONS + HELD_OUT)]
    held_out = write_lines(folder / "held-out.jsonl", asked[:HELD_OUT])
    everything = write_lines(folder / "all.jsonl", asked[HELD_OUT:])
    part = write_lines(folder / "part.jsonl", asked[HELD_OUT:][: QUESTIONS // SHARE])
    student = str(halve(folder / "student"))

    def tune(name: str, base: str, data: Path, **options: Any) -> float:
        tuned = train(
            TrainSettings(
                model_name_or_path=base, data_path=data, output_dir=folder / name, max_steps=STEPS, seed=seed,
                learning_rate=1e-3, per_device_train_batch_size=32, train_mode="full", save_strategy="no",
                lr_scheduler_type="cosine", warmup_steps=0.05, report_samples=0, use_cpu=True, logging_steps=50,
                add_tokens=["none"], conversation_template="plain", **options,
            )
        )  # fmt: skip
        scores = folder / f"{name}-scores"
        found = evaluate(
            EvaluateSettings(
                model_name_or_path=str(tuned.run), data_path=held_out, output_dir=scores, use_cpu=True, max_new_tokens=1
            )
        )
        return float(found.loss)

    teacher = tune("teacher", "pocket", everything)
    alone = tune("alone", student, part)
    distilled = tune(
        "distilled", student, part, teacher_model_name_or_path=folder / "teacher", distillation_alpha=0.9,
        distillation_temperature=1.0,
    )  # fmt: skip
    everything_loss = tune("everything", student, everything)
    return {
        "seed": seed,
        "teacher": teacher,
        "alone": alone,
        "distilled": distilled,
        "all": everything_loss,
        "gain": (alone - distilled) / (alone - everything_loss),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        folder = Path(tempfile.mkdtemp(prefix="t5tune-distillation-"))
        try:
            results.append(run(seed, folder))
        finally:
            shutil.rmtree(folder)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
