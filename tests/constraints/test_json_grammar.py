"""Which JSON a schema allows: all of it is valid, and what Python writes is in it. The 256 bytes are the vocabulary."""

import json
import random
import re
from functools import cache
from itertools import product
from typing import Any

import jsonschema
import pytest

from t5tune.constraints import Constraint
from t5tune.constraints.grammars import GrammarCompiler, GrammarMatcher
from t5tune.constraints.spelling import Spellings
from t5tune.errors import SettingsError

pytest.importorskip("llguidance")
STOP = 256


@cache
def make_compiler() -> GrammarCompiler:
    spellings: list[bytes | None] = [*(bytes([byte]) for byte in range(256)), None]
    return GrammarCompiler(Spellings(spellings, spellings), [STOP])


def compile_schema(schema: Any) -> GrammarMatcher:
    return make_compiler().compile(Constraint("json_schema", json.dumps(schema), "json_schema"))


def allows(start: GrammarMatcher, reply: str) -> bool:
    matcher = start.copy()
    return all(map(matcher.accept, reply.encode())) and matcher.is_complete


def is_valid(schema: Any, value: Any) -> bool:
    kind = jsonschema.Draft202012Validator
    return bool(kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(value))


ALLOWED_AND_REFUSED: dict[str, tuple[Any, list[str], list[str]]] = {
    "a pattern without quotes": ({"pattern": '^[^"]*$', "type": "string"}, [r'"x1 \\y"'], [r'"x1\"y"']),
    "a pattern without backslashes": (
        {"pattern": r"^[^\\]*$", "type": "string"},
        [r'"x\"y"'],
        [r'"x\\y"', r'"x\u005cy"'],
    ),
    "a pattern without both": ({"pattern": r'^[^"\\]*$', "type": "string"}, [r'"x\ny"'], [r'"\""', r'"\\"']),
    "a pattern without apostrophes": ({"pattern": "^[^'\"]+$", "type": "string"}, ['"x"'], [r'"\""', '"\'"']),
    "a pattern without separators": ({"pattern": '^[^,;"]+$', "type": "string"}, ['"a.b"'], [r'"a\"b"', '"a,b"']),
    "a pattern without markup": ({"pattern": '^[^<>&"]*$', "type": "string"}, ['"a"'], [r'"\""', '"<"', r'"\u003c"']),
    "a pattern anywhere": ({"pattern": "b|^c", "type": "string"}, ['"abc"', '"cd"'], ['"ac"', '""']),
    "digits": ({"pattern": r"^\d\D$", "type": "string"}, ['"1a"', '"1é"'], ['"٣a"', '"1٣"', '"11"']),
    "case": ({"pattern": "(?i)^[a-c]k$", "type": "string"}, ['"Bk"', '"bK"'], ['"dk"']),
    "a name that is written with escapes": (
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        ['{"a":1}', '{"b":"x"}', '{"a\\"":"x"}'],
        [r'{"\u0061":"x"}', '{"a":"x"}', r'{"\u0062":1}'],
    ),
    "names with characters that are escaped": (
        {"type": "object", "properties": {'é\t"': {"type": "null"}}},
        [r'{"é\t\"":null}', '{"e":1}'],
        [r'{"é\t\"":1}', r'{"\u00e9\t\"":1}', r'{"é\u0009\"":1}', r'{"é\t\u0022":1}'],
    ),
    "large limits": (
        {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**64},
        [str(2**53 + 1), str(2**64)],
        [str(2**53), str(2**64 + 1), "9007199254740992.0"],
    ),
    "dates": (
        {"type": "string", "format": "date"},
        ['"2024-02-29"', '"2000-02-29"', '"2023-12-31"'],
        ['"2023-02-29"', '"1900-02-29"', '"2023-04-31"', '"2023-1-1"', '"2023-13-01"', '"0000-01-01"'],
    ),
    "the number of named properties": (
        {
            "type": "object",
            "properties": {"a": {}, "b": {}, "c": {}},
            "additionalProperties": False,
            "minProperties": 2,
        },
        ['{"a":1,"c":2}', '{"a":1,"b":2,"c":3}'],
        ['{"a":1}', '{"a":1,"a":2}', "{}"],
    ),
    "one property of any name": ({"type": "object", "minProperties": 1}, ['{"x":1}'], ["{}"]),
    "fixed numbers": (
        {"enum": [1000.0, 1e-07, 1.5, 3]},
        ["1000.0", "1000", "1e-07", "1e-7", "1.5", "3", "3.0"],
        ["1000.1", "1e-08", "15"],
    ),
    "numbers": ({"type": "number"}, ["1000.0", "1e-07", "-0.0", "1.5", "1e+22", "5e-324"], ["01", ".5", "1.", "NaN"]),
    "numbers with limits": (
        {"type": "number", "minimum": 0, "exclusiveMaximum": 10},
        ["-0.0", "0", "1e-07", "9.99", "1.0"],
        ["10", "10.0", "1e1", "-1e-07"],
    ),
    "integers": ({"type": "integer"}, ["1", "1.0", "-3", "1e+22", "0"], ["1.5", "1e-07", "1.01"]),
    "multiples": ({"type": "number", "multipleOf": 0.25}, ["0.5", "1", "-0.75", "2.0"], ["0.3", "0.55"]),
    "control characters": (
        {"type": "string"},
        [r'"\u0001"', '"\x7f"', r'"\n"'],
        ['"\n"', r'"\u000a"', r'"\/"', r'"\u00e9"'],
    ),
    "escapes of the training data": (
        {"type": "object", "properties": {"é": {"pattern": "^[^a]+$", "type": "string"}}, "x-escapes": "/u"},
        [r'{"\u00e9":"\/"}', r'{"é":"\ud83d\ude00"}', '{"é":"/é"}'],
        [r'{"\u00e9":"a"}', r'{"é":"\u0061"}', r'{"\u00e9":1}', r'{"é":"\u00E9"}'],
    ),
    "exclusive alternatives": (
        {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 4}, {"type": "string"}]},
        ["3", "4", '"x"'],
        ["null", "1.5"],
    ),
    "names that match a pattern": (
        {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
        ['{"x_a":1,"b":null}'],
        ['{"x_a":null}', '{"b":1}', r'{"\u0078_a":null}'],
    ),
    "all of several": (
        {"allOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string", "maxLength": 3},
        ['"ab"', '"bxa"'],
        ['"a"', '"abxx"', "1"],
    ),
}


@pytest.mark.parametrize("name", ALLOWED_AND_REFUSED)
def test_a_schema_allows_valid_replies_only(name: str) -> None:
    schema, allowed, refused = ALLOWED_AND_REFUSED[name]
    start = compile_schema(schema)
    for reply in allowed:
        assert is_valid(schema, json.loads(reply)), reply
        assert allows(start, reply), reply
        start.check_reply([*reply.encode()])
    for reply in refused:
        assert not allows(start, reply), reply


REFUSALS = [
    ({"multipleOf": 10_001}, "multipleOf: 10,001; at most 10,000 can be enforced"),
    ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
    ({"type": "object", "minProperties": 2}, "minProperties: 2: can't be enforced where any name is allowed"),
    (
        {"patternProperties": {f"^{n}": {} for n in range(5)}},
        "patternProperties: 5 patterns; at most 4 can be enforced",
    ),
    ({"format": "iri"}, "format: 'iri' can't be enforced; use a pattern, or one of date, "),
    ({"pattern": "(?=a)b"}, "pattern: '(?=a)b': lookahead and lookbehind can't be enforced; write it without them"),
    ({"pattern": r"(a)\1"}, r"back-references can't be enforced"),
    ({"pattern": r"\p{L}"}, r"pattern: '\\p{L}': bad escape \p at position 0"),
    ({"pattern": "a^b"}, r"^, $ and \b can only be enforced at its beginning and end"),
    ({"$ref": "https://example.com/s"}, "$ref: 'https://example.com/s': isn't in the schema; copy the definition"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf: can't be enforced unless its schemas exclude"),
    ({"x-escapes": "x"}, 'x-escapes: \'x\': expected "/", "u" or both'),
    ({"type": "strin"}, "type: 'strin' is not valid under any of the given schemas"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength (3) is greater than maxLength (2)"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems (3) is greater than maxItems"),
    ({"required": ["a"], "properties": {"a": False}, "type": "object"}, "the required property 'a' is impossible"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSALS)
def test_what_cannot_be_enforced_is_refused_by_name(schema: Any, message: str) -> None:
    with pytest.raises(SettingsError, match="^json_schema: .*" + re.escape(message)) as refused:
        compile_schema(schema)
    assert "\n" not in str(refused.value)


def test_limits_of_numbers_are_exact() -> None:
    chooser = random.Random(3)
    spelled = ["0", "-0.0", "0.5", "1.0", "12", "12.50", "1e-07", "1.5e+16", "99.99", "-3", "-2.5e-05", "100", "1e+22"]
    keywords = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]
    limits = [0, 0.5, 1, 12, 12.5, 100, -3, 1e-07, 99.99]
    num_allowed = 0
    for _ in range(60):
        schema: dict[str, Any] = {"type": chooser.choice(["integer", "number"])}
        for keyword in chooser.sample(keywords, chooser.randint(1, 2)):
            schema[keyword] = chooser.choice([1, 2, 0.5, 5] if keyword == "multipleOf" else limits)
        try:
            start = compile_schema(schema)
        except SettingsError:
            assert not any(is_valid(schema, json.loads(text)) for text in spelled) or "multipleOf" in schema
            continue
        for text in spelled:
            if allows(start, text):
                num_allowed += 1
                assert is_valid(schema, json.loads(text)), (schema, text)
            elif "multipleOf" not in schema and text == json.dumps(json.loads(text)):
                assert not is_valid(schema, json.loads(text)), (schema, text)
    assert num_allowed > 100


PIECES = ["a", "[ab]", "[^a]", r"\d", r"\W", "(a|bc)", "b?", "a*", '[^"]', r"\\", r"\s", ".", "(?:x|y)+", "é", "/"]
TEXTS = ["", "a", "b", '"', "\\", "ab", "abc", "é", "1a", "x y", "\n", "/", "bca\\", 'a"b', "xyxy", "aab"]


def test_random_patterns_allow_what_re_search_finds() -> None:
    chooser, num_allowed = random.Random(11), 0
    for beginning, end in product(["", "^"], ["", "$"]):
        for _ in range(15):
            pattern = beginning + "".join(chooser.choices(PIECES, k=chooser.randint(1, 4))) + end
            start = compile_schema({"type": "string", "pattern": pattern})
            for text in TEXTS:
                is_found = re.search(pattern, text) is not None and not (end and text.endswith("\n"))
                if not text.endswith("\n"):
                    assert allows(start, json.dumps(text, ensure_ascii=False)) == is_found, (pattern, text)
                num_allowed += is_found
    assert num_allowed > 100
