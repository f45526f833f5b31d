"""Jumps along the student's path."""

ACCELERATORS: dict[str, str] = {}
