r"""Regular expressions, in Rust's syntax, for the JSON spelling of texts.

    strings = JsonStrings(Escapes())
    strings.write_pattern("^[^,]+$")    # matches what JSON has between the quotes of "a \"b\"", but not of "a, b"

A text has one spelling in JSON: the shortest. Only quotes, backslashes and control characters are escaped, as Python's
`json.dumps(text, ensure_ascii=False)` does. So two spellings of a name can't get past a rule for this name.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from t5tune.constraints.json_formats import FORMATS

Ranges = tuple[tuple[int, int], ...]
"""A set of characters: sorted ranges of code points, the first and the last of each."""

LAST = 0x10FFFF
SURROGATES = ((0xD800, 0xDFFF),)
CONTROL_CHARACTERS = ((0, 0x1F),)
ASCII_DIGITS = ((0x30, 0x39),)
ASCII_WORD = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SHORT_ESCAPES = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
BEGINNINGS = ((ops.AT, ops.AT_BEGINNING), (ops.AT, ops.AT_BEGINNING_STRING))
ENDS = ((ops.AT, ops.AT_END), (ops.AT, ops.AT_END_STRING))
MAX_FOLDED = 2000  # characters of a range whose case is ignored


class CannotEnforceError(ValueError):
    """A part of a schema that replies can't be kept to. The message names it."""


@dataclass(frozen=True)
class Escapes:
    r"""The escapes that texts may have although they need none.

    Args:
        has_slash: `\/`, as PHP writes slashes.
        has_non_ascii: `\u00e9`, as Python's `json.dumps` writes characters outside ASCII.
    """

    has_slash: bool = False
    has_non_ascii: bool = False

    def __bool__(self) -> bool:
        return self.has_slash or self.has_non_ascii


def make_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Sort ranges, and join those that overlap or touch."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return tuple(joined)


def complement(ranges: Ranges) -> Ranges:
    """Return all other characters."""
    found, start = [], 0
    for first, last in ranges:
        if start < first:
            found.append((start, first - 1))
        start = last + 1
    if start <= LAST:
        found.append((start, LAST))
    return tuple(found)


def intersect(first: Ranges, second: Ranges) -> Ranges:
    return complement(make_ranges([*complement(first), *complement(second)]))


def contains(ranges: Ranges, code: int) -> bool:
    place = bisect_right(ranges, (code, LAST)) - 1
    return place >= 0 and ranges[place][1] >= code


ANY_CHARACTER = complement(SURROGATES)
NO_LINE_END = complement(((0x0A, 0x0A),))


@dataclass(frozen=True)
class JsonStrings:
    """Writes regular expressions for the JSON spelling of texts, without the quotes around it."""

    escapes: Escapes

    @property
    def any_character(self) -> str:
        """A regular expression for one character."""
        return self.write_character(ANY_CHARACTER)

    def write_text(self, text: str) -> str:
        """Write a regular expression for a single text."""
        return "".join(self.write_character(((ord(character), ord(character)),)) for character in text)

    def write_length(self, low: int, high: int | None) -> str:
        """Write a regular expression for texts of `low` to `high` characters. None: no limit."""
        return f"(?:{self.any_character}){{{low},{'' if high is None else high}}}"

    def write_format(self, name: str) -> str:
        """Write a regular expression for a `format`. Raises CannotEnforceError if it isn't known."""
        if (pattern := FORMATS.get(name)) is None:
            known = ", ".join(FORMATS)
            raise CannotEnforceError(f"format: {name!r} can't be enforced; use a pattern, or one of {known}")
        return self.write_pattern(f"^(?:{pattern})$")

    def write_pattern(self, pattern: str) -> str:
        """Write a regular expression for all texts that `re.search` finds a pattern in.

        `re` reads ECMA-262's patterns, too, with few differences. Where they differ, such as with `\\d`, in ASCII
        or in all of Unicode, only the texts that both allow match.

        Raises:
            CannotEnforceError: it isn't a regular expression of `re`, or has parts such as lookahead.
        """
        try:
            parsed = parser.parse(pattern)
            return _PatternWriter(self, parsed.state.flags, pattern).write_search(parsed)
        except (re.error, OverflowError) as error:
            raise CannotEnforceError(f"pattern: {pattern!r}: {error}") from None

    def write_character(self, characters: Ranges) -> str:
        """Write a regular expression for one character of a set."""
        characters = intersect(characters, ANY_CHARACTER)
        options = []
        plain = intersect(characters, complement(make_ranges([*CONTROL_CHARACTERS, (0x22, 0x22), (0x5C, 0x5C)])))
        if plain:
            options.append(_write_class(plain))
        short = [letter for code, letter in SHORT_ESCAPES.items() if contains(characters, code)]
        if short:
            options.append(rf"\\[{''.join(map(re.escape, short))}]")
        control = [code for code in range(0x20) if code not in SHORT_ESCAPES and contains(characters, code)]
        if control:
            options.append(rf"\\u00(?:{'|'.join(f'{code:02x}' for code in control)})")
        if self.escapes.has_slash and contains(characters, ord("/")):
            options.append(r"\\\x{2f}")
        if self.escapes.has_non_ascii:
            options += _write_non_ascii_escapes(characters)
        return options[0] if len(options) == 1 else f"(?:{'|'.join(options) or '[a&&b]'})"


def _write_class(ranges: Ranges) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _write_code(ranges[0][0])
    return f"[{''.join(f'{_write_code(first)}-{_write_code(last)}' for first, last in ranges)}]"


def _write_code(code: int) -> str:
    character = chr(code)
    return character if character.isascii() and character.isalnum() else f"\\x{{{code:x}}}"


def _write_non_ascii_escapes(characters: Ranges) -> list[str]:
    r"""Write `\u00e9` for characters from U+007F to U+FFFF.

    Pairs of surrogates are written only if all later characters are in the set.
    """
    options = []
    for first, last in intersect(characters, ((0x7F, 0xFFFF),)):
        digits = write_digits_between(f"{first:04x}", f"{last:04x}", "0123456789abcdef")
        options.append(rf"\\u(?:{digits})")
    if intersect(characters, ((0x10000, LAST),)) == ((0x10000, LAST),):
        options.append(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}")
    return options


def write_digits_between(low: str, high: str, alphabet: str = "0123456789") -> str:
    """Write a regular expression for numbers from `low` to `high`, all with the same number of digits."""
    if not low:
        return ""
    any_digit = f"[{alphabet}]"
    first, last = alphabet.index(low[0]), alphabet.index(high[0])
    if first == last:
        return low[0] + write_digits_between(low[1:], high[1:], alphabet)
    rest = len(low) - 1
    options = []
    if low[1:].strip(alphabet[0]):  # not all digits are the lowest
        options.append(low[0] + write_digits_between(low[1:], alphabet[-1] * rest, alphabet))
        first += 1
    ends_early = high[1:].strip(alphabet[-1]) != ""
    middle = alphabet[first : last if ends_early else last + 1]
    if middle:
        options.append(f"[{middle}]{any_digit}{{{rest}}}" if rest else f"[{middle}]")
    if ends_early:
        options.append(high[0] + write_digits_between(alphabet[0] * rest, high[1:], alphabet))
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})"


class _PatternWriter:
    """Writes a pattern that Python's `re` has parsed.

    Args:
        flags: of the whole pattern.
    """

    def __init__(self, strings: JsonStrings, flags: int, pattern: str) -> None:
        self._strings = strings
        self._anything = f"(?:{strings.any_character})*"
        self._flags = flags
        self._pattern = pattern

    def write_search(self, items: Any) -> str:
        """Write the texts that the items match anywhere, or where `^` and `$` say."""
        items = list(items)
        if items and items[0] in BEGINNINGS:
            while items and items[0] in BEGINNINGS:
                del items[0]
            return self._write_to_end(items)
        if len(items) == 1 and items[0][0] in (ops.SUBPATTERN, ops.BRANCH):
            return self._write_options(self.write_search, *items[0])
        return self._anything + self._write_to_end(items)

    def _write_to_end(self, items: list[Any]) -> str:
        """Write the items, and any text after them where they don't end with `$`."""
        if items and items[-1] in ENDS:
            while items and items[-1] in ENDS:
                del items[-1]
            return self._write_sequence(items)
        if items and items[-1][0] in (ops.SUBPATTERN, ops.BRANCH):  # `re` moves what options share before them
            return self._write_sequence(items[:-1]) + self._write_options(self._write_to_end, *items[-1])
        return self._write_sequence(items) + self._anything

    def _write_options(self, write: Callable[[list[Any]], str], name: Any, argument: Any) -> str:
        options = [self._open_group(argument)] if name is ops.SUBPATTERN else argument[1]
        return f"(?:{'|'.join(write(list(option)) for option in options)})"

    def _write_sequence(self, items: Iterable[Any]) -> str:
        return "".join(self._write_item(name, argument) for name, argument in items)

    def _write_item(self, name: Any, argument: Any) -> str:
        if name is ops.LITERAL:
            return self._write_set(self._fold(((argument, argument),)))
        if name is ops.NOT_LITERAL:
            return self._write_set(complement(self._fold(((argument, argument),))))
        if name is ops.ANY:
            return self._write_set(ANY_CHARACTER if self._flags & re.DOTALL else NO_LINE_END)
        if name is ops.IN:
            return self._write_set(self._read_set(argument))
        if name in (ops.BRANCH, ops.SUBPATTERN):
            return self._write_options(self._write_sequence, name, argument)
        if name in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            low, high, repeated = argument
            limit = "" if high is ops.MAXREPEAT else high
            return f"(?:{self._write_sequence(repeated)}){{{low},{limit}}}"
        raise self._refuse(name)

    def _open_group(self, argument: Any) -> Any:
        _, added, removed, items = argument
        if added or removed:
            raise CannotEnforceError(f"pattern: {self._pattern!r}: flags inside it can't be enforced")
        return items

    def _write_set(self, characters: Ranges) -> str:
        return self._strings.write_character(characters)

    def _read_set(self, items: Sequence[Any]) -> Ranges:
        is_negated = items[0][0] is ops.NEGATE
        found: list[tuple[int, int]] = []
        for name, argument in items[1:] if is_negated else items:
            if name is ops.LITERAL:
                found += self._fold(((argument, argument),))
            elif name is ops.RANGE:
                found += self._fold((argument,))
            elif name is ops.CATEGORY:
                found += _read_category(argument, is_widest=is_negated)
            else:
                raise self._refuse(name)
        ranges = make_ranges(found)
        return complement(ranges) if is_negated else ranges

    def _fold(self, ranges: Ranges) -> Ranges:
        """Add the uppercase and lowercase of each character if case is ignored."""
        if not self._flags & re.IGNORECASE:
            return ranges
        codes = [code for first, last in ranges for code in range(first, min(last, first + MAX_FOLDED) + 1)]
        if len(codes) > MAX_FOLDED:
            raise CannotEnforceError(f"pattern: {self._pattern!r}: a range is too long to ignore its case")
        variants = [text for code in codes for text in (chr(code), chr(code).lower(), chr(code).upper())]
        return make_ranges((ord(text), ord(text)) for text in variants if len(text) == 1)

    def _refuse(self, name: Any) -> CannotEnforceError:
        reasons = {
            ops.AT: "^, $ and \\b can only be enforced at its beginning and end",
            ops.ASSERT: "lookahead and lookbehind can't be enforced",
            ops.ASSERT_NOT: "lookahead and lookbehind can't be enforced",
            ops.GROUPREF: "back-references can't be enforced",
        }
        reason = reasons.get(name, f"{str(name).lower()} can't be enforced")
        return CannotEnforceError(f"pattern: {self._pattern!r}: {reason}; write it without them")


def _read_category(category: Any, is_widest: bool) -> Ranges:
    r"""Return the characters of a class such as `\d`: as ECMA-262 reads it and Python, or as one of them does (widest).

    A negated set has the widest classes in it, so that it excludes the characters of both.
    """
    unicode = _find_unicode_classes()
    narrow = {
        ops.CATEGORY_DIGIT: ASCII_DIGITS,
        ops.CATEGORY_WORD: ASCII_WORD,
        ops.CATEGORY_SPACE: unicode["narrow_space"],
    }
    wide = {
        ops.CATEGORY_DIGIT: unicode["digit"],
        ops.CATEGORY_WORD: unicode["word"],
        ops.CATEGORY_SPACE: unicode["space"],
    }
    opposites = {
        ops.CATEGORY_NOT_DIGIT: ops.CATEGORY_DIGIT,
        ops.CATEGORY_NOT_WORD: ops.CATEGORY_WORD,
        ops.CATEGORY_NOT_SPACE: ops.CATEGORY_SPACE,
    }
    if category in opposites:
        excluded = narrow if is_widest else wide
        return complement(excluded[opposites[category]])
    return wide[category] if is_widest else narrow[category]


@cache
def _find_unicode_classes() -> dict[str, Ranges]:
    """Find the characters of Python's classes in Unicode; space has ECMA-262's U+FEFF too."""
    characters = [chr(code) for code in range(LAST + 1)]
    space = make_ranges((ord(each), ord(each)) for each in characters if each.isspace())
    return {
        "digit": make_ranges((ord(each), ord(each)) for each in characters if each.isdecimal()),
        "word": make_ranges([(0x5F, 0x5F), *((ord(each), ord(each)) for each in characters if each.isalnum())]),
        "space": make_ranges([*space, (0xFEFF, 0xFEFF)]),
        # without U+001C to U+001F and U+0085, which are spaces for Python only
        "narrow_space": intersect(space, complement(((0x1C, 0x1F), (0x85, 0x85)))),
    }
