r"""Compares the final answer of a text with the stored answer.

The final answer is, in this order:

1. the last `\boxed{...}`;
2. else the text after the last `####`, `Answer:` or `answer is`, to the end of that line or sentence;
3. else, where the stored answer is a plain number, the last number of the text;
4. else the last expression that math-verify finds near the end of the text.

Plain numbers are compared exactly ("1,000.0" equals "1000"; "$18", "18%", "18 apples" and "x = 18" are 18). A
final answer with several numbers ("12 or 13") is not a plain number, so it is not counted as right because
one of them is right. A `\boxed{` that was cut off contains no answer. Anything else is compared by
math-verify: "1/2", "0.5" and "\frac{1}{2}" are equal. The time limits of math-verify are off, because they
need signals in the main thread of a process. Instead the worker process is killed.
"""

from __future__ import annotations

import re
from decimal import Decimal

# Number of characters at the end of a text in which an expression is searched. The time of the extraction
# grows faster than the length of the text.
TAIL = 2000
MARK = re.compile(r"####|\banswer\s*(?:is\b|:)\s*:?", re.IGNORECASE)
STOP = re.compile(r"\n|[.!?](?:\s|$)")
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?![\w])")
UNIT = re.compile(r"[A-Za-z\s$€£%.,:;°]*")
MACRO = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")


def grade(text: str, answer: str) -> float:
    """1.0 if the final answer of `text` equals `answer`, else 0.0. ValueError for an empty `answer`."""
    if not answer.strip():
        raise ValueError("the stored answer is empty; there is nothing to compare with")
    found = final_answer(text)
    gold = plain_number(answer)
    if found is not None:
        return float(_equal(found, answer))
    if gold is not None:
        numbers = NUMBER.findall(_clean(text))
        return float(bool(numbers) and _decimal(numbers[-1]) == gold)
    return float(_equivalent(text[-TAIL:], answer))


def final_answer(text: str) -> str | None:
    r"""The marked final answer of the text: the last \boxed{...}, else the text after the last marker. None
    without either.
    """
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    marks = list(MARK.finditer(text))
    if not marks:
        return None
    rest = text[marks[-1].end() :].lstrip()
    stop = STOP.search(rest)
    return (rest[: stop.start()] if stop else rest).strip()


def plain_number(text: str) -> Decimal | None:
    """The number after the last "=" of the text (or in the whole text), if nothing but units is beside it.
    None if the text is not such a plain number.
    """
    last = _clean(text).rpartition("=")[2]
    numbers = NUMBER.findall(last)
    if len(numbers) != 1 or not UNIT.fullmatch(NUMBER.sub("", last)):
        return None
    return _decimal(numbers[0])


def _equal(found: str, answer: str) -> bool:
    if _clean(found).split() == _clean(answer).split():
        return bool(found.strip())
    ours, gold = plain_number(found), plain_number(answer)
    if ours is not None and gold is not None and (ours == gold or "%" not in found + answer):
        return ours == gold
    return bool(found.strip()) and _equivalent(f"\\boxed{{{found}}}", answer)


def _equivalent(text: str, answer: str) -> bool:
    # Imported here because the import takes 0.6 s (sympy).
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return bool(gold) and verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None)  # pyright: ignore[reportArgumentType]


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place].strip()
    # The text was cut before the closing brace: an answer is marked, but it is empty.
    return ""


def _clean(text: str) -> str:
    text = MACRO.sub(r" \1", text.replace("\u2212", "-"))
    for noise in ("\\left", "\\right", "\\!", "\\,", "\\;", "\\ "):
        text = text.replace(noise, "")
    return re.sub(r"\\([$%])", r"\1", text).replace("$", " ").replace("**", " ").strip().rstrip(".")


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", "").rstrip(".") or "0")
