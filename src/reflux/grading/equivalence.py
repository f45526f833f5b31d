"""Compares two expressions with math-verify.

Its time limits are off, because they need signals in the main thread of a process. The worker process that
grades is killed instead. Expressions whose value cannot be written down, such as 9^{9^9}, are not compared.
"""

from __future__ import annotations

import re
from typing import Any

from reflux.grading.unit_names import CANONICAL

# Powers of powers of numbers, exponents and factorials of many digits, and factorials of factorials.
HUGE = re.compile(
    r"(?:\^|\*\*)[\s{(]*-?\d+[\s})]*(?:\^|\*\*)|(?:\^|\*\*)[\s{(]*-?\d{5,}|\d{5,}[\s})]*!|![\s})]*!"
)
# Letters that are not mathematics. math-verify would read "Paris" as a product of five variables.
FUNCTIONS = {
    *(
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "lim",
        "max",
        "min",
        "gcd",
        "lcm",
        "mod",
    ),
    *("det", "inf", "and", "arcsin", "arccos", "arctan", "infinity", "matrix", "pmatrix", "bmatrix", "cases"),
}
COMMAND = re.compile(r"\\(?:text|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
WORD = re.compile(r"[A-Za-z]{3,}")
UNIT = re.compile(
    rf"(?<=[\d}})])\s+(?:{'|'.join(map(re.escape, CANONICAL))})\s*$|(?<=\\pi)\s+(?:cm|m|units?)\s*$"
)
# How a set and a tuple begin.
OPENING = ("\\{", "(")
# Two numbers are equal if their difference, relative to the larger, is at most this. math-verify alone
# rounds to 6 decimals, so it takes all numbers below 5e-7 for equal.
RELATIVE = 2e-6


def equivalent(found: str, gold: str) -> bool:
    """True if math-verify finds both expressions equal. Intervals equal the inequalities that describe them.
    Texts are not expressions: they are never equal here.
    """
    found, gold = UNIT.sub("", found), UNIT.sub("", gold)
    brackets = {bracket for text in (found, gold) for bracket in OPENING if text.lstrip().startswith(bracket)}
    if len(brackets) == 2:
        # math-verify takes a set for equal to the tuple of the same numbers.
        return False
    if any(HUGE.search(text) or _has_words(text) for text in (found, gold)):
        return False
    return _verified(_parsed(f"\\boxed{{{found}}}", True), gold)


def ends_with_equivalent(text: str, gold: str) -> bool:
    """True if the last expression that math-verify finds in the text equals `gold`."""
    if HUGE.search(text) or HUGE.search(gold) or _has_words(gold):
        return False
    return _verified(_parsed(text, False), gold)


def _verified(found: list[Any], gold: str) -> bool:
    # Imported here because the import takes 0.6 s (sympy).
    from math_verify import verify

    theirs = _parsed(f"\\boxed{{{gold}}}", True)
    if not found or not theirs or _restates(found[0], theirs[0]):
        return False
    equal = verify(
        theirs,
        found,
        allow_set_relation_comp=True,
        timeout_seconds=None,  # pyright: ignore[reportArgumentType]
    )
    return equal and _close(found[0], theirs[0])


def _parsed(text: str, boxed: bool) -> list[Any]:
    """What math-verify reads: the whole box as LaTeX and nothing inside it, or the last expression."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    latex = LatexExtractionConfig(boxed_match_priority=0)
    return parse(
        text,
        [latex] if boxed else [latex, ExprExtractionConfig()],
        fallback_mode="first_match" if boxed else "no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )


def _restates(found: Any, gold: Any) -> bool:
    """True if `found` has to be solved ("2x + 1 > 7") and the stored answer is a solution ("x > 3")."""
    from sympy import Basic, Set

    if not isinstance(found, Basic) or not isinstance(gold, Basic) or _solved(found):
        return False
    return isinstance(gold, Set) or (bool(_relations(gold)) and _solved(gold))


def _solved(value: Any) -> bool:
    """True if each relation in it has a variable on one side and a number on the other."""
    sides = [(relation.lhs, relation.rhs) for relation in _relations(value)]
    return all(any(a.is_symbol and not b.free_symbols for a, b in (pair, pair[::-1])) for pair in sides)


def _relations(value: Any) -> set[Any]:
    from sympy.core.relational import Relational

    return value.atoms(Relational)


def _close(found: Any, gold: Any) -> bool:
    """False only for two numbers that differ by more than RELATIVE."""
    from sympy import Expr

    if not all(isinstance(value, Expr) and value.is_number for value in (found, gold)):
        return True
    ours, theirs = found.evalf(), gold.evalf()
    return bool(ours == theirs or abs(ours - theirs) <= RELATIVE * max(abs(ours), abs(theirs)))


def _has_words(text: str) -> bool:
    return any(word.lower() not in FUNCTIONS for word in WORD.findall(COMMAND.sub(" ", text)))
