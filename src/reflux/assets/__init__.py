"""The small models the quickstart uses. `python -m reflux.assets.make` makes them."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """Where the shipped model of that name ("student", "teacher", "mul_teacher", "novice", "reader") lies, in Hugging Face format."""
    return Path(__file__).parent / name
