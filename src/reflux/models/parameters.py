"""Counts the parameters of a net."""

from __future__ import annotations

from typing import Any


def parameter_count(net: Any) -> int:
    """Number of parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in {id(p): p for p in net.parameters()}.values())
