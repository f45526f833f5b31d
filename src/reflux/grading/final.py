r"""Finds the final answer that a text marks: answer tags, \boxed{}, or words such as "The answer is"."""

from __future__ import annotations

import re

TAG = re.compile(r"<(?:(?:final_?)?answer>|(/(?:final_?)?answer>))", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BARE = re.compile(r"[^\s$.,;{}\\]*")
# Between boxes that together are one answer: "\boxed{2} and \boxed{3}".
JOIN = re.compile(r"[\s$\\%]*(?:,|;|,?\s*(?:\\text\{)?\s*\b(?:and|or)\b\s*\}?)[\s$]*(?:[A-Za-z]\s*=\s*)?")
VERB = r"(?:is|are|would\s+be|should\s+be|must\s+be|will\s+be|equals)\b"
MARK = re.compile(
    r"(?<!\#)####(?!\#)(?!\s*(?:the\s+)?(?:final\s+)?answer)"
    r"|^[ \t#*_>]*(?:the\s+)?(?:final\s+)?answer[ \t#*_.]*$"
    rf"""|\banswers?\b(?:\s+to\b[^.\n:]{{0,100}}?)?["'*_`\s]*?(?:[\s*_]{VERB}[\s*_]*:?|[:=])""",
    re.IGNORECASE | re.MULTILINE,
)
# After "the answer is", these words speak about an answer and do not give it.
ABOUT = re.compile(
    r"[\s*_]*(?:(?:in)?correct|right|wrong|(?:un)?clear|reasonable|consistent|verified|confirmed|valid)\b",
    re.IGNORECASE,
)
ITEMS = re.compile(r"\s*\n(?:[ \t]*(?:[-*\u2022]|\d+\.)[ \t]+[^\n]+(?:\n|\Z)){2,}")
ITEM = re.compile(r"^[ \t]*(?:[-*\u2022]|\d+\.)[ \t]+", re.MULTILINE)
MARKUP = re.compile(r"(?:[\s*_#:\"'`]|(?<=\n)[-\u2022][ \t])*")
FENCE = re.compile(r"^[ \t]*```[\w+-]*[ \t]*$", re.MULTILINE)
# The notes of the calculator in the solutions of GSM8K: "<<9*2=18>>".
NOTE = re.compile(r"<<[^<>\n]*>>")
DISPLAY = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", re.DOTALL)
CHOICE = re.compile(r"\(?[A-J][.)][ \t]+")
STOP = re.compile(r"\n|(?<!approx)(?:(?<!\.)\.|[!?])(?:\s|$)|,?\s+(?:because|since)\b", re.IGNORECASE)


def final_answer(text: str) -> str | None:
    r"""The marked final answer of the text: what is in the last <answer> tags, else the last \boxed{...},
    else the text after the last marker, to the end of that line or sentence. None without any of them.
    """
    inside = _tagged(text)
    if inside is not None:
        found = _untagged(inside)
        return inside.strip() if found is None else found
    return _untagged(text)


def _untagged(text: str) -> str | None:
    boxed = _boxed(text)
    return boxed if boxed is not None else _marked(text)


def _tagged(text: str) -> str | None:
    """What the last answer tags enclose. Empty if the last tag was not closed: the answer was cut off."""
    tags = list(TAG.finditer(text))
    if not tags:
        return None
    if tags[-1].lastindex is None:
        return ""
    opened = len(tags) > 1 and tags[-2].lastindex is None
    return text[tags[-2].end() if opened else 0 : tags[-1].start()]


def _boxed(text: str) -> str | None:
    """The content of the last box that is not empty, together with boxes that are joined with it."""
    found: list[str] = []
    before = len(text)
    for box in reversed(list(BOX.finditer(text))):
        content, end = _content(text, box.end())
        if found and not JOIN.fullmatch(text, end, before):
            break
        if content is None:
            # The text was cut before the closing brace: an answer is marked, but it is empty.
            return ""
        if content:
            percent = "%" if re.match(r"\s*\\?%", text[end : end + 8]) else ""
            found.insert(0, content + percent)
            before = box.start()
        elif found:
            break
    if found:
        return ", ".join(dict.fromkeys(found))
    return "" if BOX.search(text) else None


def _content(text: str, start: int) -> tuple[str | None, int]:
    """What stands in the braces at `start`, and the place after them. None if they are not closed."""
    if not text.startswith("{", start):
        bare = BARE.match(text, start)
        return ("", start) if bare is None else (bare[0], bare.end())
    depth = 0
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start + 1 : place].strip(), place + 1
    return None, len(text)


def _marked(text: str) -> str | None:
    if "####" not in text and "answer" not in text.lower():
        return None
    text = NOTE.sub("", FENCE.sub("", text))
    marks = [mark for mark in MARK.finditer(text) if not ABOUT.match(text, mark.end()) or mark[0][-1] in ":="]
    if not marks:
        return None
    rest = text[marks[-1].end() :]
    items = ITEMS.match(rest)
    if items:
        return ", ".join(ITEM.sub("", items[0]).split("\n")).strip(", ")
    markup = MARKUP.match(rest)
    rest = rest[markup.end() if markup else 0 :]
    display = DISPLAY.match(rest)
    if display:
        return next(part for part in display.groups() if part).strip()
    return first_sentence(rest)


def first_sentence(text: str) -> str:
    """The text to the end of its first line or sentence. The letter of a choice ends no sentence."""
    choice = CHOICE.match(text)
    stop = STOP.search(text, choice.end() if choice else 0)
    return (text[: stop.start()] if stop else text).strip()
