"""Task families with texts of a few facts, and questions about them: what is it, who is it, is it true?

A fact states one relation of one subject. The subjects of a text are of one kind and have the same relations, so that
only the fact with the question's subject and relation gives the answer.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from words import (
    ANIMALS,
    COLOURS,
    DAYS,
    HABITS,
    JOBS,
    MONTHS,
    QUALITIES,
    ROOMS,
    SIZES,
    any_word,
    code,
    distinct,
    invented_word,
    name,
    noun,
    number_word,
    place,
)

Turns = list[tuple[str, str]]
Random = random.Random


class Relation(NamedTuple):
    """How to state a relation of a subject, ask for its value, ask for its subject, and ask whether it is true."""

    statement: str
    question: str
    reverse: str
    check: str
    value: Callable[[Random], str]


def one_of(words: list[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(words)


def _number(rng: Random) -> str:
    number = rng.randint(2, 99)
    return str(number) if rng.random() < 0.6 else number_word(number)


PEOPLE = [
    Relation("{s} lives in {v}", "Where does {s} live", "Who lives in {v}", "Does {s} live in {v}", place),
    Relation("{s} comes from {v}", "Where does {s} come from", "Who comes from {v}", "Does {s} come from {v}", place),
    Relation("{s} flies to {v}", "Where does {s} fly to", "Who flies to {v}", "Does {s} fly to {v}", place),
    Relation("{s} is a {v}", "What is {s}", "Who is a {v}", "Is {s} a {v}", one_of(JOBS)),
    Relation("{s} works as {v}", "What is the job of {s}", "Who works as {v}", "Does {s} work as {v}", one_of(JOBS)),
    Relation("{s} has a {v}", "What does {s} have", "Who has a {v}", "Does {s} have a {v}", one_of(ANIMALS)),
    Relation("{s} owns the {v}", "Which animal does {s} own", "Who owns the {v}", "Does {s} own the {v}",
             one_of(ANIMALS)),
    Relation("{s} lost the {v}", "What did {s} lose", "Who lost the {v}", "Did {s} lose the {v}", noun),
    Relation("{s} bought a {v}", "What did {s} buy", "Who bought a {v}", "Did {s} buy a {v}", noun),
    Relation("{s} likes {v}", "Which colour does {s} like", "Who likes {v}", "Does {s} like {v}", one_of(COLOURS)),
    Relation("{s} comes on {v}", "When does {s} come", "Who comes on {v}", "Does {s} come on {v}", one_of(DAYS)),
    Relation("{s} was born in {v}", "When was {s} born", "Who was born in {v}", "Was {s} born in {v}", one_of(MONTHS)),
    Relation("{s} is {v} years old", "How old is {s}", "Who is {v} years old", "Is {s} {v} years old", _number),
    Relation("{s} paid {v} euros", "How much did {s} pay", "Who paid {v} euros", "Did {s} pay {v} euros", _number),
    Relation("{s} can {v}", "What can {s} do", "Who can {v}", "Can {s} {v}", one_of(HABITS)),
    Relation("{s} sits in the {v}", "Where does {s} sit", "Who sits in the {v}", "Does {s} sit in the {v}",
             one_of(ROOMS)),
    Relation("{s} has number {v}", "Which number has {s}", "Who has number {v}", "Does {s} have number {v}", code),
]  # fmt: skip
OBJECTS = [
    Relation("the {s} is {v}", "What colour is the {s}", "What is {v}", "Is the {s} {v}", one_of(COLOURS)),
    Relation("the {s} is {v}", "How is the {s}", "Which one is {v}", "Is the {s} {v}", one_of(QUALITIES)),
    Relation("the {s} is {v}", "What size is the {s}", "What is {v}", "Is the {s} {v}", one_of(SIZES)),
    Relation("the {s} is in the {v}", "Where is the {s}", "What is in the {v}", "Is the {s} in the {v}",
             one_of(ROOMS)),
    Relation("the {s} costs {v} euros", "What does the {s} cost", "What costs {v} euros",
             "Does the {s} cost {v} euros", _number),
    Relation("the {s} belongs to {v}", "Whose is the {s}", "What belongs to {v}", "Does the {s} belong to {v}", name),
    Relation("the {s} was made in {v}", "Where was the {s} made", "What was made in {v}", "Was the {s} made in {v}",
             place),
    Relation("the code of the {s} is {v}", "What is the code of the {s}", "What has the code {v}",
             "Is {v} the code of the {s}", code),
    Relation("the {s} opens on {v}", "When does the {s} open", "What opens on {v}", "Does the {s} open on {v}",
             one_of(DAYS)),
]  # fmt: skip


SIGNS = {"; ": "semicolons", " / ": "slashes", " - ": "dashes", " + ": "plus signs"}


def _invented(rng: Random) -> Relation:
    """Invent a relation, which a model can recognize only by comparing words."""
    verb, key = invented_word(rng), noun(rng)
    return rng.choice(
        [
            Relation(f"{{s}} {verb}s {{v}}", f"What does {{s}} {verb}", f"Who {verb}s {{v}}",
                     f"Does {{s}} {verb} {{v}}", any_word),
            Relation(f"the {key} of {{s}} is {{v}}", f"What is the {key} of {{s}}", f"Whose {key} is {{v}}",
                     f"Is {{v}} the {key} of {{s}}", any_word),
            Relation(f"{{s}}: {key} {{v}}", f"{{s}}, {key}", f"{key} {{v}}", f"{{s}}, {key} {{v}}", any_word),
        ]
    )  # fmt: skip


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


class Text:
    """Draw a few subjects and facts about them."""

    def __init__(self, rng: Random, most: int = 4) -> None:
        kind = rng.random()
        known, subject = (PEOPLE, name) if kind < 0.6 else (OBJECTS, noun)
        self.subjects = distinct(rng, subject, rng.randint(2, most))
        self.relations = rng.sample(known, 1 if rng.random() < 0.6 else 2)
        if rng.random() < 0.25:
            self.relations[0] = _invented(rng)
        if len({relation.statement for relation in self.relations}) < len(self.relations):
            del self.relations[1]
        self.values = [distinct(rng, relation.value, len(self.subjects)) for relation in self.relations]
        end = rng.choice([".", ".", ".", ";"])
        order = [(which, index) for which in range(len(self.relations)) for index in range(len(self.subjects))]
        if rng.random() < 0.7:
            rng.shuffle(order)
        facts = [self.fact(*said) for said in order]
        self.text = f"{end} ".join(map(_capital, facts) if end == "." else facts) + "."

    def fact(self, which: int, index: int) -> str:
        return self.relations[which].statement.format(s=self.subjects[index], v=self.values[which][index])


def lookup(rng: Random) -> Turns:
    """Answer questions about a few facts, with a word or in a sentence."""
    text = Text(rng)
    in_sentence = rng.random() < 0.2
    turns: Turns = []
    for number in range(rng.choice([1, 1, 1, 2, 3])):
        which, index = rng.randrange(len(text.relations)), rng.randrange(len(text.subjects))
        relation, subject, value = text.relations[which], text.subjects[index], text.values[which][index]
        asked, answer = (relation.question, value) if rng.random() < 0.7 else (relation.reverse, subject)
        question = _capital(asked.format(s=subject, v=value)) + "?"
        if in_sentence:
            answer = _capital(text.fact(which, index)) + "."
            question += " Answer in a sentence."
        if number == 0:
            ask = rng.choice(["{t} {q}", "{t} {q}", "{t} Question: {q}", "{q} {t}", "Read this: {t} Now answer: {q}"])
            question = ask.format(t=text.text, q=question)
        turns.append((question, answer))
    return turns


def _untrue(rng: Random, relation: Relation, values: list[str], said: str) -> str:
    """Draw a false statement about a subject; half the time it is true of a different subject, else of none."""
    if rng.random() < 0.5:
        return rng.choice([value for value in values if value != said])
    return next(value for value in iter(lambda: relation.value(rng), None) if value not in values)


def yes_no(rng: Random) -> Turns:
    """Answer whether a statement is true, in a word or with the reason."""
    text = Text(rng, most=3)
    yes, no = rng.choice([("Yes", "No"), ("Yes", "No"), ("yes", "no"), ("True", "False"), ("Right", "Wrong")])
    with_reason = rng.random() < 0.4
    turns: Turns = []
    for number in range(rng.choice([1, 1, 1, 2])):
        which, index = rng.randrange(len(text.relations)), rng.randrange(len(text.subjects))
        relation, subject, said = text.relations[which], text.subjects[index], text.values[which][index]
        is_so = rng.random() < 0.5
        asked = said if is_so else _untrue(rng, relation, text.values[which], said)
        if yes == "Yes":
            question = _capital(relation.check.format(s=subject, v=asked)) + "?"
        else:
            question = f"{yes} or {no.lower()}: {relation.statement.format(s=subject, v=asked)}."
        answer = yes if is_so else no
        if with_reason:
            question += " Why?"
            answer += f", {text.fact(which, index)}."
        turns.append((f"{text.text} {question}" if number == 0 else question, answer))
    return turns


def keeping(rng: Random) -> Turns:
    """Keep a list that things are added to and removed from, turn by turn; each answer is the whole list."""
    make = rng.choice([noun, name, place, any_word, code])
    pool = distinct(rng, make, 9)
    held = [pool.pop() for _ in range(rng.randint(1, 4))]
    sign = rng.choice([", ", ", ", *SIGNS])

    def listing() -> str:
        return sign.join(held) if held else "nothing"

    ask = rng.choice(["Keep a list{w}: {g}.", "Start a list{w} with {g}.", "Put {g} on a list{w}.", "Note{w} {g}."])
    given = ", ".join(held[:-1]) + (" and " if held[:-1] else "") + held[-1]
    turns = [(ask.format(g=given, w=f" with {SIGNS[sign]}" if sign in SIGNS else ""), listing())]
    for _ in range(rng.choice([1, 2, 2, 3])):
        kind = rng.random()
        if kind < 0.4 or not held:
            new = pool.pop()
            held.append(new)
            ask = rng.choice(["Add {n}.", "And {n}.", "Also {n}.", "{n} too, please.", "Put {n} on it.", "Plus {n}."])
            turns.append((ask.format(n=new), listing()))
        elif kind < 0.8:
            old = held.pop(rng.randrange(len(held)))
            ask = rng.choice(["Remove {o}.", "Take {o} off.", "No {o}.", "Drop {o}.", "Without {o}.", "{o} is done."])
            turns.append((ask.format(o=old), listing()))
        else:
            place_, new = rng.randrange(len(held)), pool.pop()
            old, held[place_] = held[place_], new
            ask = rng.choice(["{n} instead of {o}.", "Not {o} but {n}.", "Change {o} to {n}.", "Make {o} {n}."])
            turns.append((ask.format(o=old, n=new), listing()))
    return turns
