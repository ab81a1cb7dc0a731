"""Sentences of the built-in model's pretraining: parts of speech, plain statements, and sentences with known fields."""

import random

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
    THINGS,
    VERBS,
    any_word,
    code,
    distinct,
    invented_word,
    name,
    noun,
    number_word,
    place,
)

Random = random.Random
Fields = list[tuple[str, str]]


def count_of(rng: Random) -> tuple[int, str]:
    """Draw a small number, and its text in digits or in words."""
    number = rng.randint(1, 12) if rng.random() < 0.8 else rng.randint(13, 99)
    return number, str(number) if rng.random() < 0.4 else number_word(number)


def thing_of(rng: Random, count: int = 1) -> tuple[str, str]:
    """Draw a thing: its singular, and its form after a count. Half of the things are invented."""
    one, many = rng.choice(THINGS)
    if rng.random() < 0.5:
        one = invented_word(rng)
        many = plural_of(one)
    return one, one if count == 1 else many


def plural_of(word: str) -> str:
    """Return the regular plural: boxes, berries, hats."""
    if word.endswith(("s", "x", "sh", "ch", "z")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in set("aeiou"):
        return word[:-1] + "ies"
    return word + "s"


def clock(rng: Random) -> tuple[str, str]:
    """Draw a time of day, as spoken and in 24-hour form: (half past six, 06:30)."""
    hour, minute = rng.randint(1, 12), rng.choice([0, 0, 15, 30, 45])
    if rng.random() < 0.3:
        hour, minute = rng.randint(0, 23), rng.randint(0, 59)
        return f"{hour:02}:{minute:02}", f"{hour:02}:{minute:02}"
    word = number_word(hour)
    said = {
        0: f"{word} o'clock",
        15: f"a quarter past {word}",
        30: f"half past {word}",
        45: f"a quarter to {number_word(hour % 12 + 1)}",
    }
    return said[minute], f"{hour:02}:{minute:02}"


def article(word: str) -> str:
    """Put `a` or `an` before a word."""
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


def listed(words: list[str]) -> str:
    """Join words: `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def sentence(rng: Random) -> str:
    """Generate a plain statement about some people and things."""
    one, two = name(rng), name(rng)
    thing, many = rng.choice(THINGS)
    verb, past = rng.choice(VERBS)
    number = number_word(rng.randint(2, 20))
    return rng.choice(
        [
            f"{one} {past} the {rng.choice(COLOURS)} {thing} in the {rng.choice(ROOMS)}.",
            f"The {rng.choice(QUALITIES)} {rng.choice(ANIMALS)} is under the {thing}.",
            f"{one} is {article(rng.choice(JOBS))} and lives in {place(rng)}.",
            f"{one} and {two} {past} {number} {many} on {rng.choice(DAYS)}.",
            f"On {rng.choice(DAYS)} {one} will {verb} the {thing} for {two}.",
            f"There are {number} {many} in the {rng.choice(ROOMS)}, and the {noun(rng)} is {rng.choice(SIZES)}.",
            f"{one} travels from {place(rng)} to {place(rng)} in {rng.choice(MONTHS)}.",
            f"We {past} {article(rng.choice(SIZES))} {noun(rng)} and {number} {many}.",
            f"{one} can {rng.choice(HABITS)}, but {two} can only {rng.choice(HABITS)}.",
            f"My {noun(rng)} is {rng.choice(QUALITIES)} and {rng.choice(COLOURS)}.",
            f"Please {verb} the {noun(rng)} at {clock(rng)[0]}.",
            f"The {noun(rng)} {code(rng)} costs {rng.randint(1, 500)} euros in {place(rng)}.",
        ]
    )


# ---------------------------------------------------------------- sentences with fields


def _delivery(rng: Random) -> tuple[str, Fields]:
    number, said = count_of(rng)
    one, many = thing_of(rng, number)
    who, where, day = name(rng), place(rng), rng.choice(DAYS)
    text = rng.choice(
        [
            f"{who} needs {said} {many} in {where} on {day}.",
            f"Send {said} {many} to {who} in {where} on {day}.",
            f"On {day}, bring {said} {many} to {where} for {who}.",
            f"It is {who} from {where}, I want {said} {many} for {day}.",
            f"{said} {many} go to {where} on {day}, to {who}.",
        ]
    )
    return text, [("name", who), ("count", str(number)), ("thing", one), ("place", where), ("day", day)]


def _journey(rng: Random) -> tuple[str, Fields]:
    start, end = distinct(rng, place, 2)
    who, day, (said, at) = name(rng), rng.choice(DAYS), clock(rng)
    text = rng.choice(
        [
            f"{who} goes from {start} to {end} on {day} at {said}.",
            f"I am {who} and I travel to {end} on {day}, from {start}, at {said}.",
            f"At {said} on {day} {who} leaves {start} for {end}.",
            f"A trip to {end} for {who}: from {start}, {day}, {said}.",
        ]
    )
    return text, [("name", who), ("from", start), ("to", end), ("day", day), ("time", at)]


def _repair(rng: Random) -> tuple[str, Fields]:
    who, day, room = name(rng), rng.choice(DAYS), rng.choice(ROOMS)
    thing, state = noun(rng), rng.choice(QUALITIES)
    text = rng.choice(
        [
            f"The {thing} in the {room} is {state}, {who} will look at it on {day}.",
            f"{who} says that the {thing} is {state}. It stands in the {room}. Come on {day}.",
            f"On {day} {who} will mend the {state} {thing} in the {room}.",
        ]
    )
    return text, [("thing", thing), ("room", room), ("state", state), ("name", who), ("day", day)]


def _sale(rng: Random) -> tuple[str, Fields]:
    who, buyer = distinct(rng, name, 2)
    thing, colour = noun(rng), rng.choice(COLOURS)
    number, said = count_of(rng)
    text = rng.choice(
        [
            f"{who} sold a {colour} {thing} to {buyer} for {said} euros.",
            f"{buyer} paid {said} euros to {who} for the {colour} {thing}.",
            f"For {said} euros {buyer} got a {thing} from {who}; it is {colour}.",
        ]
    )
    return text, [("seller", who), ("buyer", buyer), ("thing", thing), ("colour", colour), ("price", str(number))]


def _person(rng: Random) -> tuple[str, Fields]:
    who, where, job = name(rng), place(rng), rng.choice(JOBS)
    age, said = count_of(rng)
    habit = rng.choice(HABITS)
    text = rng.choice(
        [
            f"{who} is {article(job)} from {where}, is {said} years old and can {habit}.",
            f"My name is {who}, I live in {where}. I am {said}, work as {article(job)} and like to {habit}.",
            f"Meet {who}, {article(job)} of {said} years who lives in {where} and loves to {habit}.",
        ]
    )
    return text, [("name", who), ("place", where), ("job", job), ("age", str(age)), ("hobby", habit)]


def _part(rng: Random) -> tuple[str, Fields]:
    number, said = count_of(rng)
    ident, size, thing, who = code(rng), rng.choice(SIZES), noun(rng), name(rng)
    text = rng.choice(
        [
            f"{said} of {ident}, the {size} {thing}, were taken by {who}.",
            f"{who} stored {said} {size} {thing} under {ident}.",
            f"Number {ident} is a {size} {thing}; {who} has {said} of them.",
        ]
    )
    return text, [("code", ident), ("size", size), ("thing", thing), ("count", str(number)), ("owner", who)]


def _named(rng: Random) -> tuple[str, Fields]:
    keys = distinct(rng, lambda r: r.choice([noun, invented_word])(r), rng.randint(2, 4))
    fields = [(key, any_word(rng)) for key in keys]
    said = [
        rng.choice([f"{key} is {value}", f"the {key} is {value}", f"{value} for {key}", f"{key} {value}"])
        for key, value in fields
    ]
    return rng.choice([f"{listed(said)}.", "; ".join(said) + ".", "I know this: " + ", ".join(said) + "."]), fields


SCENES = [_delivery, _journey, _repair, _sale, _person, _part, _named]
