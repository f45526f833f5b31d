"""Looks at processes of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def alive(pid: int) -> bool:
    """False also for a process that has ended and that nobody has waited for."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(done: Callable[[], bool], seconds: float = 100.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "this never happened"
        time.sleep(0.05)
