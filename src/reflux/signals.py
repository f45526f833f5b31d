"""Ctrl-C and SIGTERM ask a run to finish its step and save; a second one ends it at once."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reflux.rundir import Run

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """Handlers for the length of the run. Outside the main thread there are no signals to handle."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def asked() -> None:
        run.stopping = True
        run.watch.noted("Stopping after this step; once more to end at once (the last checkpoint stays).")
        restore()

    def restore() -> None:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    for number in _SIGNALS:
        loop.add_signal_handler(number, asked)
    try:
        yield
    finally:
        restore()
