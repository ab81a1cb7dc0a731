"""Check JSON schemas before llguidance compiles them, and list the texts that a tokenizer must be able to write.

check_schema({"$ref": "#"}, "json_schema: a.json")    # SettingsError: … no reply can end: '#' requires itself
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from typing import Any
from urllib.parse import unquote

from t5tune.errors import SettingsError

LIMITS = {"multipleOf": 10_000, "properties": 5_000}
MAPS = {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}  # of names to schemas
DATA = {"const", "enum", "default", "examples"}  # not schemas


def list_schemas(schema: Any) -> Iterator[dict[str, Any]]:
    """List a schema and the schemas in it, except for true and false."""
    if isinstance(schema, list):
        for item in schema:
            yield from list_schemas(item)
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key not in DATA:
                yield from list_schemas([*value.values()] if key in MAPS and isinstance(value, dict) else value)


def list_fixed_texts(schema: Any) -> Iterator[str]:
    """List the names of properties, and the texts in `enum` and `const`."""
    for each in list_schemas(schema):
        yield from _list_texts(
            [*_get(each, "properties", dict), each.get("required"), each.get("enum"), each.get("const")]
        )


def _list_texts(data: Any) -> Iterator[str]:
    if isinstance(data, str) and data:
        yield data
    elif isinstance(data, dict | list):
        for each in [*data, *data.values()] if isinstance(data, dict) else data:
            yield from _list_texts(each)


def check_schema(schema: Any, place: str) -> None:
    """Raise SettingsError for a schema that no reply can follow to its end, or that llguidance would crash with."""
    schemas = [*list_schemas(schema)]
    for each in schemas:
        for key, limit in LIMITS.items():
            value = each.get(key)
            size = len(value) if isinstance(value, dict) else value
            if isinstance(size, int | float) and size > limit:
                raise SettingsError(f"{place}: {key}: {size:,}; at most {limit:,} can be enforced")
    if (reference := _find_endless(schema, schemas)) is not None:
        raise SettingsError(f"{place}: no reply can end: {reference!r} requires itself")


def _find_endless(root: Any, schemas: list[dict[str, Any]]) -> str | None:
    """Find a reference that makes all JSON that follows a schema infinite; None: finite JSON may follow it.

    A schema counts as endless until each of its conditions can be met without endless schemas.
    """
    if any({"$id", "id"} & each.keys() for each in schemas if each is not root):  # references may be relative to it
        return None
    endless = {id(each): [*_list_conditions(each, root)] for each in schemas}
    users = defaultdict(list)
    for key, conditions in endless.items():
        for each in chain.from_iterable(chain.from_iterable(conditions)):
            users[id(each)].append(key)

    def is_met(condition: list[list[Any]]) -> bool:
        return any(all(id(each) not in endless for each in needed) for needed in condition)

    unchecked = [*endless]
    while unchecked:
        key = unchecked.pop()
        if key in endless and all(map(is_met, endless[key])):
            del endless[key]
            unchecked += users[key]
    reference, seen, schema = None, set[int](), root
    while id(schema) in endless and id(schema) not in seen:
        seen.add(id(schema))
        unmet = next(condition for condition in endless[id(schema)] if not is_met(condition))
        needed = next(each for each in unmet[0] if id(each) in endless)
        reference = schema["$ref"] if needed is resolve(schema.get("$ref"), root) else reference
        schema = needed
    return reference


def _list_conditions(schema: dict[str, Any], root: Any) -> Iterator[list[list[Any]]]:
    """List what finite JSON needs to follow a schema: for each condition, all schemas of one of its lists."""
    if "$ref" in schema:  # before the draft of 2019, it hides all keys next to it
        yield [[resolve(schema["$ref"], root)]]
        return
    yield from ([[each]] for each in _get(schema, "allOf", list))
    yield from ([[each] for each in found] for key in ("anyOf", "oneOf") if (found := _get(schema, key, list)))
    kinds = schema.get("type")
    needed = {"object": _list_needed_properties, "array": _list_needed_items}
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds and not {"enum", "const"} & schema.keys() and all(kind in ("object", "array") for kind in kinds):
        yield [needed[kind](schema) for kind in kinds]


def _list_needed_properties(schema: dict[str, Any]) -> list[Any]:
    properties, required = _get(schema, "properties", dict), _get(schema, "required", list)
    needed = [properties[name] for name in map(str, required) if name in properties]
    has_more = len(needed) < len(required) and "patternProperties" not in schema
    return [*needed, schema.get("additionalProperties")] if has_more else needed


def _list_needed_items(schema: dict[str, Any]) -> list[Any]:
    number, first = max(0, _get(schema, "minItems", int)), _get(schema, "prefixItems", list)
    return [*first[:number], schema.get("items") if number > len(first) else None]


def _get(schema: dict[str, Any], key: str, kind: Any) -> Any:
    """Return the value of a key; if it is missing or malformed, 0 or an empty value."""
    return value if isinstance(value := schema.get(key), kind) else kind()


def resolve(reference: Any, root: Any) -> Any:
    """Find the schema that a reference names by its path from the root; None: it isn't known."""
    if not isinstance(reference, str) or not re.match("#(/|$)", reference):
        return None
    for name in unquote(reference).split("/")[1:]:
        root = root.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root
