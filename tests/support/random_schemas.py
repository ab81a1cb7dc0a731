"""Random JSON schemas, each with values that follow it, made without a grammar or a validator.

schema, make_value = make_schema(random.Random(7))
json.dumps(make_value())
"""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Schema = dict[str, Any]
Made = tuple[Schema, Callable[[], Any]]
NAMES = ["name", "amount", "is_paid", "first name", "order-id", "größe", "a/b", "x_1", "Total", "日付", "it's", "items"]
TEXTS = [
    "Aida Lee", "", "a", 'No. 5, "quoted"', "line\nbreak", "tab\tand \\ back", "Zürich, 7°", "  two  spaces ", "{x}",
    "/path/to", "naïve – yes", "don't", "日本", "😀", "<b>x</b>", "</s>", "a" * 40, "\u0001\u2028\u007f", "null", "1",
]  # fmt: skip
FIXED = [
    "red", "light green", "blue ", 1, 2.5, None, True, -3, 1000.0, 1e-07, 2**53 + 1, 'No "x"', "größe", "日本", "",
    [1, "a"], {"k": 0},
]  # fmt: skip
SHORT = ["ab", "Aïda", "a b", "x\ny", '"q"', "12345", "日本語", "\\n\\"]
MAX_DEPTH = 3
LEAVES = ["string", "sized", "pattern", "format", "integer", "range", "large", "number", "bounds", "steps", "boolean"]
LEAVES += ["null", "enum", "const", "any_of", "all_of", "one_of", "types", "ref"]
BRANCHES = ["object"] * 5 + ["array"] * 3 + ["tuple", "tree", "chain", "map"]
DEFINITIONS: Schema = {
    "amount": {"type": "integer", "minimum": 0, "maximum": 999},
    "tree": {
        "type": "object",
        "properties": {"label": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        "required": ["label", "children"],
        "additionalProperties": False,
    },
    "chain": {
        "type": "object",
        "properties": {
            "value": {"$ref": "#/$defs/amount"},
            "next": {"anyOf": [{"$ref": "#/$defs/chain"}, {"type": "null"}]},
        },
        "required": ["value"],
        "additionalProperties": False,
    },
}


def make_schema(chooser: Random) -> Made:
    """Make a schema, and a function that makes values that follow it."""
    kind = "object" if chooser.random() < 0.8 else chooser.choice([*LEAVES, *BRANCHES])
    schema, make_value = _make(chooser, kind, 0)
    if '"$ref"' in json.dumps(schema):
        schema = schema | {"$defs": DEFINITIONS}
    if chooser.random() < 0.3:
        schema = schema | {"x-escapes": "u"}
    return schema, make_value


def list_fixed_texts(schema: Any, is_value: bool = False) -> Iterator[str]:
    """List the texts that a reply must spell as the schema does: names of properties, and texts of enum and const."""
    if isinstance(schema, str) and is_value:
        yield schema
    elif isinstance(schema, list):
        for item in schema:
            yield from list_fixed_texts(item, is_value)
    elif isinstance(schema, dict):
        yield from schema if is_value else schema.get("properties", {})
        for key, value in schema.items():
            for part in value.values() if key in ("properties", "$defs") and not is_value else [value]:
                yield from list_fixed_texts(part, is_value or key in ("enum", "const"))


def write_json(value: Any, style: int, chooser: Random, schema: Schema) -> str:
    """Write a value as compact, spaced or indented JSON, and some with `\\u00e9` where the schema allows it."""
    options: Schema = [{"separators": (",", ":")}, {}, {"indent": 2}][style]
    return json.dumps(value, ensure_ascii="x-escapes" in schema and chooser.random() < 0.6, **options)


def _make(chooser: Random, kind: str, depth: int) -> Made:
    return MAKERS[kind](chooser, depth)


def _make_any(chooser: Random, depth: int) -> Made:
    return _make(chooser, chooser.choice([*LEAVES, *(BRANCHES if depth < MAX_DEPTH else [])]), depth)


def _make_object(chooser: Random, depth: int) -> Made:
    names = chooser.sample(NAMES, chooser.randint(0 if depth else 1, 4))
    parts = {name: _make_any(chooser, depth + 1) for name in names}
    required = [name for name in names if chooser.random() < 0.7]
    schema: Schema = {"type": "object", "properties": {name: part for name, (part, _) in parts.items()}}
    schema["required"] = required
    more = chooser.choice(["none"] * 4 + ["any", "free", "schema"])
    extra: Callable[[], Any] = lambda: chooser.choice([1, "x", None, [True], {"y": 2}])  # noqa: E731
    if more == "none":
        schema["additionalProperties"] = False
    elif more == "free":
        schema["additionalProperties"] = True
    elif more == "schema":
        schema["additionalProperties"], extra = _make_any(chooser, MAX_DEPTH)

    def make_value() -> Any:
        value = {name: make() for name, (_, make) in parts.items() if name in required or chooser.random() < 0.5}
        if more != "none":
            value |= {name: extra() for name in chooser.sample(["extra", "na", "größer", "x 9"], chooser.randint(0, 2))}
        return value

    return schema, make_value


def _make_array(chooser: Random, depth: int) -> Made:
    items, make_item = _make_any(chooser, depth + 1)
    low, high = chooser.choice([0, 0, 1, 2]), chooser.choice([None, 2, 3])
    schema = (
        {"type": "array", "items": items} | ({"minItems": low} if low else {}) | ({"maxItems": high} if high else {})
    )
    return schema, lambda: [make_item() for _ in range(chooser.randint(low, high or 4))]


def _make_tuple(chooser: Random, depth: int) -> Made:
    (first, make_first), (second, make_second) = (_make_any(chooser, depth + 1) for _ in range(2))
    schema = {"type": "array", "prefixItems": [first, second], "items": False, "minItems": 2}
    return schema, lambda: [make_first(), make_second()]


def _make_any_of(chooser: Random, depth: int) -> Made:
    (first, make_first), (second, make_second) = (_make_any(chooser, max(depth + 1, MAX_DEPTH - 1)) for _ in range(2))
    return {"anyOf": [first, second]}, lambda: chooser.choice([make_first, make_second])()


def _make_tree(chooser: Random, depth: int) -> Made:
    def make_node(depth: int) -> Any:
        children = [make_node(depth + 1) for _ in range(chooser.randint(0, 2 if depth < 2 else 0))]
        return {"label": chooser.choice(TEXTS), "children": children}

    return {"$ref": "#/$defs/tree"}, lambda: make_node(0)


def _make_chain(chooser: Random, depth: int) -> Made:
    def make_link(size: int) -> Any:
        value = {"value": chooser.randint(0, 999)}
        return value | ({"next": make_link(size - 1)} if size else chooser.choice([{}, {"next": None}]))

    return {"$ref": "#/$defs/chain"}, lambda: make_link(chooser.randint(0, 3))


def _make_sized(chooser: Random, depth: int) -> Made:
    low, high = chooser.choice([0, 1, 2]), chooser.choice([None, 5, 8])
    schema = {"type": "string", "minLength": low} | ({"maxLength": high} if high else {})
    return schema, lambda: chooser.choice(SHORT)


def _make_pattern(chooser: Random, depth: int) -> Made:
    digits = lambda: "".join(chooser.choices("0123456789", k=chooser.randint(3, 5)))  # noqa: E731
    made: list[tuple[str, Callable[[], str]]] = [
        (r"^[A-Z]{2}-\d{3,5}$", lambda: f"AB-{digits()}"),
        (r"^(ja|nein|vielleicht)$", lambda: chooser.choice(["ja", "nein", "vielleicht"])),
        (r"\d{3}", lambda: f'über {digits()} " km'),  # anywhere in the text
        (
            r"^/[a-zé]+(/[a-zé]+)*$",
            lambda: "/".join(["", *chooser.choices(["usr", "été", "a"], k=chooser.randint(1, 3))]),
        ),
        (r"^\S+ \S+$", lambda: chooser.choice(["Aida Lee", "日本 a", '"a" \\b'])),
        ('^[^"]*$', lambda: chooser.choice(["", "a\\b", "x\ny", "it's"])),
        (r"^[^\\]+$", lambda: chooser.choice(['"a"', "x/y", "\t"])),
        (r"""^[^'"\\,;]+$""", lambda: chooser.choice(["a b", "größe", "<x>"])),
        ('^[^<>&"]*$', lambda: chooser.choice(["a b", "\\", "日本\n"])),
        (r"^[^\w\s]+$", lambda: chooser.choice(["-", '"\\"', "…"])),
        (r"^\W?[^\d]$|^\D\w{2,}", lambda: chooser.choice(["+a", "-bc", "ä12 é"])),
        ("(?i)^(yes|no)$", lambda: chooser.choice(["yes", "No", "YES"])),
        (r"^$|^a.?b$|x{3}\Z", lambda: chooser.choice(["", "ab", 'a"b', "éxxx"])),
    ]
    pattern, make_text = chooser.choice(made)
    return {"type": "string", "pattern": pattern}, make_text


def _make_format(chooser: Random, depth: int) -> Made:
    made = {
        "date": ["2026-11-30", "0001-02-28"],
        "time": ["23:59:59Z", "08:15:00+02:00"],
        "date-time": ["2026-11-30T08:15:00Z", "2026-01-01T00:00:00.125-03:30"],
        "uuid": ["123e4567-e89b-12d3-a456-426614174000"],
        "ipv4": ["127.0.0.1", "255.0.30.4"],
        "email": ["aida@example.com", "a.b+c@d-e.org"],
        "ipv6": ["::1", "2001:db8::ff00:42:8329", "::ffff:192.0.2.1"],
        "hostname": ["example.com", "a-b.c"],
        "duration": ["P1DT12H", "PT5M", "P3W"],
        "uri": ["https://a.example/b?c=d#e", "mailto:aida@example.com"],
    }
    name = chooser.choice([*made])
    return {"type": "string", "format": name}, lambda: chooser.choice(made[name])


def _make_range(chooser: Random, depth: int) -> Made:
    low = chooser.choice([None, -120, -5, 0, 1, 17])
    high = None if low is not None and chooser.random() < 0.3 else (low or 0) + chooser.choice([0, 3, 120, 99_000])
    step = chooser.choice([1, 1, 1, 5, 7, 100])
    first = (high if low is None else low) or 0
    schema: Schema = {"type": "integer"} | ({"multipleOf": step} if step > 1 else {})
    schema |= {} if low is None else chooser.choice([{"minimum": low}, {"exclusiveMinimum": low - 1}])
    schema |= {} if high is None else chooser.choice([{"maximum": high + step}, {"exclusiveMaximum": high + step + 1}])

    def make_value() -> int:
        value = chooser.randint(first - 10_000 if low is None else first, first + 10_000 if high is None else high)
        return -(-value // step) * step  # rounded up

    return schema, make_value


def _make_bounds(chooser: Random, depth: int) -> Made:
    low, size = chooser.choice([-1.5, 0, 0.25, 3]), chooser.choice([1, 2.5, 1000])
    is_open = chooser.random() < 0.5
    schema = {"type": "number", "exclusiveMinimum" if is_open else "minimum": low, "maximum": low + size}
    parts = [0.25, 0.5, 1] if is_open else [0, 0.125, 0.5]
    return schema, lambda: low + size * chooser.choice(parts)


def _make_large(chooser: Random, depth: int) -> Made:
    """Limits beyond 2^53, where floats have no odd integers."""
    low = chooser.choice([-1, 1]) * (2**53 + chooser.randint(-3, 3))
    high = low + chooser.randint(1, 30)
    schema: Schema = {"type": "integer", "minimum": low, "exclusiveMaximum": high + 1}
    return schema, lambda: chooser.randint(low, high)


def _make_steps(chooser: Random, depth: int) -> Made:
    step = chooser.choice([0.25, 0.5, 2, 3])
    return {"type": "number", "multipleOf": step, "minimum": 0}, lambda: step * chooser.randint(0, 99)


def _make_all_of(chooser: Random, depth: int) -> Made:
    parts = [{"type": ["string", "null"], "maxLength": 6}, {"pattern": '^[^"]+$'}, {"minLength": 2, "pattern": "[a-z]"}]
    chooser.shuffle(parts)
    return {"allOf": parts}, lambda: chooser.choice(["abc", "a é b", None, "x\\"])


def _make_one_of(chooser: Random, depth: int) -> Made:
    cat = {"properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind", "lives"]}
    dog = {"properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"], "maxProperties": 2}
    schema = {"type": "object", "oneOf": [cat, dog]}
    return schema, lambda: chooser.choice([{"kind": "cat", "lives": 9}, {"kind": "wolf"}, {"kind": "dog", "x": [1]}])


def _make_map(chooser: Random, depth: int) -> Made:
    schema: Schema = {
        "type": "object",
        "properties": {"id": {"type": "integer"}},
        "patternProperties": {"^n_": {"type": "number"}, "[0-9]$": {"minimum": 3, "type": ["number", "null"]}},
        "additionalProperties": chooser.choice([False, {"type": "string"}]),
        "minProperties": 1,
        "maxProperties": 3,
    }
    values = [{"id": 1}, {"n_a": 0.5, "n_7": 3.5}, {"id": 2, "a1": None}]
    return schema, lambda: chooser.choice(values)


def _make_enum(chooser: Random, depth: int) -> Made:
    values = chooser.sample(FIXED, 3)
    return {"enum": values}, lambda: chooser.choice(values)


def _make_const(chooser: Random, depth: int) -> Made:
    value = chooser.choice(FIXED)
    return {"const": value}, lambda: value


MAKERS: dict[str, Callable[[Random, int], Made]] = {
    "object": _make_object,
    "array": _make_array,
    "tuple": _make_tuple,
    "any_of": _make_any_of,
    "tree": _make_tree,
    "chain": _make_chain,
    "sized": _make_sized,
    "pattern": _make_pattern,
    "format": _make_format,
    "range": _make_range,
    "bounds": _make_bounds,
    "large": _make_large,
    "steps": _make_steps,
    "all_of": _make_all_of,
    "one_of": _make_one_of,
    "map": _make_map,
    "enum": _make_enum,
    "const": _make_const,
    "string": lambda chooser, _: ({"type": "string"}, lambda: chooser.choice(TEXTS)),
    "integer": lambda chooser, _: ({"type": "integer"}, lambda: chooser.choice([0, 7, -3, 1234567, 10, 3.0, 1e22])),
    "number": lambda chooser, _: (
        {"type": "number"},
        lambda: chooser.choice([0, -1.5, 3.25, 1e-07, 2e20, 12, 0.1, 1000.0, -0.0]),
    ),
    "boolean": lambda chooser, _: ({"type": "boolean"}, lambda: chooser.random() < 0.5),
    "null": lambda chooser, _: ({"type": "null"}, lambda: None),
    "types": lambda chooser, _: ({"type": ["string", "null", "integer"]}, lambda: chooser.choice(["x y", None, 4])),
    "ref": lambda chooser, _: ({"$ref": "#/$defs/amount"}, lambda: chooser.randint(0, 999)),
}
