r"""Write a JSON schema as rules of a grammar in llguidance's variant of Lark's format.

    write_json_rules({"type": "array", "items": {"enum": [1, 2]}}, "reply", "json_schema")

llguidance has its own translation of schemas, but texts that it allows violate a schema (docs/decisions). A reply that
follows these rules to its end satisfies the schema as the library jsonschema reads it, which also checks it afterwards.
What can't be written as a rule is refused by name.

Each schema inside the schema, or with a `$ref` to it, is a "node": a dict with keywords. A value must satisfy several
nodes at once, for example because of `allOf`, or because a name is in `properties` and matches `patternProperties`. So
a rule is written for a list of nodes. Nodes are told apart by their identity, which ends the recursion of a schema that
refers to itself.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from t5tune.constraints.json_nodes import (
    ANYTHING,
    Alternative,
    Node,
    drop_references,
    drop_repeated,
    get_item,
    list_first_items,
    list_other_nodes,
    list_property_nodes,
    list_required,
    read_kinds,
)
from t5tune.constraints.json_numbers import Bounds, write_multiples
from t5tune.constraints.json_strings import CannotEnforceError, Escapes, JsonStrings
from t5tune.constraints.schemas import resolve
from t5tune.constraints.validation import hides_siblings, make_validator
from t5tune.errors import SettingsError

ESCAPES = "x-escapes"  # keyword of the whole schema: unneeded escapes that texts may have, SLASH, NON_ASCII or both
SLASH, NON_ASCII = "/", "u"
UNENFORCEABLE = (
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
    "$dynamicRef", "$recursiveRef",
)  # fmt: skip
NUMBER_LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
MAX_LIMIT_OF_MULTIPLES = 2**53  # llguidance rounds limits to floats
MAX_EXPANSIONS = 20_000
MAX_ALTERNATIVES = 1000  # of one node
MAX_PATTERNS = 4  # of patternProperties, for each combination needs a rule
MAX_COUNTED = 20_000  # rules that count the properties of an object
# Models are trained on compact or indented JSON. With more freedom, a model may write blanks only.
SPACE = "SPACE?"
SPACE_TERMINAL = r"SPACE: / |\n {0,16}/"


def write_json_rules(schema: dict[str, Any], reply: str, place: str) -> str:
    """Write rules for a JSON schema. The rule called `reply` produces the JSON.

    Raises:
        SettingsError: the schema is invalid, a part of it can't be enforced, or nothing satisfies it.
    """
    try:
        return _RuleWriter(schema).write(reply)
    except CannotEnforceError as error:
        raise SettingsError(f"{place}: {error}") from None


class _RuleWriter:
    """Writes the rules of one schema."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = schema
        self._validator = make_validator(schema)
        self._hides_siblings = hides_siblings(self._validator)
        self._strings = JsonStrings(_read_escapes(schema))
        self._names: dict[tuple[int, ...], str | None] = {}
        self._terminals: dict[str, str] = {}
        self._rules: list[str] = []
        self._unfinished: set[tuple[int, ...]] = set()
        self._recursive: set[tuple[int, ...]] = set()
        self._open: set[int] = set()
        self._num_expansions = 0
        self._problem = "nothing satisfies it"

    def write(self, reply: str) -> str:
        start = self._write_rule([self._root])
        if start is None:
            raise CannotEnforceError(f"no reply can follow it: {self._problem}")
        terminals = [f"{name}: {definition}" for definition, name in self._terminals.items()]
        return "\n".join([f"{reply}: {start}", *self._rules, *terminals, SPACE_TERMINAL, ""])

    # -- from nodes to alternatives

    def _write_rule(self, nodes: Iterable[Node]) -> str | None:
        """Write a rule for the values that satisfy all nodes. Return its name, or None if there are no such values."""
        nodes = [node for node in drop_repeated(nodes) if node is not True]
        if False in nodes:
            return None
        key = tuple(map(id, nodes))
        if key in self._unfinished:
            self._recursive.add(key)
        if key not in self._names:
            self._unfinished.add(key)
            name = self._names[key] = f"s{len(self._names)}"
            alternatives = [ANYTHING]
            for node in nodes:
                alternatives = self._combine(alternatives, self._expand(node))
            options = [option for each in alternatives for option in self._write_alternative(each)]
            if options:
                self._rules.append(f"{name}: {' | '.join(options)}")
            else:
                self._names[key] = None
            self._unfinished.remove(key)
            if self._names[key] is None and key in self._recursive:
                raise CannotEnforceError("no reply can end: a schema requires itself")
        return self._names[key]

    def _expand(self, node: Node) -> list[Alternative]:
        """List the alternatives that satisfy a node."""
        if isinstance(node, bool):
            return [ANYTHING] if node else []
        if id(node) in self._open:  # a schema that is an alternative of itself has only its remaining alternatives
            return []
        self._num_expansions += 1
        if self._num_expansions > MAX_EXPANSIONS:
            raise CannotEnforceError("too complex to compile; simplify its allOf, anyOf and oneOf")
        refused = [key for key in UNENFORCEABLE if key in node and node[key] is not False]
        if refused:
            raise CannotEnforceError(f"{', '.join(refused)}: can't be enforced; remove it")
        self._open.add(id(node))
        try:
            return self._expand_keywords(node)
        finally:
            self._open.remove(id(node))

    def _resolve(self, reference: str) -> Node:
        found: Any = resolve(reference, self._root)
        if not isinstance(found, dict | bool):
            raise CannotEnforceError(f"$ref: {reference!r}: isn't in the schema; copy the definition into $defs")
        return found

    def _expand_keywords(self, node: Mapping[str, Any]) -> list[Alternative]:
        if "$ref" in node:
            target = self._expand(self._resolve(node["$ref"]))
            if self._hides_siblings:
                return target
        else:
            target = [ANYTHING]
        found = self._combine([Alternative(read_kinds(node), (node,))], target)
        for each in node.get("allOf", []):
            found = self._combine(found, self._expand(each))
        if "anyOf" in node:
            branches = [self._expand(each) for each in node["anyOf"]]
            found = self._combine(found, [option for branch in branches for option in branch])
        if "oneOf" in node:
            branches = [self._expand(each) for each in node["oneOf"]]
            for first, second in combinations(branches, 2):
                if not self._are_disjoint(self._combine(found, first), second):
                    problem = "can't be enforced unless its schemas exclude each other"
                    raise CannotEnforceError(f"oneOf: {problem}; use anyOf")
            found = self._combine(found, [option for branch in branches for option in branch])
        return found

    def _combine(self, first: list[Alternative], second: list[Alternative]) -> list[Alternative]:
        """List the alternatives that satisfy one of `first` and one of `second`."""
        if len(first) * len(second) > MAX_ALTERNATIVES:
            raise CannotEnforceError("too many combinations of anyOf and oneOf; simplify them")
        combined = [one.combine(other) for one in first for other in second]
        return [each for each in combined if each.kinds]

    def _are_disjoint(self, first: list[Alternative], second: list[Alternative]) -> bool:
        """Return True if no value satisfies both, as far as types, fixed values, ranges and required names show."""
        shared = self._combine(first, second)
        return all(self._is_empty(each) for each in shared)

    def _is_empty(self, alternative: Alternative) -> bool:
        if alternative.nodes and any("enum" in node or "const" in node for node in alternative.nodes):
            return not self._list_values(alternative)
        return all(self._is_kind_empty(kind, alternative) for kind in alternative.kinds)

    def _is_kind_empty(self, kind: str, alternative: Alternative) -> bool:
        if kind == "integer":
            return not Bounds.read(alternative.nodes).write_integers()
        if kind == "number":
            return not Bounds.read(alternative.nodes).write_numbers()
        if kind == "object":
            return any(self._is_name_impossible(name, alternative) for name in list_required(alternative))
        return False

    def _is_name_impossible(self, name: str, alternative: Alternative) -> bool:
        found = [ANYTHING]
        for node in list_property_nodes(name, alternative):
            found = self._combine(found, self._expand(node))
        return all(self._is_empty(each) for each in found)

    # -- from alternatives to text

    def _write_alternative(self, alternative: Alternative) -> list[str]:
        """Write the values of an alternative, as options of a rule."""
        if any("enum" in node or "const" in node for node in alternative.nodes):
            return self._write_values(self._list_values(alternative))
        options: list[str | None] = []
        kinds = alternative.kinds
        if "null" in kinds:
            options.append('"null"')
        if "boolean" in kinds:
            options += ['"true"', '"false"']
        if kinds & {"integer", "number"}:
            options.append(self._write_number(alternative, is_integer="number" not in kinds))
        if "string" in kinds:
            options.append(self._write_string(alternative))
        if "array" in kinds:
            options.append(self._write_array(alternative))
        if "object" in kinds:
            options.append(self._write_object(alternative))
        return [option for option in options if option is not None]

    def _add_terminal(self, definition: str) -> str:
        return self._terminals.setdefault(definition, f"T{len(self._terminals)}")

    # -- values of const and enum

    def _list_values(self, alternative: Alternative) -> list[Any]:
        node = next(node for node in alternative.nodes if "enum" in node or "const" in node)
        values = [node["const"]] if "const" in node else node["enum"]
        checks = [self._validator.evolve(schema=drop_references(each)) for each in alternative.nodes]
        return [value for value in values if all(check.is_valid(value) for check in checks)]

    def _write_values(self, values: list[Any]) -> list[str]:
        """Write fixed values: those without parts as a single terminal."""
        options = [self._write_value(value) for value in values if isinstance(value, list | dict)]
        simple = [self._write_simple_value(value) for value in values if not isinstance(value, list | dict)]
        if simple:
            options.append(self._add_terminal(" | ".join(dict.fromkeys(simple))))
        return options

    def _write_value(self, value: Any) -> str:
        if isinstance(value, list):
            return self._write_sequence("[", map(self._write_value, value), "]")
        if isinstance(value, dict):
            pairs = (self._write_pair(self._write_text(name), self._write_value(each)) for name, each in value.items())
            return self._write_sequence("{", pairs, "}")
        return self._add_terminal(self._write_simple_value(value))

    def _write_simple_value(self, value: Any) -> str:
        if isinstance(value, str):
            return self._write_text(value)
        if isinstance(value, bool) or value is None:
            return json.dumps(json.dumps(value))
        return " | ".join(json.dumps(text) for text in _spell_number(value))

    def _write_text(self, text: str) -> str:
        """Write a text as a part of a terminal."""
        if self._strings.escapes:
            return f'/"{self._strings.write_text(text)}"/'
        return json.dumps(json.dumps(text, ensure_ascii=False), ensure_ascii=False)

    @staticmethod
    def _write_pair(name: str, value: str) -> str:
        return f'{name} {SPACE} ":" {SPACE} {value}'

    @staticmethod
    def _write_sequence(opening: str, items: Iterable[str], closing: str) -> str:
        inner = f' {SPACE} "," {SPACE} '.join(items)
        return f'"{opening}" {SPACE} {inner} {SPACE} "{closing}"' if inner else f'"{opening}" {SPACE} "{closing}"'

    # -- numbers and texts

    def _write_number(self, alternative: Alternative, is_integer: bool) -> str | None:
        bounds = Bounds.read(alternative.nodes)
        alternatives = bounds.write_integers() if is_integer else bounds.write_numbers()
        if not alternatives:
            self._problem = bounds.problem or "no number is within its limits"
            return None
        text = " | ".join(f"({' & '.join(f'/{each}/' for each in some)})" for some in alternatives)
        factors = [node["multipleOf"] for node in alternative.nodes if "multipleOf" in node]
        multiples = [write_multiples(factor) for factor in factors]
        if None in multiples:
            return self._write_other_multiples(alternative.nodes, is_integer)
        return self._add_terminal(" & ".join([f"({text})", *(f"/{each}/" for each in multiples)]))

    def _write_other_multiples(self, nodes: Sequence[Mapping[str, Any]], is_integer: bool) -> str:
        """Write numbers as llguidance's rule, which is short for all multiples. They are written without a fraction."""
        kind = "integer" if is_integer else "number"
        parts = [{key: node[key] for key in (*NUMBER_LIMITS, "multipleOf") if key in node} for node in nodes]
        limits = [part[key] for part in parts for key in NUMBER_LIMITS if key in part]
        if any(abs(limit) > MAX_LIMIT_OF_MULTIPLES for limit in limits):
            raise CannotEnforceError("multipleOf: can't be enforced with a limit above 2^53; remove one of them")
        rule = json.dumps({"type": kind, "allOf": [{"type": kind, **part} for part in parts]})
        name = f"n{len(self._rules)}"
        self._rules.append(f"{name}: %json {rule}")
        return name

    def _write_string(self, alternative: Alternative) -> str | None:
        low, high = alternative.find_greatest("minLength"), alternative.find_least("maxLength")
        if high is not None and low > high:
            self._problem = f"minLength ({low}) is greater than maxLength ({high})"
            return None
        conditions = [self._strings.write_pattern(node["pattern"]) for node in alternative.nodes if "pattern" in node]
        conditions += [self._strings.write_format(node["format"]) for node in alternative.nodes if "format" in node]
        if low or high is not None or not conditions:
            conditions.append(self._strings.write_length(low, high))
        return self._add_terminal(" & ".join(f'/"{each}"/' for each in dict.fromkeys(conditions)))

    # -- arrays

    def _write_array(self, alternative: Alternative) -> str | None:
        low, high = alternative.find_greatest("minItems"), alternative.find_least("maxItems")
        num_first = max((len(list_first_items(node)) for node in alternative.nodes), default=0)
        items = []
        for index in range(num_first):
            item = self._write_rule(get_item(node, index) for node in alternative.nodes)
            if item is None:
                high = index if high is None else min(high, index)
                break
            items.append(item)
        later = self._write_rule(get_item(node, num_first) for node in alternative.nodes)
        if later is None:
            high = num_first if high is None else min(high, num_first)
        if high is not None and low > high:
            self._problem = f"minItems ({low}) is greater than maxItems, or than the number of possible items ({high})"
            return None
        items = items[:high]
        rest_low, rest_high = max(0, low - len(items)), None if high is None else high - len(items)
        text = "" if rest_high == 0 else self._write_repeated(later, rest_low, rest_high, is_first=not items)
        for index, item in reversed([*enumerate(items)]):
            comma = f'"," {SPACE} ' if index else ""
            text = f"{comma}{item} {SPACE} {text}"
            if index >= low:
                text = f"({text})?"
        return f'"[" {SPACE} {text} "]"'

    @staticmethod
    def _write_repeated(item: str | None, low: int, high: int | None, is_first: bool) -> str:
        """Write `low` to `high` items with commas between them, and before the first unless it `is_first`."""
        if not is_first:
            return f'("," {SPACE} {item} {SPACE}){{{low},{"" if high is None else high}}}'
        more = f'("," {SPACE} {item} {SPACE}){{{max(0, low - 1)},{"" if high is None else high - 1}}}'
        text = f"{item} {SPACE} {more}"
        return text if low else f"({text})?"

    # -- objects

    def _write_object(self, alternative: Alternative) -> str | None:
        required = list_required(alternative)
        known = [name for node in alternative.nodes for name in node.get("properties", ())]
        names = list(dict.fromkeys([*known, *required]))
        pairs: list[tuple[str, bool]] = []
        for name in names:
            value = self._write_rule(list_property_nodes(name, alternative))
            if value is not None:
                pair = self._write_pair(self._add_terminal(self._write_text(name)), value)
                pairs.append((pair, name in required))
            elif name in required:
                self._problem = f"the required property {name!r} is impossible"
                return None
        others = self._write_other_pairs(alternative, names)
        low, high = alternative.find_greatest("minProperties"), alternative.find_least("maxProperties")
        if others is not None and low > len(required) + 1:
            problem = "can't be enforced where any name is allowed, because a name may come twice"
            raise CannotEnforceError(f"minProperties: {low}: {problem}; name the properties, or require them")
        text = self._write_counted(pairs, others, low, high)
        if text is None:
            self._problem = f"minProperties ({low}) is greater than maxProperties, or than the number of names"
            return None
        return f'"{{" {SPACE} {text} "}}"'

    def _write_other_pairs(self, alternative: Alternative, names: list[str]) -> str | None:
        """Write a rule for a pair of a name that isn't in `names`, and its value. None: no other name is possible."""
        patterns = list(dict.fromkeys(each for node in alternative.nodes for each in node.get("patternProperties", ())))
        if len(patterns) > MAX_PATTERNS:
            problem = f"{len(patterns)} patterns; at most {MAX_PATTERNS} can be enforced"
            raise CannotEnforceError(f"patternProperties: {problem}")
        written = {each: f'/"{self._strings.write_pattern(each)}"/' for each in patterns}
        excluded = [self._write_text(name) for name in names]
        options = []
        for size in range(len(patterns), -1, -1):
            for matching in combinations(patterns, size):
                value = self._write_rule(list_other_nodes(set(matching), alternative))
                if value is None:
                    continue
                unmatched = [written[each] for each in patterns if each not in matching] + excluded
                conditions = [written[each] for each in matching] or [f'/"{self._strings.write_length(0, None)}"/']
                if unmatched:
                    conditions.append(f"~({' | '.join(unmatched)})")
                options.append(self._write_pair(self._add_terminal(" & ".join(conditions)), value))
        if not options:
            return None
        name = f"p{len(self._rules)}"
        self._rules.append(f"{name}: {' | '.join(options)}")
        return name

    def _write_counted(
        self, pairs: Sequence[tuple[str, bool]], others: str | None, low: int, high: int | None
    ) -> str | None:
        """Write pairs in their order, some of them required, then other pairs, and count them.

        Each state is a rule for the pairs after some of the named pairs, when `count` pairs were written. Counts above
        the highest limit are the same state.

        Returns:
            The name of the first state; None: the limits can't be met.
        """
        last = max(1, low, 0 if high is None else high + 1)
        if len(pairs) * last > MAX_COUNTED:
            most = MAX_COUNTED // len(pairs)
            raise CannotEnforceError(f"minProperties, maxProperties: at most {most:,} can be enforced")
        prefix = f"o{len(self._rules)}_"
        later = [self._write_rest(others, count, low, high) for count in range(last + 1)]
        for index, (pair, is_required) in reversed([*enumerate(pairs)]):
            states: list[str | None] = []
            for count in range(min(index, last) + 1):
                after = later[min(count + 1, last)]
                comma = f'"," {SPACE} ' if count else ""
                options = [] if after is None else [f"{comma}{pair} {SPACE} {after}"]
                if not is_required and later[count] is not None:
                    options.append(later[count] or "")
                states.append(self._add_state(f"{prefix}{index}_{count}", options))
            later = states
        return later[0]

    def _write_rest(self, others: str | None, count: int, low: int, high: int | None) -> str | None:
        """Write the pairs that may come after the named pairs, when `count` pairs were written."""
        if high is not None and count > high:
            return None
        least = max(0, low - count)
        most = None if high is None else high - count
        if others is None or most == 0:
            return None if least else '""'
        if least > 1:  # other names may come twice, so that two of them may be one property
            return None
        return self._write_repeated(others, least, most, is_first=count == 0)

    def _add_state(self, name: str, options: list[str]) -> str | None:
        if not options:
            return None
        self._rules.append(f"{name}: {' | '.join(options)}")
        return name


def _read_escapes(schema: Node) -> Escapes:
    allowed = "" if isinstance(schema, bool) else schema.get(ESCAPES, "")
    if not isinstance(allowed, str) or set(allowed) - {SLASH, NON_ASCII}:
        raise CannotEnforceError(f'{ESCAPES}: {allowed!r}: expected "{SLASH}", "{NON_ASCII}" or both')
    return Escapes(has_slash=SLASH in allowed, has_non_ascii=NON_ASCII in allowed)


def _spell_number(value: int | float) -> list[str]:
    """List the spellings of a number: Python's of an int and of a float, and JavaScript's."""
    spellings = [repr(value)]
    if isinstance(value, float) and value.is_integer():
        spellings.append(str(int(value)))
    elif isinstance(value, int) and abs(value) < 2**1023 and int(float(value)) == value:
        spellings.append(repr(float(value)))
    spellings += [text.replace("e-0", "e-") for text in spellings]
    return list(dict.fromkeys(spellings))
