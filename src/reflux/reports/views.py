"""One attempt as the page shows it."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from reflux.reports.attempts import ShownAttempt
from reflux.reports.examples import CHARACTERS, words
from reflux.reports.formatting import shortened
from reflux.reports.reading import Row, items, number
from reflux.reports.tokens import Token, shown_tokens

ERROR_CHARACTERS = 120


@dataclass(frozen=True)
class AttemptView:
    """One attempt as the template shows it. If there are no tokens, `text` is shown."""

    title: str
    facts: list[str]
    question: str
    text: str
    left_out: int
    head: list[Token]
    tail: list[Token]
    between: int
    missing: str


def policy(acted: Row) -> str:
    """The policy version of an attempt, or the first and last one if the weights changed within it."""
    version, versions = acted.get("version"), [number(each) for each in items(acted.get("versions"))]
    known = [each for each in versions if each is not None]
    if known:
        return f"policy versions {min(known):g} to {max(known):g}"
    return "" if version is None else f"policy version {words(version)}"


def view(shown: ShownAttempt, tokenizer: Tokenizer | None) -> AttemptView:
    """The attempt with its tokens if there is a tokenizer, else with its text."""
    acted = shown.acted
    ids = items(acted.get("tokens"))
    tokens = shown_tokens(shown, tokenizer) if tokenizer is not None and ids else ([], [], 0)
    text, left_out = shortened(words(acted.get("text")), CHARACTERS)
    finish = acted.get("finish")
    facts = [
        f"{len(ids):,} tokens" if ids else "",
        "" if shown.reward is None else f"reward {shown.reward:.3g}",
        unjudged(acted),
        f"finish: {words(finish)}" if finish else "",
        policy(acted),
    ]
    return AttemptView(
        title=title_of(acted),
        facts=[fact for fact in facts if fact],
        question=words(acted.get("question")),
        text=text,
        left_out=left_out,
        head=tokens[0],
        tail=tokens[1],
        between=tokens[2],
        missing=absent_because(shown, "tokens") if tokens[0] else "",
    )


def title_of(acted: Row) -> str:
    """The title of an attempt, from its first line in attempts.jsonl."""
    step, prompt, sample = (words(acted.get(name)) for name in ("step", "prompt", "sample"))
    return f"Step {step} · {prompt} · attempt {sample}"


def unjudged(acted: Row) -> str:
    """The reason why grading failed, shortened. Empty if it did not fail, or if attempts are not graded."""
    error = words(acted.get("error"))
    return f"not graded: {shortened(error, ERROR_CHARACTERS)[0]}" if error else ""


def absent_because(shown: ShownAttempt, units: str) -> str:
    """The reason why an attempt has no log-ratios, in a sentence. Empty if it has log-ratios."""
    if not shown.learned:
        return "The student was not trained on this attempt yet, so the teacher's log-probs are not on disk."
    so = f"so its {units} have no ratio."
    if not items(shown.teacher_logp):
        return f"No teacher was asked about this attempt, or its weight was zero, {so}"
    if not any(number(value) is not None for value in items(shown.teacher_logp)):
        return f"The teacher's log-probs of this attempt are not finite, {so}"
    return ""
