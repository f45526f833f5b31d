"""diffusers, imported where it is needed. Untyped: it exports its names lazily, which type checkers cannot
follow.
"""

from __future__ import annotations

from typing import Any


def library() -> Any:
    import diffusers

    return diffusers
