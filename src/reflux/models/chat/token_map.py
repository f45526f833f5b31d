"""The tokens of a vocabulary, and whether two models have the same ones."""

from __future__ import annotations

from typing import Any

from reflux.errors import ModelError


def vocabulary_size(tokenizer: Any) -> int:
    """The number of real tokens: the largest id + 1. Output rows beyond it are padding and never a token."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_tokens(student: Any, teacher: Any, name: str) -> None:
    """Raise ModelError where the teacher's token map differs from the student's, with the first ids that
    differ.

    The maps are compared, and not only their sizes, because models of one family can differ in a few added
    tokens.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    if ours == theirs:
        return
    differing = [i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i)]
    shown = "; ".join(f"id {i}: student {ours.get(i)!r}, teacher {theirs.get(i)!r}" for i in differing[:3])
    raise ModelError(
        f"teachers.{name}: its token map differs from the student's in {len(differing)} ids ({shown}). "
        "Token-level distillation needs equal maps. "
        f"Choose a teacher of the student's family, or train on the teacher's written answers (recipe sft)."
    )
