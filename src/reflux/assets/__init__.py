"""The small models of the quickstart. `python -m reflux.assets.make` trains them."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """The folder of a shipped model: "student", "teacher", "mul_teacher", "novice", "reader",
    "chain_student", "chain_teacher", "tool_student" and "tool_teacher" in Hugging Face format;
    "glyph_base", "glyph_digits" and "glyph_counts" in the format of diffusers.
    """
    return Path(__file__).parent / name
