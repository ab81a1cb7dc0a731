"""The keywords of a JSON schema that hold for one value, gathered from all nodes of the schema that it must satisfy."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Node = Mapping[str, Any] | bool
"""A schema, or a part of it that is a schema: its keywords, or whether it allows everything or nothing."""

ALL_KINDS = frozenset({"null", "boolean", "number", "string", "array", "object"})


@dataclass(frozen=True)
class Alternative:
    """Values of some kinds that satisfy some nodes, if only the keywords for their kind are regarded."""

    kinds: frozenset[str]
    nodes: tuple[Mapping[str, Any], ...]

    def combine(self, other: "Alternative") -> "Alternative":
        kinds = self.kinds & other.kinds
        is_numeric = all(each.kinds & {"integer", "number"} for each in (self, other))
        if is_numeric and "number" not in kinds:
            kinds |= {"integer"}
        return Alternative(kinds, tuple(drop_repeated([*self.nodes, *other.nodes])))

    def find_least(self, keyword: str) -> int | None:
        """Return the lowest limit that the nodes have for a keyword."""
        return min((int(node[keyword]) for node in self.nodes if keyword in node), default=None)

    def find_greatest(self, keyword: str) -> int:
        """Return the highest limit that the nodes have for a keyword, else 0."""
        return max((int(node[keyword]) for node in self.nodes if keyword in node), default=0)


ANYTHING = Alternative(ALL_KINDS, ())


def drop_repeated(nodes: Iterable[Any]) -> list[Any]:
    return list({id(node): node for node in nodes}.values())


def read_kinds(node: Mapping[str, Any]) -> frozenset[str]:
    if "type" not in node:
        return ALL_KINDS
    kinds = node["type"]
    found = frozenset([kinds] if isinstance(kinds, str) else kinds)
    return found - {"integer"} if "number" in found else found


def list_required(alternative: Alternative) -> list[str]:
    return list(dict.fromkeys(name for node in alternative.nodes for name in node.get("required", ())))


def list_property_nodes(name: str, alternative: Alternative) -> list[Node]:
    """List the nodes that the value of a property must satisfy."""
    found: list[Node] = []
    for node in alternative.nodes:
        matching = {pattern for pattern in node.get("patternProperties", ()) if re.search(pattern, name)}
        if name in node.get("properties", ()):
            found.append(node["properties"][name])
            found += [node["patternProperties"][pattern] for pattern in matching]
        else:
            found += _list_unnamed_nodes(matching, node)
    return found


def list_other_nodes(matching: set[str], alternative: Alternative) -> list[Node]:
    """List the nodes for the value of a name that is in no `properties`, and that these patterns match."""
    return [found for node in alternative.nodes for found in _list_unnamed_nodes(matching, node)]


def _list_unnamed_nodes(matching: set[str], node: Mapping[str, Any]) -> list[Node]:
    patterns = node.get("patternProperties", {})
    found = [patterns[pattern] for pattern in patterns if pattern in matching]
    return found or [node.get("additionalProperties", True)]


def list_first_items(node: Mapping[str, Any]) -> list[Node]:
    """Return the schemas of a tuple, which drafts before 2020 have in `items`."""
    items = node.get("items")
    return items if isinstance(items, list) else node.get("prefixItems", [])


def get_item(node: Mapping[str, Any], index: int) -> Node:
    first = list_first_items(node)
    if index < len(first):
        return first[index]
    later: Node = node.get("additionalItems" if isinstance(node.get("items"), list) else "items", True)
    return later


def drop_references(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node without keywords whose nodes are in the alternative, too."""
    return {key: value for key, value in node.items() if key not in ("$ref", "allOf", "anyOf", "oneOf")}
