"""Ctrl-C and SIGTERM ask a run to finish its step and save; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from reflux.runtime.services import Listener

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stoppable(Protocol):
    """A run that can be asked to stop."""

    stopping: bool

    @property
    def watch(self) -> Listener: ...


@contextmanager
def stopping_on_signals(run: Stoppable) -> Iterator[None]:
    """Handlers for the length of the run. Outside the main thread there are no signals to handle.

    They run between two bytecodes of whatever the main thread does, not as callbacks of the event loop: at
    max_staleness = 0 a model call holds the loop as long as it takes. The second signal is the system's own:
    KeyboardInterrupt, where `asyncio.run` has a handler that would cancel the main task and so wait for the
    loop, too; and for SIGTERM the handler of before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def asked(number: int, frame: FrameType | None) -> None:
        run.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        run.watch.noted("Stopping after this step; once more to end at once (the last checkpoint stays).")

    for number in _SIGNALS:
        signal.signal(number, asked)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
