"""The first Ctrl-C or SIGTERM asks a run to finish its step and save. The second one ends it at once."""

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
    """Handle Ctrl-C and SIGTERM for `run` until the block ends. Outside the main thread no handler is
    installed, because signals only reach the main thread.

    The handlers run between two bytecodes of the main thread, not as callbacks of the event loop, because at
    max_staleness = 0 a model call blocks the event loop. After the first signal the handlers are replaced. A
    second Ctrl-C then raises KeyboardInterrupt: the handler of `asyncio.run` would cancel the
    main task and so wait for the event loop, too. A second SIGTERM calls the handler that was
    installed before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def asked(number: int, frame: FrameType | None) -> None:
        run.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        run.watch.noted(
            "Stopping after this step. Press Ctrl-C again to end at once; the last checkpoint is kept."
        )

    for number in _SIGNALS:
        signal.signal(number, asked)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
