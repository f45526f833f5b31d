"""Removes what belongs to the form of an answer and not to its content: markup, delimiters of formulas, and
spacing commands.
"""

from __future__ import annotations

import re

from reflux.grading.character_table import same_characters

TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|normal|tt)?|math(?:rm|bf|it|sf|tt)|mbox|emph|operatorname)\s*\{([^{}]*)\}"
)
DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degrees?\b")
# Spacing that joins ("1,\!000", "1{,}000"), and spacing that separates ("12\,345", "18~km").
JOINED = re.compile(r"\\!\s*|\{(?=,\})|(?<=\{,)\}")
SPACED = re.compile(
    r"\\[,;: ]|\\q?quad\b|\\(?:left|right)(?![a-z])|\\displaystyle\b|\\[()\[\]]|~|\*\*+"
    r"|(?<!\w)__|__(?!\w)|`|\s+"
)
# A full stop at the end belongs to the sentence, and three belong to the number ("0.333...").
END = re.compile(r"(?:[\s,;:*\"']|(?<!\.)\.)+$")
# Check marks and pictures around an answer, as in "18 \u2705". An answer that is nothing else stays.
_PICTURE = "\u2600-\u2775\u2794-\u27bf\u2b50\ufe0f\U0001f300-\U0001faff"
PICTURES = re.compile(rf"^[\s{_PICTURE}]+(?=[^\s{_PICTURE}])|(?<=[^\s{_PICTURE}])[\s{_PICTURE}]+$")
ESCAPED = re.compile(r"\\([%#&_])")
SIMPLE = re.compile(r"[A-Za-z0-9]+")
DOLLAR = "\ue000"


def bare(text: str) -> str:
    r"""The answer without markup: "**$12\,345 \text{ km}$**." becomes "12 345 km". A single "$" is kept as
    the sign of a currency.
    """
    if SIMPLE.fullmatch(text):
        return text
    text = JOINED.sub("", same_characters(text).replace("{,}", ","))
    text = SPACED.sub(" ", DEGREE.sub("°", text.replace("\\$", DOLLAR)))
    while "{" in text and (unwrapped := TEXT.sub(r" \1", text)) != text:
        text = unwrapped
    if text.count("$") % 2 == 0:
        text = text.replace("$", " ")
    text = ESCAPED.sub(r"\1", text).replace(DOLLAR, "$").strip(" *\"'")
    text = END.sub("", PICTURES.sub("", text))
    if text.count("}") > text.count("{"):
        text = text.strip(" }\"'")
    if text.startswith("{") and text.endswith("}") and "}" not in text[:-1]:
        text = text[1:-1]
    return " ".join(text.split())
