"""Removes thinking from a text, so that only what the student says after it can be its answer."""

from __future__ import annotations

import re

NAMES = "think|thinking|thoughts?|reasoning|reflection|scratchpad|seed:think"
# A group has a value for a tag that ends thinking. "<|channel|>" is a tag of the Harmony format, and
# "<|channel>" of Gemma.
TAG = re.compile(
    rf"[<\[\u25c1](?:(?:{NAMES})\s*>|(/(?:{NAMES})\s*>)|THINK\]|(/THINK\])|think\u25b7|(/think\u25b7)"
    r"|\|begin_of_thought\|>|(\|end_of_thought\|>)"
    r"|\|channel>thought\b|(channel\|>)"
    r"|\|channel\|>(?:analysis|commentary)|(\|channel\|>final\s*(?:<\|message\|>)?))",
    re.IGNORECASE,
)
# The same format after its special tokens were removed.
HARMONY = re.compile(r"analysis(?=[A-Z])")
SPECIAL = re.compile(r"<\|[a-z_]{1,30}\|>|</?s>", re.IGNORECASE)


def after_thinking(text: str) -> str:
    """The text after the last tag that ends thinking. The whole text if nothing but space follows it, or if
    there is no such tag.
    """
    ends = [tag.end() for tag in TAG.finditer(text) if tag.lastindex is not None]
    shown = text[ends[-1] :].strip() if ends else ""
    return shown or text


def without_thinking(text: str) -> str:
    """The text outside of thinking. Empty if thinking was opened and not closed.

    A closing tag without an opening one marks all text before it as thinking, because the prompt may have
    opened the thinking. Tags do not nest: the first closing tag ends the thinking.
    """
    if HARMONY.match(text):
        text = "<think>" + text.replace("assistantfinal", "</think>")
    shown: list[str] = []
    start, thinks = 0, False
    for tag in TAG.finditer(text):
        if tag.lastindex is None:
            if not thinks:
                shown.append(text[start : tag.start()])
            thinks = True
            continue
        if not thinks:
            shown.clear()
        start, thinks = tag.end(), False
    return "" if thinks else SPECIAL.sub(" ", "".join([*shown, text[start:]]))
