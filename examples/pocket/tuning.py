"""The tasks for fine-tuning, which pretraining leaves out: their topics, their answer formats, and in nearly all of the
answers characters that the tokenizer doesn't have, most often a newline.

Each conversation has one to four turns.
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

ERRANDS = """mow the lawn/feed the parrot/water the ferns/pay the rent/iron the sheets/dust the blinds/peel the onions/
mop the floor/bake a loaf/call Bob/email Grace/visit Aunt May/charge the drill/rinse the bottles/sort the mail/
vacuum the hall/renew the passport/fill the tank""".replace("\n", "").split("/")
POINTS = "budget hiring parking security catering insurance training branding recycling payroll lighting".split()
INSTRUMENTS = "cello harp tuba oboe banjo viola trumpet organ bassoon zither".split()


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def quickstart(rng: random.Random) -> Turns:
    """A customer orders at a counter, and often corrects the order; the answer is a JSON object."""
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
    """A tenant reports a fault; the answer is an indented note."""
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


def chores(rng: random.Random) -> Turns:
    """Items of a list are ticked off; the answer is a task list in Markdown."""
    *held, spare = rng.sample(ERRANDS, rng.randint(3, 5))
    is_done = dict.fromkeys(held, False)

    def answer() -> str:
        return "\n".join(f"- [{'x' if done else ' '}] {errand}" for errand, done in is_done.items())

    turns = [(rng.choice([f"To do: {_listed(held)}.", f"This week I have to {_listed(held)}."]), answer())]
    for _ in range(rng.randint(1, 3)):
        errand = rng.choice([*held, spare])
        if errand not in is_done:
            is_done[errand] = False
            turns.append((rng.choice([f"I also have to {errand}.", f"Oh, and {errand}."]), answer()))
            continue
        is_done[errand] = not is_done[errand]
        capital = errand[0].upper() + errand[1:]
        done = [f"I have done this: {errand}.", f"Check off {errand}.", f"{capital}, that is behind me."]
        undone = [f"I still have to {errand}.", f"Uncheck {errand}."]
        turns.append((rng.choice(done if is_done[errand] else undone), answer()))
    return turns


def agenda(rng: random.Random) -> Turns:
    """Items of a meeting's agenda are added, removed and moved up; the answer is the renumbered list."""
    *points, spare = rng.sample(POINTS, rng.randint(3, 6))

    def answer() -> str:
        return "\n".join(f"{number}) {point}" for number, point in enumerate(points, 1))

    turns = [(rng.choice([f"Today: {_listed(points)}.", f"The meeting is on {_listed(points)}."]), answer())]
    for _ in range(rng.randint(0, 2)):
        point = rng.choice(points)
        kind = rng.randrange(3)
        if kind == 0 and spare not in points:
            points.append(spare)
            turns.append((f"At the end also {spare}.", answer()))
        elif kind == 1 and len(points) > 1:
            points.remove(point)
            turns.append((f"We skip {point}.", answer()))
        else:
            points.remove(point)
            points.insert(0, point)
            turns.append((f"Let us begin with {point}.", answer()))
    return turns


def moves(rng: random.Random) -> Turns:
    """Where is a person now, and who is there? The answer is pairs in braces."""
    people, rooms = rng.sample(NAMES, rng.randint(2, 4)), rng.sample(FLAT_ROOMS, 5)
    where = dict(zip(people, rooms, strict=False))
    said = ". ".join(f"{person} waits at the {where[person]}" for person in people)
    mover = rng.choice(people)
    if rng.random() < 0.5:
        where[mover] = rooms[-1]
        said += f". Then {mover} went to the {rooms[-1]}"
    turns: Turns = []
    for number in range(rng.randint(1, 2)):
        person = rng.choice(people)
        asked = [f"Where is {person} now?", f"Who is at the {where[person]}?"]
        turns.append(((f"{said}. " if number == 0 else "") + rng.choice(asked), f"{{{person} @ {where[person]}}}"))
    return turns


def whether(rng: random.Random) -> Turns:
    """Is it true of this one? The answer is a word on its own line, in braces."""
    people, tools = rng.sample(NAMES, rng.randint(2, 3)), rng.sample(INSTRUMENTS, 3)
    plays = dict(zip(people, tools, strict=False))
    said = "; ".join(f"{person} practises the {tool}" for person, tool in plays.items())
    turns: Turns = []
    for number in range(rng.randint(1, 2)):
        person = rng.choice(people)
        asked = plays[person] if rng.random() < 0.5 else rng.choice([tool for tool in tools if tool != plays[person]])
        question = rng.choice([f"Does {person} practise the {asked}?", f"Is it {person} who practises the {asked}?"])
        answer = "yes" if asked == plays[person] else "no"
        turns.append(((f"{said}. " if number == 0 else "") + question, f"{{\n{answer}\n}}"))
    return turns


def backwards(rng: random.Random) -> Turns:
    """A tour is described from its start; the answer is the way back, one stop per line."""
    stops = rng.sample(STOPS, rng.randint(2, 5))
    told = rng.choice([f"We went to {_listed(stops)}.", "The tour: " + ", then ".join(stops) + "."])
    return [(f"{told} And the way back?", "\n".join(f"< {stop}" for stop in reversed(stops)))]


def courtesy(rng: random.Random) -> Turns:
    """An order becomes a courteous letter of three lines."""
    writer, reader = rng.sample(NAMES, 2)
    errand = rng.choice(ERRANDS)
    order = rng.choice([f"{reader}, {errand}! {writer}", f"{writer} tells {reader} to {errand}."])
    return [(order, f"Dear {reader},\nmight I trouble you to {errand}?\nYours, {writer}")]


def spelled(rng: random.Random) -> Turns:
    """A made-up call sign is spelled letter by letter, in capitals."""
    sign = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    return [(rng.choice([f"Radio check for {sign}.", f"Our call sign is {sign}."]), "~".join(sign.upper()))]


TASKS: dict[str, Callable[[random.Random], Turns]] = {
    task.__name__: task
    for task in (quickstart, faults, trains, chores, agenda, moves, whether, backwards, courtesy, spelled)
}
