"""The small models the quickstart uses. `python -m reflux.assets.make` makes them."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """Where a shipped model lies: "student", "teacher", "mul_teacher", "novice" and "reader" in Hugging Face
    format, "glyph_base", "glyph_digits" and "glyph_counts" in diffusers' format."""
    return Path(__file__).parent / name
