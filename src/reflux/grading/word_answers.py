r"""Compares answers that are words: names, yes or no, letters of choices, and "no solution"."""

from __future__ import annotations

import re

SAME = {
    **dict.fromkeys(("there is no solution", "there are no solutions", "no solutions"), "no solution"),
    **dict.fromkeys((r"\emptyset", r"\varnothing", "{}", r"\{\}", "empty set"), "no solution"),
    **dict.fromkeys(("dne", "it does not exist", "limit does not exist"), "does not exist"),
}
ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\S\S)")
VERDICTS = {"yes", "no", "true", "false"}
VERDICT = re.compile(r"(yes|no|true|false)\s*(?:[,.;:!\u2014-]|$)", re.IGNORECASE)
# A letter alone, or a letter and the text of its choice: "B", "(B)", "B) Paris", "option B, because ...".
_WRONG = r"\s+(?:not|never|too|wrong|incorrect|false|invalid)\b"
_AFTER = rf"[)\]}}.:,;]+|$|(?=[-\u2013\u2014]\s|\([A-Z\d]|is\b(?!{_WRONG}))"
LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\s*)?:?\s*)?"
    rf"(?:[(\[{{]*([A-J])\s*(?:{_AFTER})|[(\[]([a-j])[)\]]|([a-j])\)?$)"
)
# What follows is not the answer: "C, not A or B".
NOT = re.compile(r"(?:,\s*(?:and\s+)?|\band\s+)(?:not|rather\s+than)\b")
OTHER = re.compile(r"(?:\b(?:or|and|nor)\b|[,/&])\s*\(?[A-HJ]\)?\s*(?:[).,:;/&]|$|\b(?:or|and)\b)|\b[A-HJ]\)")
GOLD = re.compile(r"[(\[]?\s*([A-J])\s*[)\].:]*")
LETTERS = re.compile(r"\(?[A-J]\)?(?:\s*(?:,|;|&|,?\s*\band\b)\s*\(?[A-J]\)?)+")
CHOSEN = re.compile(
    r"\b(?i:option|choice|choose|select|pick|statement)\b(?:\s+(?:is|would\s+be))?\s*:?\s*[*(]*(?=[A-J]\b)"
)
LABEL = re.compile(r"^[ \t]*\(?[A-J][).]\s", re.MULTILINE)


def same_words(found: str, gold: str) -> bool:
    """True if two clean texts are the same words, whatever their case and articles."""
    ours, theirs = (_plain(text) for text in (found, gold))
    if ours == theirs:
        return found == gold or len(ours) > 1
    verdict = VERDICT.match(ours) if theirs in VERDICTS else None
    return verdict is not None and verdict[1] == theirs


def is_choice(gold: str) -> bool:
    """True if the clean stored answer is the letter of a choice, or several letters."""
    return bool(GOLD.fullmatch(gold) or LETTERS.fullmatch(gold))


def same_choice(found: str, gold: str) -> bool:
    """True if the clean answer `found` names exactly the choices that the letters of `gold` name."""
    if LETTERS.fullmatch(gold):
        return bool(LETTERS.fullmatch(found)) and _letters(found) == _letters(gold)
    return choice_of(found) == _letters(gold)[0]


def choice_of(text: str) -> str | None:
    """The letter of the choice that a clean text names. None if it names none, or more than one."""
    letter = LETTER.match(text)
    if letter is None or OTHER.search(NOT.split(text)[0], letter.end(letter.lastindex or 0)):
        return None
    return next(group for group in letter.groups() if group).upper()


def labelled(found: str, gold: str) -> bool:
    """True if `found` is the letter in front of the stored answer: "B" for "B) Paris"."""
    return bool(LABEL.match(gold) and GOLD.fullmatch(found)) and choice_of(found) == choice_of(gold)


def without_label(text: str) -> str:
    """The text of a choice without its letter: "B) Paris" becomes "Paris"."""
    label = LABEL.match(text)
    return text[label.end() :] if label else text


def _letters(text: str) -> list[str]:
    return sorted(re.findall(r"\b[A-J]\b", text))


def _plain(text: str) -> str:
    words = ARTICLE.sub("", " ".join(text.casefold().split()))
    return SAME.get(words, words)
