"""The tasks that pretraining leaves out: other words, other layouts, and characters that the tokenizer lacks.

Each is one to three turns, answered over several lines; they are what tuning has to teach.
"""

import json
import random
from collections.abc import Callable

Turns = list[tuple[str, str]]

NAMES = """Aida Bilal Davi Esra Farid Ines Jon Karl Lena Liv Mira Nora Omar Otis Rami Rune Ruth Selma Timo Tomas Uma
Vito Wim Ylva""".split()
NUMBERS = "one two three four five six seven eight nine".split()

MENU = [
    tuple(pair.split("/"))
    for pair in """coffee/coffees tea/teas juice/juices soda/sodas muffin/muffins bagel/bagels cookie/cookies
    sandwich/sandwiches soup/soups salad/salads pie/pies cake/cakes egg/eggs apple/apples waffle/waffles
    toast/toasts""".split()
]
FLAT_ROOMS = ["hallway", "balcony", "pantry", "nursery", "lounge", "laundry", "porch", "loft"]
FAULTS = {
    "leaks": ["boiler", "tap", "shower", "radiator", "sink"],
    "is stuck": ["door", "window", "drawer", "blind", "hatch"],
    "does not work": ["heater", "doorbell", "oven", "fridge", "socket", "intercom"],
    "smells": ["drain", "stove", "filter"],
}
TIMES = ["today", "yesterday", "last night", "this morning", "last week"]
STOPS = """Ashford Bexhill Corby Denham Epsom Frome Goole Hexham Ilkley Kendal Luton Morpeth Newark Oakham Penrith
Retford Selby Thirsk Ulceby Wigan""".split()


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def quickstart(rng: random.Random) -> Turns:
    """Somebody orders at a counter, and often corrects the order; the answer is a JSON object."""
    name = rng.choice(NAMES)
    order = {item[0]: rng.randint(1, 9) for item in rng.sample(MENU, rng.randint(1, 3))}
    plural = dict(MENU)

    def said(item: str, count: int) -> str:
        return f"{NUMBERS[count - 1]} {item if count == 1 else plural[item]}"

    def answer() -> str:
        return json.dumps({"name": name, **order}, indent=2)

    listed = _listed([said(item, count) for item, count in order.items()])
    opening = rng.choice(
        [
            f"Hello, {listed} for {name} please.",
            f"I would like {listed}. My name is {name}.",
            f"{name} here, can I get {listed}?",
            f"Could you bring {listed} to {name}?",
            f"An order for {name}: {listed}.",
        ]
    )
    turns = [(opening, answer())]
    for _ in range(rng.choice([0, 1, 1, 2])):
        count = rng.randint(1, 9)
        missing = [item for item, _ in MENU if item not in order]
        adds = rng.random() < 0.4
        item = rng.choice(missing if adds else list(order))
        order[item] = count
        words = said(item, count)
        additions = [f"And {words} too.", f"Please add {words}.", f"Also {words}."]
        changes = [
            f"Sorry, make it {words}.",
            f"No wait, {words} please.",
            f"Can I change that to {words}?",
            f"I meant {words}.",
        ]
        turns.append((rng.choice(additions if adds else changes), answer()))
    return turns


def faults(rng: random.Random) -> Turns:
    """A tenant reports what is broken; the answer is an indented note."""
    state = rng.choice(list(FAULTS))
    what, where, when, name = rng.choice(FAULTS[state]), rng.choice(FLAT_ROOMS), rng.choice(TIMES), rng.choice(NAMES)
    flat = str(rng.randint(1, 60))

    def answer() -> str:
        return f"fault:\n  what: {what}\n  where: {where}\n  state: {state}\nsince: {when}\ntenant: {name} ({flat})"

    opening = rng.choice(
        [
            f"The {what} in my {where} {state} since {when}. {name}, flat {flat}.",
            f"This is {name} from flat {flat}. Since {when} the {what} in the {where} {state}.",
            f"Hi, {name} in {flat}: our {what} ({where}) {state}, since {when}.",
        ]
    )
    turns = [(opening, answer())]
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            where = rng.choice([room for room in FLAT_ROOMS if room != where])
            turns.append((f"Oh, it is the one in the {where}.", answer()))
        else:
            flat = str(rng.randint(1, 60))
            turns.append((f"I mean flat {flat}.", answer()))
    return turns


def trains(rng: random.Random) -> Turns:
    """An announcement, and what changes in it; the answer is a tag."""
    stops = rng.sample(STOPS, rng.randint(2, 4))
    hour, minute, platform = rng.randint(5, 22), rng.randint(0, 59), rng.randint(1, 12)

    def answer() -> str:
        calls = "".join(f"\n\t<call>{stop}</call>" for stop in stops[:-1])
        return f'<train to="{stops[-1]}" at="{hour:02}:{minute:02}" platform="{platform}">{calls}\n</train>'

    calling = _listed(stops[:-1])
    opening = rng.choice(
        [
            f"The {hour:02}:{minute:02} to {stops[-1]}, calling at {calling}, leaves from platform {platform}.",
            f"Platform {platform} for the {hour:02}:{minute:02} service to {stops[-1]} by way of {calling}.",
        ]
    )
    turns = [(opening, answer())]
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            platform = rng.randint(1, 12)
            turns.append((f"Platform alteration: it leaves from platform {platform}.", answer()))
        else:
            hour, minute = rng.randint(5, 22), rng.randint(0, 59)
            turns.append((f"This service is delayed until {hour:02}:{minute:02}.", answer()))
    return turns


TASKS: dict[str, Callable[[random.Random], Turns]] = {task.__name__: task for task in (quickstart, faults, trains)}
