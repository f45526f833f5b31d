r"""The notations of one number: how each is recognized, and its value.

A single comma between digits separates thousands where three digits follow ("1,234"), and is a decimal comma
otherwise ("3,14", "0,125").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
RATIO = rf"\\[dtc]?frac\s*(?:\{{\s*-?{DECIMAL}\s*\}}\s*\{{\s*{DECIMAL}\s*\}}|\s*\d\s*\d)"
EXPONENT = r"[-+]?\d{1,4}"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
# Longer numerals would take noticeable time.
LONGEST = 1000


def _ratio(text: str) -> Fraction:
    top, bottom = re.findall(rf"-?{DECIMAL}", text) if "{" in text else re.findall(r"\d", text)
    return Fraction(top) / Fraction(bottom)


def _mixed(text: str) -> Fraction:
    whole = re.match(r"\d+", text)
    assert whole is not None
    rest = text[whole.end() :].strip()
    return int(whole[0]) + (_ratio(rest) if rest.startswith("\\") else Fraction(rest))


def _slash(text: str) -> Fraction:
    top, bottom = text.split("/")
    return Fraction(top.strip()) / Fraction(bottom.strip())


def _recurring(text: str) -> Fraction:
    whole, _, digits = text.partition(".")
    digits = re.sub(r"\\l?dots|\.\.\.+", "", digits)
    marked = re.search(r"[\\(]", digits)
    if marked:
        fixed, period = digits[: marked.start()], "".join(re.findall(r"\d", digits[marked.start() :]))
    else:
        fixed = digits
        # the shortest group of digits that is written at least twice at the end
        lengths = range(1, len(fixed) // 2 + 1)
        period = next((fixed[-n:] for n in lengths if fixed[-n:] == fixed[-2 * n : -n]), "")
    value = Fraction(f"{whole or 0}.{fixed}0")
    if not period:
        return value
    return value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


def _power(text: str) -> Fraction:
    exponent = re.search(r"[-+]?\d+(?=\s*\}?$)", text)
    assert exponent is not None
    number = re.match(rf"(?!10\s*\^){DECIMAL}", text)
    return (Fraction(number[0]) if number else 1) * Fraction(10) ** int(exponent[0])


def _based(text: str) -> Fraction:
    digits, _, base = text.partition("_")
    return Fraction(int(digits, int(base.strip("{}")) if base else 0))


def _european(text: str) -> Fraction:
    return Fraction(text.replace(".", "").replace(",", "."))


def _grouped(text: str) -> Fraction:
    return Fraction(re.sub(r"[ ,'_]", "", text))


_TEN = rf"10\s*\^\s*(?:\{{\s*{EXPONENT}\s*\}}|{EXPONENT})"
_DOTS = r"(?<=\d)(?:\.\.\.+|\s?\\l?dots)"
NOTATIONS: tuple[tuple[str, str, Callable[[str], Fraction]], ...] = (
    ("prefixed", r"0x[0-9a-f]+|0b[01]+|0o[0-7]+", _based),
    ("based", r"[0-9A-F]+_(?:\{\d{1,2}\}|\d{1,2})", _based),
    ("mixed", rf"\d+\s*{RATIO}|\d+\s+\d+/\d+", _mixed),
    ("ratio", RATIO, _ratio),
    ("recurring", rf"\d*\.\d*(?:\\(?:overline|bar|dot)\s*\{{?\d+\}}?|\(\d+\)|{_DOTS})", _recurring),
    ("power", rf"{DECIMAL}(?:e{EXPONENT}|\s*(?:\\times|\\cdot|x|\*)\s*{_TEN})|{_TEN}", _power),
    ("slash", rf"{DECIMAL}\s?/\s?{DECIMAL}(?!\s?/)", _slash),
    ("grouped", r"[1-9]\d{0,2}(?P<separator>[ ,'_])\d{3}(?:(?P=separator)\d{3})*(?:\.\d+)?", _grouped),
    ("indian", r"[1-9]\d?(?:,\d\d)+,\d{3}", _grouped),
    ("european", r"\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+", _european),
    ("comma", r"0,\d+|\d+,(?:\d\d?|\d{4,})", _european),
    ("decimal", DECIMAL, Fraction),
)
NUMERAL = "|".join(rf"(?P<{name}>{pattern})" for name, pattern, _ in NOTATIONS)
VALUES = {name: value for name, _, value in NOTATIONS}


def value_of(notation: str, numeral: str) -> Fraction | None:
    """The value of a numeral in this notation. None if it has no value, such as 1/0, or is far too long."""
    if len(numeral) > LONGEST:
        return None
    try:
        return VALUES[notation](numeral)
    except (ValueError, ZeroDivisionError):
        return None
