"""Generate visits to a clinic from a seed: a dialogue, and the note that the doctor writes about it.

python examples/summarize/generate.py --seed 0 --num 300 --output examples/summarize/train.csv

The dialogues are synthetic and medically meaningless; only their form is realistic.
"""

import argparse
import csv
import random
from pathlib import Path

SYMPTOMS = ("headache", "cough", "sore throat", "back pain", "dizziness", "rash", "knee pain", "heartburn")
TIMES = ("two days", "three days", "a week", "two weeks", "a month")
WORSE = ("in the morning", "at night", "after meals", "when walking", "in the cold")
DRUGS = ("ibuprofen", "paracetamol", "an antacid", "a cream", "nothing")
HISTORY = ("asthma", "high blood pressure", "diabetes", "migraine", "no earlier illness")
PLANS = ("a blood test", "rest and fluids", "an X-ray", "a follow-up in a week", "physiotherapy")
SMALL_TALK = ("The traffic was terrible.", "It is cold out there.", "I nearly missed the bus.", "Thanks for seeing me.")


def visit(random: random.Random) -> tuple[str, str]:
    """Generate a dialogue and its note."""
    age, symptom, since = random.randint(19, 86), random.choice(SYMPTOMS), random.choice(TIMES)
    worse, drug, history, plan = (random.choice(words) for words in (WORSE, DRUGS, HISTORY, PLANS))
    turns = [
        ("Doctor", "Good morning. What brings you in?"),
        ("Patient", f"{random.choice(SMALL_TALK)} I have had {article(symptom)} for {since}."),
        ("Doctor", "When is it worse?"),
        ("Patient", f"Mostly {worse}."),
        ("Doctor", "Have you taken anything?"),
        ("Patient", "No, nothing." if drug == "nothing" else f"Only {drug}."),
        ("Doctor", "How old are you, and is there anything in your history?"),
        ("Patient", f"I am {age}. There is {history}." if history[:2] != "no" else f"I am {age}, and no, nothing."),
        ("Doctor", f"Then I suggest {plan}."),
        ("Patient", random.choice(("All right.", "Fine, thank you.", "If you say so."))),
    ]
    # vary the order
    if random.random() < 0.5:
        turns[4:6], turns[6:8] = turns[6:8], turns[4:6]
    note = (
        f"{age}-year-old with {symptom} for {since}, worse {worse}. "
        f"{'No medication' if drug == 'nothing' else f'Took {drug}'}. History: {history}. Plan: {plan}."
    )
    return "\n".join(f"{who}: {words}" for who, words in turns), note


def article(symptom: str) -> str:
    return symptom if symptom in {"back pain", "knee pain", "dizziness", "heartburn"} else f"a {symptom}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    source = random.Random(given.seed)
    with given.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("dialogue", "note"))
        writer.writerows(visit(source) for _ in range(given.num))


if __name__ == "__main__":
    main()
