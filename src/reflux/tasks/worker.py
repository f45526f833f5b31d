"""The other side of `grading`: a process that judges what it is sent, and imports no torch.

It is started as a plain interpreter, not by multiprocessing, which would run the user's own script again (and import what it imports). It
is ended by its parent; if the parent is gone, it ends itself.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import resource
import signal
import threading
import time
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from reflux.types import Prompt, Reward

TEXT_MEMORY_BYTES = 4 << 30  # of address space, while a text is judged: "9^9^9^9" must cost an attempt, not the machine
WATCH_S = 0.5


def work(descriptor: int, parent: int, most_cpu_s: float) -> None:
    """Judge until the connection closes.

    In, pickled: a packed task (bytes), answered by one JSON list [null, why it cannot be loaded here or "", {}]; or a list of
    (prompt, made), answered by one list each, [value or null, what went wrong or "", parts], as soon as it is known.
    """
    _be_a_good_child(parent)
    task = None
    with Connection(descriptor) as theirs, suppress(EOFError, OSError):
        while True:
            message = pickle.loads(theirs.recv_bytes())
            if isinstance(message, bytes):
                task, problem = _unpack(message)
                theirs.send_bytes(json.dumps([None, problem, {}]).encode())
                continue
            for prompt, made in message:
                _limit_memory(made)
                signal.setitimer(signal.ITIMER_PROF, most_cpu_s)  # ends an orphan whose watching thread is starved, too
                theirs.send_bytes(json.dumps(judge(task, prompt, made)).encode())
            signal.setitimer(signal.ITIMER_PROF, 0)


def judge(task: Any, prompt: Prompt, made: Any) -> tuple[float | None, str, dict[str, float]]:
    """(value, "", parts) or (None, what went wrong, {}), whatever the verifier does short of hanging or crashing."""
    try:
        found = Reward.of(task.verify(prompt, made))
        value, parts = found.value, {str(name): float(part) for name, part in found.parts.items()}
    except BaseException as error:  # some time limits and exit() are no Exceptions
        return None, f"{type(error).__name__}: {error}"[:500], {}
    if value is None:
        return None, "the verifier gave no verdict", parts
    wrong = next((number for number in (value, *parts.values()) if not math.isfinite(number)), None)
    return (value, "", parts) if wrong is None else (None, f"the verdict is {wrong}, which is no number", {})


def _unpack(packed: bytes) -> tuple[Any, str]:
    try:
        return pickle.loads(packed), ""
    except Exception as error:  # whatever its module does on import
        return None, f"{type(error).__name__}: {error}"


def _be_a_good_child(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which finishes its step first
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _limit_memory(made: Any) -> None:
    """A text can ask a verifier for any amount of work. A picture cannot, and what judges it may be a model on a GPU, whose driver reserves
    far more addresses than the machine has memory: it has the limits that this process came with.
    """
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bounded = TEXT_MEMORY_BYTES if most == resource.RLIM_INFINITY else min(TEXT_MEMORY_BYTES, most)
    with suppress(ValueError, OSError):  # some systems refuse this limit
        resource.setrlimit(resource.RLIMIT_AS, (bounded if isinstance(made, str) else most, most))


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(0)
