"""Graders of a user's own for the task `jsonl`, in a module that imports nothing heavy: the worker processes
import it.
"""

from reflux.types import Prompt


def moody(asked: Prompt, text: str) -> float:
    """By the letters of the answer; the prompt q3 cannot be judged."""
    if asked.id == "q3":
        raise ValueError("no verdict on this one")
    return float(sum(map(ord, text)) % 3 == 0)


def shortness(asked: Prompt, text: str) -> float:
    """Differs between attempts of an untrained model."""
    return 1 / (1 + len(text))


def content(asked: Prompt, text: str) -> float:
    """Every answer is right."""
    return 1.0
