r"""Regular expressions, in Rust's syntax, for JSON's numbers in a range.

    Bounds.read([{"minimum": 3, "exclusiveMaximum": 10}]).write_integers()    # "(?:[3-9])(?:\\.0)?"

A number may be written as Python's `json.dumps` writes an int or a float: `1000`, `1000.0`, `1.5e-07`, `1e+22`. Bounds
are compared as Python compares them: a number without a fraction exactly, any other number as the nearest double.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from t5tune.constraints.json_strings import CannotEnforceError, write_digits_between

Number = int | float

ANY_INTEGER = r"-?(?:0|[1-9][0-9]*)"
ANY_NUMBER = rf"{ANY_INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?(?:[0-9]{{1,2}}|[12][0-9]{{2}}))?"  # always finite
FRACTION = r"\.[0-9]+"
SMALLEST_EXPONENTS = (-324, -5)  # of floats that Python writes with an exponent
LARGEST_EXPONENTS = (16, 308)
LAST_WITHOUT_EXPONENT = 10**16
MAX_ENDINGS = 1024  # digits at the end of the multiples of a number


@dataclass(frozen=True)
class Bounds:
    """The limits of a number.

    Args:
        low, high: limits of integers, included; None: no limit.
        low_float, high_float: limits of floats, included.
        problem: why no number is within the limits; None: some are.
        has_limits: whether the schema has any.
    """

    low: int | None
    high: int | None
    low_float: float
    high_float: float
    has_limits: bool
    problem: str | None

    @classmethod
    def read(cls, schemas: Sequence[Mapping[str, Any]]) -> "Bounds":
        """Read the bounds that schemas have together."""
        lows = [*_list_bounds(schemas, "minimum", "exclusiveMinimum")]
        highs = [*_list_bounds(schemas, "maximum", "exclusiveMaximum")]
        low = max((_find_lowest_integer(bound, is_open) for bound, is_open in lows), default=None)
        high = min((-_find_lowest_integer(-bound, is_open) for bound, is_open in highs), default=None)
        low_float = max((_find_lowest_float(bound, is_open) for bound, is_open in lows), default=-sys.float_info.max)
        high_float = min((-_find_lowest_float(-bound, is_open) for bound, is_open in highs), default=sys.float_info.max)
        problem = None
        if lows and highs and low_float > high_float and low is not None and high is not None and low > high:
            problem = f"minimum ({max(lows)[0]}) is greater than maximum ({min(highs)[0]})"
        return cls(low, high, low_float, high_float, bool(lows or highs), problem)

    @property
    def has_zero(self) -> bool:
        return self.low_float <= 0 <= self.high_float

    def write_integers(self) -> list[list[str]]:
        """Write the integers within the limits.

        Returns:
            Alternatives. Each is a list of regular expressions that must all match.
        """
        alternatives = [*self._write_exponents(LARGEST_EXPONENTS)]
        if not self.has_limits:
            return [[rf"{ANY_INTEGER}(?:\.0)?"], *alternatives]
        alternatives += self._write_whole()
        if self.low_float <= self.high_float:
            low = max(math.ceil(self.low_float), -LAST_WITHOUT_EXPONENT)
            high = min(math.floor(self.high_float), LAST_WITHOUT_EXPONENT)
            if low <= high:
                alternatives.append([rf"{_write_integers_between(low, high)}\.0"])
        return alternatives

    def write_numbers(self) -> list[list[str]]:
        """Write the numbers within the limits, as `write_integers` does."""
        alternatives = [*self._write_exponents(SMALLEST_EXPONENTS), *self._write_exponents(LARGEST_EXPONENTS)]
        if not self.has_limits:
            return [[ANY_NUMBER], *alternatives]
        alternatives += self._write_whole()
        for sign, low, high in self._split_by_sign():
            limits = [_write_decimals_from(low), _write_decimals_to(high)]
            alternatives.append([f"{sign}{limit}" for limit in limits])
        return alternatives

    def _write_whole(self) -> Iterator[list[str]]:
        """Write the integers without a point, and minus zero."""
        if self.low is None or self.high is None or self.low <= self.high:
            yield [_write_integers_between(self.low, self.high)]
        if self.has_zero:
            yield [r"-0(?:\.0)?"]

    def _split_by_sign(self) -> Iterator[tuple[str, Decimal, Decimal]]:
        """Return the sign, and the limits without it, of the negative and the positive floats."""
        low, high = self.low_float, self.high_float
        if low <= high and low <= 0:
            yield "-", _to_decimal(max(0.0, -high)), _to_decimal(-low)
        if low <= high and high >= 0:
            yield "", _to_decimal(max(0.0, low)), _to_decimal(high)

    def _write_exponents(self, exponents: tuple[int, int]) -> Iterator[list[str]]:
        """Write the floats that Python writes with one of these exponents of ten."""
        for sign, low, high in self._split_by_sign():
            options = [_write_exponents_from(low, *exponents), _write_exponents_to(high, *exponents)]
            if all(options):
                yield [f"{sign}(?:{option})" for option in options]


def write_multiples(factor: Number) -> str | None:
    """Write the multiples of a number that shows in the last digits; None: a number such as 3 doesn't.

    Raises:
        CannotEnforceError: jsonschema doesn't agree with decimals, because the number is no sum of powers of two.
    """
    if factor == int(factor):
        return _write_multiples_of_integer(int(factor))
    size = round(1 / factor)
    if size * factor != 1 or size & (size - 1) or size > MAX_ENDINGS:
        problem = f"multipleOf: {factor}: can't be enforced, because floats have no exact multiples of it"
        raise CannotEnforceError(f"{problem}; use a whole number, or a power of two such as 0.25")
    endings = [_split_decimal(_to_decimal(count * factor))[1] for count in range(size)]
    return rf"{ANY_INTEGER}(?:\.(?:{'|'.join(endings)})0*)?".replace("(?:|", "(?:0|")


def _write_multiples_of_integer(factor: int) -> str | None:
    digits = next((digits for digits in range(1, 5) if 10**digits % factor == 0), None)
    if digits is None or 10**digits // factor > MAX_ENDINGS:
        return None
    multiples = range(0, 10**digits, factor)
    short = "|".join(map(str, multiples))
    endings = "|".join(f"{multiple:0{digits}d}" for multiple in multiples)
    return rf"-?(?:{short}|[1-9][0-9]*(?:{endings}))(?:\.0)?"


def _list_bounds(schemas: Sequence[Mapping[str, Any]], closed: str, opened: str) -> Iterator[tuple[Number, bool]]:
    """List the bounds of schemas, and whether each is excluded itself."""
    for schema in schemas:
        is_draft_4 = isinstance(schema.get(opened), bool)
        if closed in schema:
            yield schema[closed], is_draft_4 and schema[opened]
        if opened in schema and not is_draft_4:
            yield schema[opened], True


def _find_lowest_integer(bound: Number, is_open: bool) -> int:
    return math.floor(bound) + 1 if is_open else math.ceil(bound)


def _find_lowest_float(bound: Number, is_open: bool) -> float:
    """Find the lowest float from a bound on. Python compares an int with a float exactly."""
    try:
        found = float(bound)
    except OverflowError:
        raise CannotEnforceError(f"{bound:.3g}: a bound that is no double can't be enforced") from None
    if found < bound or (is_open and found == bound):
        return math.nextafter(found, math.inf)
    return found


def _to_decimal(value: float) -> Decimal:
    """Return the decimal that Python writes for a float."""
    return Decimal(repr(abs(value)))


def _write_integers_between(low: int | None, high: int | None) -> str:
    """Write a regular expression for the integers from `low` to `high`."""
    options = []
    if low is None or low < 0:
        first = 1 if high is None else max(1, -high)
        options.append(f"-{_write_naturals(first, None if low is None else -low)}")
    if high is None or high >= 0:
        options.append(_write_naturals(0 if low is None else max(0, low), high))
    return f"(?:{'|'.join(options)})"


def _write_naturals(low: int, high: int | None) -> str:
    options = []
    last = len(str(low if high is None else high))
    for size in range(len(str(low)), last + 1):
        smallest = max(low, 10 ** (size - 1) if size > 1 else 0)
        largest = 10**size - 1 if high is None else min(high, 10**size - 1)
        options.append(write_digits_between(str(smallest), str(largest)))
    if high is None:
        options.append(f"[1-9][0-9]{{{last},}}")
    return f"(?:{'|'.join(options)})"


def _split_decimal(value: Decimal) -> tuple[int, str]:
    """Return the digits before and after the point, without zeros at the end."""
    before, _, after = format(value, "f").partition(".")
    return int(before), after.rstrip("0")


def _write_decimals_from(low: Decimal) -> str:
    """Write the numbers with a fraction that are at least `low`."""
    before, after = _split_decimal(low)
    options = [f"{_write_naturals(before + 1, None)}{FRACTION}"]
    fractions = ["[0-9]+"] if not after else [f"{after}[0-9]*"]
    for place, digit in enumerate(after):
        if digit != "9":
            fractions.append(f"{after[:place]}[{int(digit) + 1}-9][0-9]*")
    options.append(rf"{before}\.(?:{'|'.join(fractions)})")
    return f"(?:{'|'.join(options)})"


def _write_decimals_to(high: Decimal) -> str:
    """Write the numbers with a fraction that are at most `high`."""
    before, after = _split_decimal(high)
    options = []
    if before > 0:
        options.append(f"{_write_naturals(0, before - 1)}{FRACTION}")
    fractions = [f"{after}0*" if after else "0+"]
    for place, digit in enumerate(after):
        if place > 0:
            fractions.append(after[:place])
        if digit != "0":
            fractions.append(f"{after[:place]}[0-{int(digit) - 1}][0-9]*")
    options.append(rf"{before}\.(?:{'|'.join(fractions)})")
    return f"(?:{'|'.join(options)})"


def _write_exponents_from(low: Decimal, first: int, last: int) -> str:
    """Write the floats of at least `low` whose exponents are from `first` to `last`."""
    if not low:
        return _write_scientific("[1-9]", f"(?:{FRACTION})?", first, last)
    exponent = low.adjusted()
    options = [_write_scientific("[1-9]", f"(?:{FRACTION})?", max(first, exponent + 1), last)]
    if first <= exponent <= last:
        mantissa = low.scaleb(-exponent)
        whole = _write_integers_between(math.ceil(mantissa), 9) if mantissa <= 9 else ""
        options += [
            _write_scientific(part, "", exponent, exponent)
            for part in (whole, rf"(?:{_write_decimals_from(mantissa)})")
            if part
        ]
    return "|".join(filter(None, options))


def _write_exponents_to(high: Decimal, first: int, last: int) -> str:
    """Write the floats of at most `high` whose exponents are from `first` to `last`."""
    if not high:
        return ""
    exponent = high.adjusted()
    options = [_write_scientific("[1-9]", f"(?:{FRACTION})?", first, min(last, exponent - 1))]
    if first <= exponent <= last:
        mantissa = high.scaleb(-exponent)
        whole = _write_integers_between(1, math.floor(mantissa))
        options += [
            _write_scientific(part, "", exponent, exponent) for part in (whole, f"(?:{_write_decimals_to(mantissa)})")
        ]
    return "|".join(filter(None, options))


def _write_scientific(whole: str, fraction: str, first: int, last: int) -> str:
    """Write the floats with these digits and an exponent from `first` to `last`, of at least two digits."""
    if first > last:
        return ""
    sign = "-" if first < 0 else r"\+"
    low, high = sorted((abs(first), abs(last)))
    exponents = []
    if low < 10:
        exponents.append(f"0{write_digits_between(str(low), str(min(high, 9)))}")
    if high >= 10:
        exponents.append(_write_naturals(max(low, 10), high))
    return f"{whole}{fraction}e{sign}(?:{'|'.join(exponents)})"
