"""Task families with the fields of a sentence: an answer contains them in a format that has a name or an example.

A field is a pair of a name and a value, such as ("day", "Monday").
"""

import random
from collections.abc import Callable

from sentences import SCENES, Fields, count_of, listed, thing_of
from words import VERBS, any_word, name, noun, number_word

Random = random.Random
Turns = list[tuple[str, str]]


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


def _asked_layout(rng: Random) -> tuple[str, Callable[[Fields], str]]:
    """Draw a format, and the text that asks for it by its name or by an example."""
    if rng.random() < 0.5:
        style = rng.choice(list(LAYOUTS))
        return style, LAYOUTS[style]
    layout = random_layout(rng)
    return f"like {layout([(noun(rng), any_word(rng)), (noun(rng), any_word(rng))])}", layout


def _scene(rng: Random) -> tuple[str, Fields]:
    """Generate a sentence, and some of its fields in the requested order."""
    text, fields = rng.choice(SCENES)(rng)
    return text, rng.sample(fields, rng.randint(1, min(4, len(fields))))


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
