"""What a teacher is told besides the question: the words around other attempts, an answer, feedback.

Only printable ASCII and short headings, so that the smallest tokenizers can say them. The texts themselves
are data: they are put in between the headings as they are and are never interpreted: what they spell of
control tokens is broken where messages become tokens (`reflux.models.tokenizer.Renderer`).
"""

from __future__ import annotations

from collections.abc import Sequence

SUCCESS = "A correct solution:"
ANOTHER = "Another correct solution:"
FAILURE = "A failed solution; do not repeat its mistake:"
FEEDBACK = "What the verifier says of your own attempt:"
ANSWER = "The correct answer:"
CLOSING = "Now solve the original question correctly."


def with_attempts(
    problem: str, successes: Sequence[str], failures: Sequence[str], feedback: str | None = None
) -> str:
    """The problem, other attempts at it under their headings, feedback on one's own, and the closing line,
    which is always last.
    """
    headings = [SUCCESS, *[ANOTHER] * (len(successes) - 1)]
    blocks = [f"{heading}\n{text}" for heading, text in zip(headings, successes, strict=False)]
    blocks += [f"{FAILURE}\n{text}" for text in failures]
    if feedback:
        blocks.append(f"{FEEDBACK}\n{feedback}")
    return "\n\n".join([problem, *blocks, CLOSING])


def with_answer(problem: str, heading: str, text: str) -> str:
    """The problem, what only the teacher may know under its heading, and the closing line."""
    return f"{problem}\n\n{heading}\n{text}\n\n{CLOSING}"
