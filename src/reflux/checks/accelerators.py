"""Accelerators: what they compare weights by must be there."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config import RunConfig


def problems(cfg: RunConfig) -> Iterator[str]:
    yield from ()
