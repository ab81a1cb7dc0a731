"""The task families that the built-in model is pretrained on: each is a function from a random source to a dialogue.

A conversation is a list of (question, answer) pairs. All content is random, so that an answer follows from its question
alone. There are two exceptions: `copying` doesn't say which separator is between things that are each marked, and
the first turn of `marking` says neither the separator nor the side of the marks.
"""

import random
import string
from collections.abc import Callable

from facts import keeping, lookup, yes_no
from fields import Turns, inventory, patterns, records, relayout, slots
from sentences import article, clock, count_of, listed, sentence
from words import (
    COLOURS,
    DAYS,
    FILLERS,
    MONTHS,
    NAMES,
    ORDINALS,
    PLACES,
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

Random = random.Random


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
