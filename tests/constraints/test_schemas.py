"""JSON schemas that no finite reply can follow, and the difference between schemas and their data."""

import json
import random
import time
from contextlib import suppress
from typing import Any

import pytest

from t5tune.constraints.schemas import check_schema, list_fixed_texts
from t5tune.errors import SettingsError

LINK: dict[str, Any] = {"$ref": "#"}
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
TEXT = {"type": "string"}


def refuse(schema: Any) -> str:
    """Return the message of a schema that is refused, else an empty text."""
    try:
        check_schema(schema, "json_schema")
    except SettingsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("schema", "reference"),
    [
        (LINK, "#"),
        ({"type": "object", "properties": {"a": LINK}, "required": ["a"], "additionalProperties": False}, "#"),
        ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, "#/$defs/node"),
        ({"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1, "$defs": {"node": NODE}}, "#/$defs/node"),
        ({"type": "array", "prefixItems": [TEXT, LINK], "minItems": 2}, "#"),
        ({"type": "object", "additionalProperties": LINK, "required": ["a"]}, "#"),
        (
            {"type": ["array", "object"], "items": LINK, "minItems": 1, "properties": {"a": LINK}, "required": ["a"]},
            "#",
        ),
        ({"anyOf": [LINK, {"allOf": [TEXT, {"$ref": "#/$defs/a~1b"}]}], "$defs": {"a/b": {"oneOf": [LINK]}}}, "#"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "#/$defs/a"),
    ],
)
def test_schemas_without_finite_replies_are_refused(schema: Any, reference: str) -> None:
    assert refuse(schema) == f"json_schema: no reply can end: '{reference}' requires itself"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": LINK}},
        {"properties": {"a": LINK}, "required": ["a"]},  # a number follows it, too
        {"type": ["object", "null"], "properties": {"a": LINK}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"anyOf": [LINK, TEXT]}}, "required": ["a"]},
        {"type": "array", "items": LINK},
        {"type": "array", "prefixItems": [TEXT, LINK], "minItems": 1},
        {"type": "object", "additionalProperties": LINK, "patternProperties": {"a": TEXT}, "required": ["a"]},
        {"anyOf": [LINK, {"$ref": "#/$defs/node"}, TEXT], "$defs": {"node": NODE}},
        {"$defs": {"node": NODE}, **TEXT},
        {"$ref": "#there"},
        {"$ref": "#/$defs/text", "allOf": [LINK], "$defs": {"text": TEXT}},
        {"allOf": [{"type": []}]},
        {"$ref": "other.json#"},
        {"allOf": [{"$id": "http://there", "properties": {"a": LINK}, "type": "object", "required": ["a"]}]},
        {"type": "object", "enum": [{}], **NODE},
        {"type": "array", "items": LINK, "minItems": -1},
        {"anyOf": [], "oneOf": 1, "type": "array", "items": [LINK], "required": LINK, "allOf": {"a": LINK}},
    ],
)
def test_schemas_with_finite_replies_are_allowed(schema: Any) -> None:
    assert refuse(schema) == ""


def test_random_schemas_are_refused_if_nothing_follows_them() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    chooser, num_refused, num_valid = random.Random(7), 0, 0
    for _ in range(600):
        names = [f"d{number}" for number in range(chooser.randint(1, 4))]
        definitions = {name: make_random(chooser, names, 2) for name in names}
        schema = {**definitions["d0"], "$defs": definitions}
        found = build(schema, definitions, depth=len(names) + 1)
        if found is not None:
            with suppress(RecursionError):  # jsonschema follows a reference to itself forever
                assert jsonschema.Draft202012Validator(schema).is_valid(found[0])
                num_valid += 1
        assert bool(refuse(schema)) == (found is None), json.dumps(schema)
        num_refused += found is None
    assert num_refused > 200
    assert num_valid > 200


def make_random(chooser: random.Random, names: list[str], depth: int) -> dict[str, Any]:
    if depth == 0 or chooser.random() < 0.3:
        return {"$ref": f"#/$defs/{chooser.choice(names)}"} if chooser.random() < 0.8 else {"type": "null"}
    parts = [make_random(chooser, names, depth - 1) for _ in range(2)]
    match chooser.randrange(4):
        case 0:
            return {"anyOf": parts}
        case 1:
            return {"type": "array", "prefixItems": parts[:1], "items": parts[1], "minItems": chooser.randint(0, 2)}
        case 2:
            required = chooser.sample(["a", "b", "c"], chooser.randint(0, 2))
            properties = dict(zip("ab", parts, strict=True))
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": parts[0]}
    return {"allOf": parts[:1]}


def build(schema: dict[str, Any], definitions: dict[str, Any], depth: int) -> list[Any] | None:
    """Build the smallest JSON that follows a schema, in a list, with at most `depth` references below each other."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return build(definitions[name], definitions, depth - 1) if depth else None
    if choices := schema.get("anyOf", schema.get("allOf")):
        return next(filter(None, (build(choice, definitions, depth) for choice in choices)), None)
    if schema["type"] == "null":
        return [None]
    if schema["type"] == "array":
        needed = dict(enumerate([schema["prefixItems"][0], schema["items"]][: schema["minItems"]]))
    else:
        needed = {name: schema["properties"].get(name, schema["additionalProperties"]) for name in schema["required"]}
    built = {key: build(each, definitions, depth) for key, each in needed.items()}
    values = {key: value[0] for key, value in built.items() if value is not None}
    if len(values) < len(built):
        return None
    return [[*values.values()] if schema["type"] == "array" else values]


@pytest.mark.slow
def test_a_long_chain_of_references_is_checked_quickly() -> None:
    """A check of all schemas for each reference would take minutes."""
    links: dict[str, Any] = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(10_000)}
    for definitions in (links, dict(reversed(links.items()))):
        for last, message in ((TEXT, ""), ({"$ref": "#/$defs/d7"}, "'#/$defs/d7' requires itself")):
            started = time.process_time()
            assert refuse({"$ref": "#/$defs/d0", "$defs": definitions | {"d10000": last}}).endswith(message)
            assert time.process_time() - started < 5


def test_data_in_a_schema_is_no_schema() -> None:
    data = {"multipleOf": 20_000, "properties": {"tea": LINK}, "enum": [1, "six", ""]}
    schema = {"const": data, "enum": [data], "default": data, "examples": [data], "type": "object"}
    assert refuse(schema) == ""
    assert {*list_fixed_texts({"default": data, "examples": [data]})} == set()
    for key in ("const", "enum"):  # a reply has these texts, of names and values
        assert {*list_fixed_texts({key: [data]})} == {"multipleOf", "properties", "tea", "$ref", "#", "enum", "six"}


def test_properties_may_have_the_names_of_keywords() -> None:
    names = ["enum", "default", "properties"]
    schema = {"properties": {name: {"const": f"{name} 1"} for name in names}, "required": ["const", "enum"]}
    assert {*list_fixed_texts(schema)} == {*names, *(f"{name} 1" for name in names), "const"}
    for name in names:
        assert "multipleOf: 20,000; at most" in refuse({"properties": {name: {"multipleOf": 20_000}}})
