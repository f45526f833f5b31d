r"""Reads an answer that is one number, and compares two of them.

"1,000.0", "1e3", "1 1/2", "$18", "18 km/h", "18%", "18 million", "x = 18" and "about 18" are numbers. "12 or
13", "4x", "2 \pi", "not 18" and "more than 18" are not. The notations are those of `numerals`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from reflux.grading.numerals import NUMERAL, VALUES, value_of
from reflux.grading.unit_names import CURRENCIES, NAMES, unit_of

MONEY = "".join(CURRENCIES)
SCALES = {
    **dict.fromkeys(("%", "percent"), Fraction(1, 100)),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}
SCALE = rf"(?:\s*(?P<scale>%|\b(?:{'|'.join(list(SCALES)[1:])})\b))?"
# A minus sign after a number subtracts.
SIGN = r"(?P<sign>(?<![\d)}%])(?<![\d)}%]\s)[-+]\s*|\b(?:minus|negative)\s+)?"
NUMBER = re.compile(
    rf"(?<![\w.^])(?<!\^\{{)(?<!\d[,']){SIGN}(?P<money>[{MONEY}]\s*)?(?P<inner>-\s*)?(?P<numeral>{NUMERAL})"
    rf"(?=[^\w]|$|(?:{NAMES}|st|nd|rd|th|[ap]m)(?![A-Za-z])){SCALE}",
    re.IGNORECASE,
)
# What may stand around the number. A dash only joins words.
BESIDE = re.compile(rf"(?:[^\W\d_]|[\s{MONEY}%.,:;°'\"()~/]|\\cdot|(?<=\w)-(?=[^\W\d]))*")
POWER = re.compile(r"(?<=[^\W\d_])\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d)")
# Directly before a number, these words make it another number, or one of several.
BEFORE = re.compile(
    r"(?:\b(?:not|not equal to|never|than|except|or|nor|and|plus|times|half|twice|half of|root of)|n't"
    r"|\b(?:sqrt|log|ln|sin|cos|tan)\s*\(?|[/(]\s*-?)\s*$",
    re.IGNORECASE,
)
AFTER = re.compile(
    r"\s*(?:[xyznei]\b|pi\b|squared|cubed|factorial|or\b(?!\s+so\b)|plus\b|minus\b|times\b|divided"
    r"|is\s+(?:not|wrong|incorrect)\b)",
    re.IGNORECASE,
)
DENIED = re.compile(r"(?:\b(?:not|never)\b(?: equal to)?|n't)\s*$", re.IGNORECASE)
OPERATORS = ("+", "-", "*", "/", "=")
ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.IGNORECASE)
# Between two numbers of which neither is the answer.
OFFERED = re.compile(r"[^.!?\n=]{0,20}\bor\s+[^.!?\n=\d]{0,20}|[\s,;]*\(?[A-J]\s*[).:]\s*", re.IGNORECASE)
BETWEEN = re.compile(r"\bbetween(?:\s+[^.!?\n\d]{0,10})?$", re.IGNORECASE)
SIDES = re.compile(r"\\approx|\\simeq|~=")
# What stands before "=" in an equation of variables, such as "3x - y + 13 = 0".
EQUATION = re.compile(
    r"(?<![A-Za-z\\])[abcknxyz](?![A-Za-z])\s*[-+*/^]|(?:[-+*/]\s*|\d)[abcknxyz](?![A-Za-z])", re.IGNORECASE
)
SEVERAL = re.compile(r"=[^=]*(?:[,;]|\b(?:and|or)\b)\s*[A-Za-z]\w?\s*=")


@dataclass(frozen=True)
class Number:
    """values: the possible values; several where the notation is ambiguous. factor: of the percent sign or
    scale word. unit: None if it is not known. digits: as written, without the base. base: None without one.
    """

    values: frozenset[Fraction]
    factor: Fraction
    unit: str | None
    digits: str
    base: int | None


def read_number(text: str) -> Number | None:
    """The one number of a clean text, after its last "=". None if the text is not one number."""
    left, _, last = text.rpartition("=")
    if SEVERAL.search(text) or EQUATION.search(left):
        return None
    found = NUMBER.search(last)
    if found is None:
        return None
    before, after = last[: found.start()], last[found.end() :]
    if NUMBER.search(after) or BEFORE.search(before) or AFTER.match(after):
        return None
    if not BESIDE.fullmatch(before) or not BESIDE.fullmatch(POWER.sub("", after)):
        return None
    return _number(found, after)


def last_number(text: str) -> Number | None:
    """The last number of a clean text. Ordinal numbers do not count ("on the 13th day"). None if there is
    none, or if it is one of several that are offered ("12 or 13", "between 12 and 13", "(A) 12 (B) 13").
    """
    numbers = [found for found in NUMBER.finditer(text) if not ORDINAL.match(text, found.end())]
    if not numbers:
        return None
    last = _number(numbers[-1], "")
    if DENIED.search(text[: numbers[-1].start()]):
        return None
    if last is not None and len(numbers) > 1 and _offered(text, numbers[-2], numbers[-1]):
        other = _number(numbers[-2], "")
        return last if other is not None and equal_numbers(last, other) else None
    return last


def _offered(text: str, first: re.Match[str], second: re.Match[str]) -> bool:
    before, gap, after = text[: first.start()], text[first.end() : second.start()], text[second.end() :]
    if before.rstrip().endswith(OPERATORS) or after.lstrip().startswith("="):
        # In "30 + 160 or 190" the first number is a part of a sum.
        return False
    return bool(OFFERED.fullmatch(gap) or (" and " in gap and BETWEEN.search(before)))


def equal_numbers(found: Number, gold: Number) -> bool:
    """True if both are the same number. A percent sign or scale word counts only where both have one, or
    where it makes them equal: 50% equals 50 and 0.5. Known units must agree where both have one.
    """
    if None not in (found.unit, gold.unit) and found.unit != gold.unit:
        return False
    if gold.base is not None and found.base is None:
        return found.digits == gold.digits
    if gold.base is not None and found.base != gold.base:
        return False
    if {value * found.factor for value in found.values} & {value * gold.factor for value in gold.values}:
        return True
    return 1 in (found.factor, gold.factor) and bool(found.values & gold.values)


def _number(found: re.Match[str], after: str) -> Number | None:
    notation = next(name for name in VALUES if found[name] is not None)
    value = value_of(notation, found["numeral"])
    if value is None:
        return None
    values = {value}
    if "\u20ac" in f"{found['money']}{after}" and re.fullmatch(r"\d{1,3}\.\d{3}", found["numeral"]):
        # Thousands are separated by a dot in most countries of the euro.
        values.add(value * 1000)
    signs = [found[name] for name in ("sign", "inner") if found[name] and not found[name].startswith("+")]
    if len(signs) == 1:
        values = {-value for value in values}
    unit = CURRENCIES[found["money"].strip()] if found["money"] else unit_of(after)
    digits, _, base = found["numeral"].lower().partition("_")
    scale = Fraction(1) if found["scale"] is None else SCALES[found["scale"].lower()]
    return Number(frozenset(values), scale, unit, digits, _base(digits, base))


def _base(digits: str, written: str) -> int | None:
    prefix = {"0x": 16, "0b": 2, "0o": 8}.get(digits[:2])
    return int(written.strip("{}")) if written else prefix
