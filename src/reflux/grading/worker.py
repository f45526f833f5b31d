"""The worker process of `grading`. It judges the jobs that it receives and does not import torch.

The worker is started as a plain interpreter and not by multiprocessing, which would run the user's script
again with all its imports. The parent process ends the worker. If the parent has ended, the worker ends
itself.
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

import numpy as np

from reflux.types import Prompt, Reward

# Limit of the address space while a text is judged, so that a text like "9^9^9^9" cannot exhaust the memory.
TEXT_MEMORY_BYTES = 4 << 30
WATCH_S = 0.5


def work(descriptor: int, parent: int, most_cpu_s: float) -> None:
    """Judge until the connection closes.

    A message is pickled. It is either a packed task (bytes) or a list of (prompt, made). The answer to a task
    is a reward in JSON whose error is the reason why the task cannot be loaded here, or null. The answer to a
    list is one reward for each entry, sent as soon as it is known. A reward is the list [value, parts,
    feedback, error].
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
                # This also ends a worker without parent whose watching thread gets no CPU time.
                signal.setitimer(signal.ITIMER_PROF, most_cpu_s)
                theirs.send_bytes(packed(judge(task, prompt, made)))
            signal.setitimer(signal.ITIMER_PROF, 0)


def judge(task: Any, prompt: Prompt, made: Any) -> Reward:
    """The task's verdict with its parts and feedback, or an error. It catches everything except a hang or a
    crash of the process.
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
        # BaseException, because exit() and some time limits do not raise an Exception.
        return Reward(None, error=f"the verifier raised {type(error).__name__}: {_sendable(error)}"[:500])
    if wrong is not None:
        return Reward(None, error=f"the verdict is {wrong}, which is not finite")
    if found.value is None:
        return Reward(
            None,
            parts,
            feedback,
            "the verifier gave no verdict" if found.error is None else _sendable(found.error),
        )
    return Reward(float(found.value), parts, feedback)


def packed(reward: Reward) -> bytes:
    """The reward as bytes for the pipe."""
    return json.dumps([reward.value, reward.parts, reward.feedback, reward.error]).encode()


def _sendable(words: object) -> str:
    """The text with half surrogate pairs replaced by question marks, so that it can be written to a file."""
    return str(words).encode("utf-8", "replace").decode()


def _unpack(message: bytes) -> tuple[Any, str | None]:
    try:
        return pickle.loads(message), None
    except Exception as error:
        # The import of the task's module can raise any exception.
        return None, f"{type(error).__name__}: {error}"


def _be_a_good_child(parent: int) -> None:
    # Only the parent handles Ctrl-C. It finishes its step first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _limit_memory(made: Any) -> None:
    """Limits the address space while a text or a conversation is judged, because a text can cause any amount
    of work.

    An image cannot. Its verifier may be a model on a GPU, whose driver reserves far more address space than
    there is memory. So an image is judged with the original limits of this process.
    """
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bounded = TEXT_MEMORY_BYTES if most == resource.RLIM_INFINITY else min(TEXT_MEMORY_BYTES, most)
    with suppress(ValueError, OSError):
        # Some systems refuse this limit.
        resource.setrlimit(resource.RLIMIT_AS, (most if isinstance(made, np.ndarray) else bounded, most))


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(0)
