"""The other side of `grading`: a process that judges what it is sent, and imports no torch.

It is started as a plain interpreter, not by multiprocessing, which would run the user's own script again (and
import what it imports). It is ended by its parent; if the parent is gone, it ends itself.
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

# of address space, while a text is judged: "9^9^9^9" must cost an attempt, not the machine
TEXT_MEMORY_BYTES = 4 << 30
WATCH_S = 0.5


def work(descriptor: int, parent: int, most_cpu_s: float) -> None:
    """Judge until the connection closes.

    In, pickled: a packed task (bytes), answered in JSON by a reward whose error says why it cannot be loaded
    here, or is null; or a list of (prompt, made), answered by one reward each, as soon as it is known. A
    reward is the list [value, parts, feedback, error].
    """
    _be_a_good_child(parent)
    task = None
    with Connection(descriptor) as theirs, suppress(EOFError, OSError):
        while True:
            message = pickle.loads(theirs.recv_bytes())
            if isinstance(message, bytes):
                task, error = _unpack(message)
                theirs.send_bytes(packed(Reward(None, error=error)))
                continue
            for prompt, made in message:
                _limit_memory(made)
                # ends an orphan whose watching thread is starved, too
                signal.setitimer(signal.ITIMER_PROF, most_cpu_s)
                theirs.send_bytes(packed(judge(task, prompt, made)))
            signal.setitimer(signal.ITIMER_PROF, 0)


def judge(task: Any, prompt: Prompt, made: Any) -> Reward:
    """The task's verdict with its parts and its feedback, or an error, whatever the verifier does short of
    hanging or crashing.
    """
    try:
        found = Reward.of(task.verify(prompt, made))
        parts = {str(name): float(part) for name, part in found.parts.items()}
        feedback = None if found.feedback is None else _sendable(found.feedback)
        wrong = next(
            (
                number
                for number in (found.value, *parts.values())
                if number is not None and not math.isfinite(number)
            ),
            None,
        )
    except BaseException as error:
        # some time limits and exit() are no Exceptions
        return Reward(None, error=f"the verifier raised {type(error).__name__}: {_sendable(error)}"[:500])
    if wrong is not None:
        return Reward(None, error=f"the verdict is {wrong}, which is no number")
    if found.value is None:
        return Reward(
            None,
            parts,
            feedback,
            "the verifier gave no verdict" if found.error is None else _sendable(found.error),
        )
    return Reward(float(found.value), parts, feedback)


def packed(reward: Reward) -> bytes:
    """As it crosses the pipe."""
    return json.dumps([reward.value, reward.parts, reward.feedback, reward.error]).encode()


def _sendable(words: object) -> str:
    """As text that a file can hold: half of a surrogate pair becomes a question mark."""
    return str(words).encode("utf-8", "replace").decode()


def _unpack(message: bytes) -> tuple[Any, str | None]:
    try:
        return pickle.loads(message), None
    except Exception as error:
        # whatever its module does on import
        return None, f"{type(error).__name__}: {error}"


def _be_a_good_child(parent: int) -> None:
    # Ctrl-C is for the parent, which finishes its step first
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _limit_memory(made: Any) -> None:
    """A text can ask a verifier for any amount of work. An image cannot, and what judges it may be a model on
    a GPU, whose driver reserves far more addresses than the machine has memory: it has the limits that this
    process came with.
    """
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bounded = TEXT_MEMORY_BYTES if most == resource.RLIM_INFINITY else min(TEXT_MEMORY_BYTES, most)
    with suppress(ValueError, OSError):
        # some systems refuse this limit
        resource.setrlimit(resource.RLIMIT_AS, (bounded if isinstance(made, str) else most, most))


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(0)
