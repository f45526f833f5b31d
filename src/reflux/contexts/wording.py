"""The fixed texts of teacher prompts: headings for other attempts, answers and feedback, and the closing
line.

They are printable ASCII and short, so that the smallest tokenizers can encode them. The texts under the
headings are data. They are inserted unchanged and never interpreted. Control tokens that are spelled in them
are broken up when messages become tokens (`reflux.models.chat.renderer.Renderer`).
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
    """A prompt of the problem, the texts of right and wrong attempts at it under their headings, the
    verifier's feedback, and the closing line, which is always last.

    feedback: on the attempt that the teacher scores with this prompt, which is not one of the shown attempts.
    """
    headings = [SUCCESS, *[ANOTHER] * (len(successes) - 1)]
    blocks = [f"{heading}\n{text}" for heading, text in zip(headings, successes, strict=False)]
    blocks += [f"{FAILURE}\n{text}" for text in failures]
    if feedback:
        blocks.append(f"{FEEDBACK}\n{feedback}")
    return "\n\n".join([problem, *blocks, CLOSING])


def with_answer(problem: str, heading: str, text: str) -> str:
    """The problem, then `heading` and below it `text`, which only the teacher sees, then the closing line."""
    return f"{problem}\n\n{heading}\n{text}\n\n{CLOSING}"
