"""Imports diffusers when it is first needed. The result is untyped, because diffusers exports its names
lazily and type checkers cannot follow that.
"""

from __future__ import annotations

from typing import Any


def library() -> Any:
    import diffusers

    return diffusers
