r"""Compares the final answer of a text with the stored answer.

Thinking is removed first (`thinking`). A text whose thinking was not closed has no answer. The final answer
of the rest is, in this order:

1. what the last <answer> tags enclose;
2. else the last `\boxed{...}`;
3. else the text after the last `####`, `Answer:`, `answer is` or heading "Answer", to the end of that line or
   sentence;
4. else, where the stored answer is a number, the last number of the text;
5. else the last line, or the last expression that math-verify finds near the end of the text.

An answer that was cut off is no answer.

Numbers are compared exactly, in all notations of `numerals` and with the units of `unit_names`. "50%" equals
"50" and "0.5". "1.000 €" equals 1 and 1000. An answer with several numbers ("12 or 13") is not a number, so
it is not counted as right because one of them is right. Words are compared without case and articles, and
choices by their letter: "B) Paris" is "B". Anything else is compared by math-verify: "2\sqrt{3}" equals
"\sqrt{12}", "[0, 1)" equals "0 <= x < 1", and sets have any order.
"""

from __future__ import annotations

import re

from reflux.grading.character_table import same_characters
from reflux.grading.clean import bare
from reflux.grading.clock import same_time
from reflux.grading.equivalence import ends_with_equivalent, equivalent
from reflux.grading.final import ITEM, final_answer, first_sentence
from reflux.grading.numbers import SIDES, Number, equal_numbers, last_number, read_number
from reflux.grading.thinking import without_thinking
from reflux.grading.word_answers import (
    CHOSEN,
    LABEL,
    is_choice,
    labelled,
    same_choice,
    same_words,
    without_label,
)

# Number of characters at the end of a text in which an expression is searched. The time of the extraction
# grows faster than the length of the text.
TAIL = 2000
# A longer final answer is compared as a text only, unless the stored answer is long too.
LONGEST_ANSWER = 500
VARIABLE = re.compile(r"\s*([A-Za-z])\s*=[^=]*")
# math-verify takes a decimal number with this many decimals for equal to the fraction it was rounded from.
ROUNDED = re.compile(r"\.\d{6}")


def grade(text: str, answer: str) -> float:
    """1.0 if the final answer of `text` equals `answer`, else 0.0. ValueError for an empty `answer`."""
    if not answer.strip():
        raise ValueError("the stored answer is empty; there is nothing to compare with")
    shown = without_thinking(text)
    found = final_answer(shown)
    return float(_unmarked(shown, answer) if found is None else _equal(found, answer))


def exact(text: str, answer: str) -> float:
    """1.0 if the text without thinking, or its final answer, is the stored answer, apart from white space."""
    shown = without_thinking(text)
    return float(answer.split() in (text.split(), shown.split(), (final_answer(shown) or "").split()))


def _equal(found: str, answer: str) -> bool:
    if len(found) > max(LONGEST_ANSWER, 2 * len(answer)):
        return False
    ours, gold = bare(found), bare(answer)
    if not ours or _different_variables(ours, gold):
        return False
    if same_words(ours, gold):
        return True
    if is_choice(gold):
        return same_choice(ours, gold)
    if same_words(without_label(ours), without_label(gold)) or labelled(ours, gold):
        return True
    time = same_time(ours, gold)
    if time is not None:
        return time
    number = read_number(gold)
    sides = SIDES.split(ours)
    numbers = [] if number is None else [side for text in sides if (side := read_number(text)) is not None]
    if number is not None and any(equal_numbers(side, number) for side in numbers):
        return True
    if numbers and not ROUNDED.search(f"{ours} {gold}"):
        return False
    return equivalent(SIDES.split(same_characters(found))[0], same_characters(answer))


def _unmarked(text: str, answer: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    ours, gold = bare(lines[-1][-LONGEST_ANSWER:]), bare(answer)
    if same_words(ours, gold):
        return bool(ours)
    if is_choice(gold):
        return same_choice(_chosen(text, ours), gold)
    number = read_number(gold)
    if number is not None:
        last = _last(lines)
        return last is not None and equal_numbers(last, number)
    return ends_with_equivalent(same_characters(text[-TAIL:]), same_characters(answer))


def _chosen(text: str, last: str) -> str:
    """What follows the last "I choose" or "the correct option is"; else the last line, unless choices are
    listed.
    """
    chosen = list(CHOSEN.finditer(text))
    if chosen:
        return bare(first_sentence(text[chosen[-1].end() :][:LONGEST_ANSWER]))
    return "" if len(LABEL.findall(text)) > 1 else last


def _last(lines: list[str]) -> Number | None:
    """The last number of the lines. None if it stands in one of several choices that are listed."""
    for place in range(len(lines) - 1, -1, -1):
        if re.search(r"\d", lines[place]):
            listed = LABEL.match(lines[place]) and place and LABEL.match(lines[place - 1])
            return None if listed else last_number(bare(ITEM.sub("", lines[place])[-LONGEST_ANSWER:]))
    return None


def _different_variables(found: str, gold: str) -> bool:
    ours, theirs = VARIABLE.fullmatch(found), VARIABLE.fullmatch(gold)
    return ours is not None and theirs is not None and ours[1] != theirs[1]
