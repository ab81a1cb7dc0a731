"""Suggestions for a JSON object that isn't a record, but contains the records: `{"version": 1, "data": [{…}, {…}]}`."""

import json
import re
from typing import Any

# keys of records whose values are lists of turns, calls or tools
LIST_KEYS = {"conversations", "messages", "prompt", "completion", "chosen", "rejected", "tools", "tool_calls", "images"}
_LIST_OF_OBJECTS = re.compile(r'"([\w -]{1,40})"\s*:\s*\[\s*\{')


def suggest_unwrapping(value: dict[str, Any]) -> str:
    """Return how to read an object that contains records, as the end of a message; empty: it contains no records."""
    for key, item in value.items():
        if key not in LIST_KEYS and isinstance(item, list) and item and all(isinstance(each, dict) for each in item):
            return _suggest_list(key)
    count = sum(isinstance(item, dict) for item in value.values())
    if count < 2:
        return ""
    command = "jq 'with_entries(select(.value | type == \"object\"))' IN.json > OUT.json"
    return f"; {count} of its {len(value)} values are objects; if these are the records, remove the rest: {command}"


def suggest_unwrapping_text(beginning: str) -> str:
    """Do the same for an object whose beginning is known."""
    found = _LIST_OF_OBJECTS.search(beginning)
    return "" if found is None or found[1] in LIST_KEYS else _suggest_list(found[1])


def _suggest_list(key: str) -> str:
    command = f"jq '.[{json.dumps(key[:40])}]' IN.json > OUT.json"
    return f"; if the list {key[:40]!r} has the records, give it as a separate file: {command}"
