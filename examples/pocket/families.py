"""The task families that the built-in model is pretrained on: each is a function from a random source to a dialogue.

A conversation is a list of (question, answer) pairs. All content is random, so that an answer follows from its question
alone. There are two exceptions: `copying` doesn't say which separator is between things that are each marked, and
the first turn of `marking` says neither the separator nor the side of the marks.
"""

import random
import string
from collections.abc import Callable

from facts import keeping, lookup, yes_no
from words import (
    ANIMALS,
    COLOURS,
    DAYS,
    FILLERS,
    HABITS,
    JOBS,
    MONTHS,
    NAMES,
    ORDINALS,
    PLACES,
    QUALITIES,
    ROOMS,
    SIZES,
    THINGS,
    UNITS,
    VERBS,
    any_word,
    code,
    distinct,
    invented_word,
    name,
    noun,
    number_word,
    ordinal_word,
    place,
)

Turns = list[tuple[str, str]]
Fields = list[tuple[str, str]]
Random = random.Random


# ---------------------------------------------------------------- parts of speech


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


# ---------------------------------------------------------------- formats of an answer


def _quoted(text: str) -> str:
    return text if text.isdigit() else f'"{text}"'


LAYOUTS: dict[str, Callable[[Fields], str]] = {
    "with colons": lambda fields: "; ".join(f"{key}: {value}" for key, value in fields),
    "with equal signs": lambda fields: ", ".join(f"{key}={value}" for key, value in fields),
    "in brackets": lambda fields: " ".join(f"[{key}: {value}]" for key, value in fields),
    "in round brackets": lambda fields: ", ".join(f"{key} ({value})" for key, value in fields),
    "in quotes": lambda fields: ", ".join(f'"{key}": {_quoted(value)}' for key, value in fields),
    "as JSON pairs": lambda fields: "[" + ", ".join(f'["{key}", {_quoted(value)}]' for key, value in fields) + "]",
    "as a JSON list": lambda fields: "[" + ", ".join(_quoted(value) for _, value in fields) + "]",
    "as a table row": lambda fields: "|" + "|".join(value for _, value in fields) + "|",
    "with arrows": lambda fields: ", ".join(f"{key}->{value}" for key, value in fields),
    "with dashes": lambda fields: " ".join(f"- {key} {value}" for key, value in fields),
    "with slashes": lambda fields: "/".join(value for _, value in fields),
    "as a sentence": lambda fields: "The " + listed([f"{key} is {value}" for key, value in fields]) + ".",
    "numbered": lambda fields: " ".join(f"{index}. {value}" for index, (_, value) in enumerate(fields, 1)),
    "in single quotes": lambda fields: " ".join(f"{key}='{value}'" for key, value in fields),
    "with stars": lambda fields: " ".join(f"*{key}* {value}" for key, value in fields),
    "values only": lambda fields: ", ".join(value for _, value in fields),
    "values first": lambda fields: ", ".join(f"{value} ({key})" for key, value in fields),
    "one after the other": lambda fields: " ".join(f"{key} {value}" for key, value in fields),
    "as calls": lambda fields: " ".join(f"{key}({_quoted(value)});" for key, value in fields),
    "with signs": lambda fields: " ".join(f"@{key}:{value}" for key, value in fields),
}


def random_layout(rng: Random) -> Callable[[Fields], str]:
    """Invent a format without a name, which only an example can show."""
    before, between, after = rng.choice(
        [("", ":", ""), ("", "=", ""), ("[", "|", "]"), ("(", ",", ")"), ('"', '":"', '"'), ("", " is ", ""),
         ("#", " ", ""), ("", "-", ""), ("/", ":", "/"), ("'", "' = '", "'"), ("", " >> ", ""), ("$", "=", ";"),
         ("", "_", ""), ("(", " ", ")"), ("%", "%", "%"), ("", ". ", "!")]
    )  # fmt: skip
    join = rng.choice([", ", " ", "; ", " | ", " and ", "+", " & ", ",", "" if after else " "])
    start, end = rng.choice([("", ""), ("", ""), ("[", "]"), ("(", ")"), ("OK: ", ""), ("", "."), ("-- ", " --")])
    swap, bare = rng.random() < 0.2, rng.random() < 0.2

    def layout(fields: Fields) -> str:
        pairs = [(value, key) if swap else (key, value) for key, value in fields]
        parts = [f"{before}{b}{after}" if bare else f"{before}{a}{between}{b}{after}" for a, b in pairs]
        return start + join.join(parts) + end

    return layout


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


def _scene(rng: Random) -> tuple[str, Fields]:
    """Generate a sentence, and some of its fields in the requested order."""
    text, fields = rng.choice(SCENES)(rng)
    return text, rng.sample(fields, rng.randint(1, min(4, len(fields))))


# ---------------------------------------------------------------- the families


def copying(rng: Random) -> Turns:
    """Repeat words, plain or between marks, with or without spaces."""
    words = [any_word(rng) for _ in range(rng.randint(1, 6))]
    text = sentence(rng) if rng.random() < 0.3 else " ".join(words)
    ask, before, after = rng.choice(
        [("Repeat", "", ""), ("Say", "", ""), ("Quote", '"', '"'), ("Bracket", "[", "]"), ("Copy", "", ""),
         ("Enclose", "(", ")"), ("Single quotes", "'", "'"), ("Stars", "*", "*"), ("Hash", "#", ""),
         ("Equals", "=", "")]
    )  # fmt: skip
    if rng.random() < 0.5 or before == "":
        return [(f"{ask}: {text}", before + text + after)]
    each = rng.choice([" ", ", ", ""]).join(before + word + after for word in words)
    joined = " ".join(words)
    return [(f"{ask} each: {joined}", each)]


def slots(rng: Random) -> Turns:
    """Extract the fields of a sentence, in a named format."""
    text, fields = _scene(rng)
    keys = listed([key for key, _ in fields])
    style = rng.choice(list(LAYOUTS))
    ask = rng.choice(
        [
            f"{text} Give {keys}, {style}.",
            f"Give {keys} {style}: {text}",
            f"Take {keys} from this, {style}. {text}",
            f"{text} What are {keys}? Answer {style}.",
        ]
    )
    return [(ask, LAYOUTS[style](fields))]


def patterns(rng: Random) -> Turns:
    """Extract the fields of a sentence, in a format that an example shows."""
    scene = rng.choice(SCENES[:-1])
    layout = random_layout(rng) if rng.random() < 0.8 else rng.choice(list(LAYOUTS.values()))
    shown_text, shown = scene(rng)
    text, fields = scene(rng)
    places = rng.sample(range(len(fields)), rng.randint(1, min(4, len(fields))))
    shown, fields = [shown[index] for index in places], [fields[index] for index in places]
    if rng.random() < 0.5:
        return [(f"{shown_text} Write: {layout(shown)}", layout(shown)), (text, layout(fields))]
    return [(f"{shown_text} gives {layout(shown)} What does this give? {text}", layout(fields))]


def relayout(rng: Random) -> Turns:
    """Convert a record from one format to another."""
    _, fields = rng.choice(SCENES)(rng)
    fields = rng.sample(fields, rng.randint(2, min(4, len(fields))))
    source = random_layout(rng) if rng.random() < 0.5 else LAYOUTS["with colons"]
    given = "; ".join(f"{key}: {value}" for key, value in fields) if rng.random() < 0.5 else source(fields)
    if not all(key in given for key, _ in fields):
        given = LAYOUTS["with equal signs"](fields)
    style = rng.choice(list(LAYOUTS))
    return [(rng.choice([f"Write {given} {style}.", f"{given} Now {style}.", f"Show this {style}: {given}"]),
             LAYOUTS[style](fields))]  # fmt: skip


def _asked_layout(rng: Random) -> tuple[str, Callable[[Fields], str]]:
    """Draw a format, and the text that asks for it by its name or by an example."""
    if rng.random() < 0.5:
        style = rng.choice(list(LAYOUTS))
        return style, LAYOUTS[style]
    layout = random_layout(rng)
    return f"like {layout([(noun(rng), any_word(rng)), (noun(rng), any_word(rng))])}", layout


def records(rng: Random) -> Turns:
    """Correct a record from turn to turn; each answer is the whole record."""
    scene = rng.choice(SCENES)
    text, fields = scene(rng)
    fields = rng.sample(fields, rng.randint(min(2, len(fields)), min(4, len(fields))))
    style, layout = _asked_layout(rng)
    keys = listed([key for key, _ in fields])
    turns = [(f"Note {keys}, {style}. {text}", layout(fields))]
    for _ in range(rng.choice([1, 1, 2])):
        _, others = scene(rng)
        key, old = rng.choice(fields)
        new = dict(others).get(key) or any_word(rng)
        said = number_word(int(new)) if new.isdigit() and int(new) < 100 and rng.random() < 0.6 else new
        change = rng.choice(
            [
                f"No, the {key} is {said}.",
                f"Sorry, make that {said} for {key}.",
                f"Change the {key} to {said}.",
                f"The {key} should be {said}, not {old}.",
                f"I said {old} but meant {said}.",
                f"Make it {said} instead of {old}.",
                f"Wait, {said}, not {old}.",
            ]
        )
        fields = [(k, new if k == key else value) for k, value in fields]
        turns.append((change, layout(fields)))
    return turns


def inventory(rng: Random) -> Turns:
    """Keep an owner's things and their counts, which are added, changed and removed from turn to turn."""
    owner = name(rng)
    held: dict[str, int] = {}
    plurals: dict[str, str] = {}
    for _ in range(rng.randint(1, 4)):
        number, _ = count_of(rng)
        thing, many = thing_of(rng, 2)
        held[thing], plurals[thing] = number, many

    def spoken(thing: str) -> str:
        number = held[thing]
        word = str(number) if rng.random() < 0.3 else number_word(number)
        return f"{word} {thing if number == 1 else plurals[thing]}"

    verb, past = rng.choice(VERBS)
    style, layout = _asked_layout(rng)
    who = rng.choice(["owner", "name", "for", "by"])

    def note() -> str:
        return layout([(who, owner), *((thing, str(number)) for thing, number in held.items())])

    said = listed([spoken(thing) for thing in held])
    opening = rng.choice(
        [
            f"{owner} {past} {said}.",
            f"{verb.capitalize()} {said} for {owner}.",
            f"Can you {verb} {said}? It is for {owner}.",
            f"I am {owner}. I want to {verb} {said}.",
            f"For {owner}: {said}.",
            f"{said} go to {owner}.",
        ]
    )
    turns = [(f"Keep a list {style}, with {who}. {opening}", note())]
    for _ in range(rng.choice([0, 1, 1, 2])):
        number, _ = count_of(rng)
        kind = rng.random()
        if kind < 0.45:
            thing = rng.choice(list(held))
            held[thing] = number
            words = spoken(thing)
            text = rng.choice(
                [
                    f"Make that {words}.",
                    f"No, {words}.",
                    f"Sorry, it is {words}.",
                    f"Change it to {words}.",
                    f"Actually {words}.",
                    f"Rather {words}, please.",
                ]
            )
        elif kind < 0.8 or len(held) == 1:
            thing, many = thing_of(rng, 2)
            held[thing], plurals[thing] = number, many
            words = spoken(thing)
            text = rng.choice([f"And {words}.", f"Add {words}.", f"There are {words} too.", f"{words} more things."])
        elif kind < 0.9:
            thing = rng.choice(list(held))
            del held[thing]
            text = rng.choice([f"No {thing} after all.", f"Take the {thing} off.", f"Drop the {plurals[thing]}."])
        else:
            owner = name(rng)
            text = rng.choice([f"It is for {owner}.", f"The name is {owner}.", f"{owner}, I should say."])
        turns.append((text, note()))
    return turns


def disfluency(rng: Random) -> Turns:
    """Repeat a sentence without fillers, repeated words and slips of the tongue."""
    fluent = " ".join(sentence(rng) for _ in range(rng.choice([1, 1, 1, 2])))
    words = fluent.split()
    spoken: list[str] = []
    for word in words:
        slip = rng.random()
        if slip < 0.08:
            spoken += [rng.choice(FILLERS) + ",", word]
        elif slip < 0.13:
            spoken += [word.strip(".,"), word]
        elif slip < 0.18:
            spoken += [any_word(rng), rng.choice(["no,", "sorry,", "I mean", "or rather", "no wait,"]), word]
        else:
            spoken.append(word)
    ask = rng.choice(["Clean this up:", "What was meant?", "Make it fluent:", "Without the slips:", "Repair:"])
    return [(f"{ask} {' '.join(spoken)}", fluent)]


def dates(rng: Random) -> Turns:
    """Convert days and months between words and digits."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1900, 2049)
    said = rng.choice(
        [
            f"the {ordinal_word(day)} of {MONTHS[month - 1]} {year}",
            f"{MONTHS[month - 1]} {day}, {year}",
            f"{day} {MONTHS[month - 1]} {year}",
        ]
    )
    kind = rng.randrange(5)
    if kind == 0:
        return [(f"Write {said} in figures.", f"{year}-{month:02}-{day:02}")]
    if kind == 1:
        return [(f"Write {year}-{month:02}-{day:02} in words.", f"{day} {MONTHS[month - 1]} {year}")]
    if kind == 2:
        return [(f"Which month is in {said}?", MONTHS[month - 1]), ("And which year?", str(year))]
    if kind == 3:
        index = rng.randrange(7)
        after = rng.random() < 0.5
        other = DAYS[(index + (1 if after else -1)) % 7]
        return [(f"Which day comes {'after' if after else 'before'} {DAYS[index]}?", other)]
    told, figures = clock(rng)
    return [(f"Write {told} as a time.", figures)]


def units(rng: Random) -> Turns:
    """Convert quantities with units between short and long form."""
    unit = rng.choice(list(UNITS))
    number, said = count_of(rng)
    kind = rng.randrange(3)
    if kind == 0:
        return [(f"Shorten: {said} {unit}", f"{number} {UNITS[unit]}")]
    if kind == 1:
        return [(f"Say in words: {number} {UNITS[unit]}", f"{number_word(number)} {unit}")]
    thing = noun(rng)
    text = rng.choice([f"The {thing} has {said} {unit}.", f"It takes {said} {unit} with the {thing}."])
    return [(f"{text} How much?", f"{number} {UNITS[unit]}")]


def numbers(rng: Random) -> Turns:
    """Convert numbers between words and digits, add small numbers, and compare numbers."""
    number = rng.randint(0, 99) if rng.random() < 0.7 else rng.randint(100, 999)
    kind = rng.randrange(4)
    if kind == 0:
        return [(f"Write {number_word(number)} in figures.", str(number))]
    if kind == 1:
        return [(f"Write {number} in words.", number_word(number))]
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    if kind == 2:
        said = [str(n) if rng.random() < 0.5 else number_word(n) for n in (a, b)]
        if rng.random() < 0.5:
            return [(f"What is {said[0]} and {said[1]} together?", str(a + b))]
        return [(f"Take {said[1]} from {number_word(a + b)}.", str(a))]
    c = rng.choice([n for n in range(1, 100) if n != number])
    larger = rng.random() < 0.5
    picked = max(number, c) if larger else min(number, c)
    return [(f"Which is {'larger' if larger else 'smaller'}, {number} or {c}?", str(picked))]


def lists(rng: Random) -> Turns:
    """Operate on a list: select an item, change the order, add or remove an item."""
    make = rng.choice([noun, name, place, any_word, code, lambda r: r.choice(COLOURS)])
    items = distinct(rng, make, rng.randint(3, 6))
    sign = rng.choice([", ", "; ", " / ", " | ", " "])
    joined = sign.join(items)
    kind = rng.randrange(10)
    if kind == 0:
        return [(f"First of: {joined}", items[0])]
    if kind == 1:
        return [(f"Last of: {joined}", items[-1])]
    if kind == 2:
        index = rng.randrange(len(items))
        return [(f"Which is the {ORDINALS[index]} of {joined}?", items[index])]
    if kind == 3:
        return [(f"Reverse: {joined}", sign.join(reversed(items)))]
    if kind == 4:
        return [(f"How many: {joined}", str(len(items)))]
    if kind == 5:
        return [(f"Join with and: {joined}", listed(items))]
    if kind == 6:
        out = rng.choice(items)
        return [(f"Without {out}: {joined}", sign.join(item for item in items if item != out))]
    if kind == 7:
        new = make(rng)
        front = rng.random() < 0.5
        both = [new, *items] if front else [*items, new]
        return [(f"Put {new} {'before' if front else 'behind'}: {joined}", sign.join(both))]
    if kind == 8:
        index = rng.randrange(len(items) - 1)
        return [(f"What follows {items[index]} in {joined}?", items[index + 1])]
    out, new = rng.choice(items), make(rng)
    changed = sign.join(new if item == out else item for item in items)
    return [(f"Put {new} for {out}: {joined}", changed)]


def polite(rng: Random) -> Turns:
    """Turn commands into requests and back, and statements into questions."""
    verb, past = rng.choice(VERBS)
    who, where = name(rng), rng.choice(ROOMS)
    rest = f"the {rng.choice([*COLOURS, *SIZES])} {noun(rng)}" + rng.choice(["", f" to {who}", f" in the {where}"])
    requests = {
        "politely": f"Could you please {verb} {rest}?",
        "very politely": f"Would you be so kind as to {verb} {rest}, please?",
        "as a wish": f"I would like you to {verb} {rest}.",
        "as an order": f"{verb.capitalize()} {rest}!",
        "as a suggestion": f"Let us {verb} {rest}.",
        "in the past": f"We {past} {rest}.",
        "in the future": f"We will {verb} {rest}.",
        "as a denial": f"Do not {verb} {rest}.",
        "as a question": f"Did you {verb} {rest}?",
    }
    style = rng.choice(list(requests))
    said = rng.choice([text for other, text in requests.items() if other != style])
    return [(rng.choice([f"Say {style}: {said}", f"{said} Say this {style}."]), requests[style])]


LETTER_SIGNS = {"-": "dashes", " ": "spaces", ", ": "commas", ".": "dots", "/": "slashes", "+": "plus signs"}


def spelling(rng: Random, word: str = "") -> Turns:
    """Spell a word or name some of its letters; if no word is given, draw one."""
    word = word or rng.choice([invented_word, noun, lambda r: r.choice(NAMES), lambda r: r.choice(PLACES)])(rng)
    sign, named = rng.choice(list(LETTER_SIGNS.items()))
    kind = rng.randrange(8)
    if kind <= 1:
        return [(f"Spell {word} with {named}.", sign.join(word))]
    if kind == 2:
        return [(f"Spell {word} in capitals, with {named}.", sign.join(word.upper()))]
    if kind == 3:
        return [(f"Join the letters {sign.join(word)}", word)]
    if kind == 4:
        return [(f"First letter of {word}?", word[0])]
    if kind == 5:
        return [(f"Last letter of {word}?", word[-1])]
    if kind == 6:
        return [(f"With a capital: {word}", word[0].upper() + word[1:])]
    return [(f"In capitals: {word}", word.upper())]


# marks of done and of open items
MARKS = [("x", "-"), ("v", "o"), ("+", "-"), ("*", "."), ("yes", "no"), ("done", "open"), ("on", "off"), ("!", "?"),
         ("1", "0"), ("Y", "N"), ("x", "_"), ("in", "out")]  # fmt: skip


def marking(rng: Random) -> Turns:
    """Mark things, with marks that change from turn to turn; each answer is the whole list."""

    def errand(rng: Random) -> str:
        return f"{rng.choice(VERBS)[0]} {rng.choice(['the ', '', ''])}{noun(rng)}"

    make = rng.choice([errand, errand, noun, name, place, any_word])
    *held, new = distinct(rng, make, rng.randint(3, 5))
    is_done = dict.fromkeys(held, False)
    left, right = rng.choice([("[", "]"), ("(", ")"), ("", ""), ("", ":"), ("|", "|"), ("#", ""), ("- [", "]")])
    done, still = (f"{left}{mark}{right}" for mark in rng.choice(MARKS)[:: rng.choice([1, 1, 1, -1])])
    sign, is_behind = rng.choice([", ", "; ", " ", " / ", " | "]), rng.random() < 0.3

    def marked(item: str) -> str:
        mark = done if is_done[item] else still
        return f"{item} {mark}" if is_behind else f"{mark} {item}"

    def listing() -> str:
        return sign.join(map(marked, is_done))

    def change() -> str:
        if rng.random() < 0.15 and new not in is_done:
            is_done[new] = False
            return rng.choice([f"Add {new}.", f"And {new}.", f"Also {new}."])
        item = rng.choice(list(is_done))
        is_done[item] = not is_done[item]
        if is_done[item]:
            return rng.choice([f"{item} is done.", f"Tick {item}.", f"I did {item}.", f"{item}: done."])
        return rng.choice([f"{item} is open again.", f"Untick {item}.", f"Not {item} after all.", f"{item}: not yet."])

    things = rng.choice([", ".join(held), listed(held)])
    first = f" {change()}" if rng.random() < 0.3 else ""
    ask = rng.choice(
        [
            f"Mark what is done with {done}, the rest with {still}: {things}.{first}",
            f"A list with {still} for open and {done} for done: {things}.{first}",
            f"Note {things}; {done} is done, {still} is open.{first}",
        ]
    )
    turns = [(ask, listing())]
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        said = change()
        turns.append((said, listing()))
    return turns


def templates(rng: Random) -> Turns:
    """Fill the gaps of a sentence."""
    marks = distinct(rng, lambda r: r.choice(string.ascii_uppercase[:12]), rng.randint(2, 3))
    values = [any_word(rng) for _ in marks]
    brackets = rng.choice(["[]", "()", "__", "%%", "$ "])
    slots_ = [f"{brackets[0]}{mark}{brackets[1]}".strip() for mark in marks]
    words = [any_word(rng) for _ in range(rng.randint(2, 5))]
    for slot in slots_:
        words.insert(rng.randrange(len(words) + 1), slot)
    pattern = " ".join(words)
    filled = pattern
    for slot, value in zip(slots_, values, strict=True):
        filled = filled.replace(slot, value)
    given = ", ".join(f"{mark} is {value}" for mark, value in zip(marks, values, strict=True))
    return [(rng.choice([f"Fill in: {pattern} ; {given}", f"{given}. Fill in: {pattern}"]), filled)]


def replacing(rng: Random) -> Turns:
    """Replace a word."""
    text = sentence(rng)
    words = [word for word in dict.fromkeys(text.strip(".").split()) if word.isalpha() and text.count(word) == 1]
    old, new = rng.choice(words), any_word(rng)
    ask = rng.choice([f"Put {new} for {old}:", f"Replace {old} by {new}:", f"{new} instead of {old}:"])
    return [(f"{ask} {text}", text.replace(old, new))]


def grammar(rng: Random) -> Turns:
    """Form the plural, the article or the past tense."""
    one, many = rng.choice(THINGS)
    verb, past = rng.choice(VERBS)
    word = noun(rng)
    return rng.choice(
        [
            [(f"More than one {one}?", many)],
            [(f"One of the {many}?", one)],
            [(f"A or an: {word}", article(word))],
            [(f"Past of {verb}?", past)],
            [(f"{past} comes from?", verb)],
        ]
    )


def spans(rng: Random) -> Turns:
    """Corrupt spans (Raffel et al. 2020): sentinels replace words in the text, and the answer contains these words."""
    words = " ".join(sentence(rng) for _ in range(rng.randint(1, 2))).split()
    source: list[str] = []
    target: list[str] = []
    position = sentinel = 0
    for start in sorted(rng.sample(range(len(words)), max(1, len(words) // 7))):
        if start >= position:
            end = min(start + rng.randint(1, 3), len(words))
            source += [*words[position:start], f"<extra_id_{sentinel}>"]
            target += [f"<extra_id_{sentinel}>", *words[start:end]]
            position, sentinel = end, sentinel + 1
    return [(" ".join([*source, *words[position:]]), " ".join(target))]


def chatting(rng: Random) -> Turns:
    """Introduce oneself and be remembered."""
    who, where = name(rng), place(rng)
    turns = [
        (rng.choice([f"Hello, I am {who}.", f"Hi, my name is {who}.", f"{who} here."]), f"Hello {who}."),
    ]
    if rng.random() < 0.5:
        turns.append((f"I come from {where}.", f"How is {where}?"))
        turns.append(rng.choice([("Where do I come from?", f"From {where}."), ("What is my name?", f"{who}.")]))
    else:
        thing = noun(rng)
        turns.append((f"I lost my {thing}.", f"I am sorry about the {thing}, {who}."))
    return turns


FAMILIES: dict[str, Callable[[Random], Turns]] = {
    family.__name__: family
    for family in (
        copying, slots, patterns, relayout, records, inventory, keeping, disfluency, dates, units, numbers, lists,
        polite, lookup, yes_no, spelling, marking, templates, replacing, grammar, chatting, spans,
    )
}  # fmt: skip

# weights with which pretraining draws each family
SHARES = {
    "copying": 7, "slots": 11, "patterns": 12, "relayout": 6, "records": 13, "inventory": 16, "keeping": 6,
    "disfluency": 5, "dates": 2, "units": 2, "numbers": 3, "lists": 6, "polite": 2, "lookup": 12, "yes_no": 9,
    "spelling": 4, "marking": 6, "templates": 4, "replacing": 4, "grammar": 2, "chatting": 2, "spans": 5,
}  # fmt: skip
