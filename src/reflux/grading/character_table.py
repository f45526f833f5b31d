"""Writes characters that mean the same in one way, so that the graders need to know only that one."""

from __future__ import annotations

import re
import unicodedata

# Fullwidth forms are those of Chinese and Japanese keyboards.
WIDE = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
DIGITS = {
    code: str(unicodedata.decimal(chr(code)))
    for code in range(128, 0x10000)
    if unicodedata.decimal(chr(code), None) is not None
}
SIGNS = {
    **dict.fromkeys(map(ord, "\u2212\u2010\u2011\ufe63\uff0d"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008"), " "),
    **dict.fromkeys(map(ord, "\u2009\u200a\u202f\u205f\u3000"), " "),
    **dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u200e\u200f"), ""),
    **dict.fromkeys(map(ord, "\u2018\u2019"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d"), '"'),
    **dict.fromkeys(map(ord, "\u00b7\u22c5"), r"\cdot "),
    **str.maketrans(
        {"\u066b": ".", "\u066c": ",", "\u066a": "%", "\u2044": "/", "\u2026": "...", "\u3002": ". "}
    ),
    **str.maketrans({"\u00d7": r"\times ", "\u2248": r"\approx ", "\u221e": r"\infty ", "\u03c0": r"\pi "}),
    **str.maketrans({"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u222a": r"\cup "}),
    **str.maketrans({"\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u00b1": r"\pm ", "\u00b0": r"^\circ "}),
}
TABLE = {**WIDE, **DIGITS, **SIGNS}
RAISED = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
PARTS = re.compile("[\u00bc-\u00be\u2150-\u215e]")
ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|(\d+|\w))")
# An en dash is a minus sign where it stands before a number and nothing stands before it.
DASH = re.compile(r"(?<![\w)\]}])(?<![\w)\]}] )\u2013(?=[\d.$\\])")
PLAIN = re.compile(r"[\x00-\x7f]*")


def same_characters(text: str) -> str:
    """The text with ASCII digits, signs and spaces, and with LaTeX commands in place of mathematical
    characters: "−１２ m²" becomes "-12 m^{2}", and "½" becomes " 1/2".
    """
    if PLAIN.fullmatch(text):
        return text
    text = RAISED.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = PARTS.sub(lambda found: f" {unicodedata.normalize('NFKC', found[0])}", text)
    text = ROOT.sub(lambda found: f"\\sqrt{{{found[1] or found[2]}}}", text)
    return DASH.sub("-", text).translate(TABLE)
