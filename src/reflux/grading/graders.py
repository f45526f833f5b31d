"""Runs verifiers in worker processes that can be killed. A text or verifier that hangs or crashes affects
only its own attempt.

    graders = Graders(workers=1, timeout_s=10)
    rewards = await graders.verify_many(task, [(prompt, text), ...])
    # [Reward(1.0), Reward(None, error="..."), ...]
    graders.close()

Consumes: (task, prompt, made). Produces: one Reward each, in order. Waits for: a free worker, and at most
`timeout_s` for each answer. Unblocked by: the verdict, the time limit, the end of the worker, `close`.
Workers start with the first job and end with `close`, or with this process.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock
from typing import Any, Protocol, Self

from reflux.errors import ConfigError
from reflux.types import UNJUDGED, Attempt, Finish, Prompt, Reward, Rollout

# the prompt, and the text, conversation or image that is judged
Job = tuple[Prompt, Any]
# Time limit in seconds for a new process to import this library and the task.
START_S = 60.0
# Additional seconds for the first answer of a new worker, which imports the modules that the verifier needs.
FIRST_S = 5.0
# the largest number of jobs in one message
AT_ONCE = 256
CODE = (
    "import sys; from reflux.grading.worker import work; "
    "work(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))"
)


# The error text of an attempt that ended in one of UNJUDGED.
WHY_UNJUDGED: dict[Finish, str] = {
    "error": "sampling ended in an error",
    "tool_error": "a tool of the environment failed",
    "timeout": "the environment took too long",
}


class Judge(Protocol):
    """An object with the method `verify`, which judges. It is called in another process, so the object is
    pickled.
    """

    def verify(self, prompt: Prompt, made: Any) -> float | Reward: ...


class AttemptJudge(Judge, Protocol):
    """A judge that says what it judges of an attempt."""

    def evidence(self, rollout: Rollout) -> Any: ...


class Graders:
    """`workers` processes that judge answers. If an answer takes more than `timeout_s` seconds, the process
    that judges it is killed, and the next answers go to a new process.

    An attempt that is not judged has a Reward without a value, whose `error` gives the reason. ValueError for
    fewer than 1 worker or a time limit that is not positive.
    """

    def __init__(self, workers: int = 1, timeout_s: float = 10.0):
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"grading needs workers >= 1 and timeout_s > 0, got {workers} and {timeout_s}")
        self.workers, self.timeout_s = workers, timeout_s
        self._all = [_Worker(timeout_s) for _ in range(workers)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)
        # one thread per process; it waits for that process
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reflux-grading")

    @property
    def timeouts(self) -> int:
        """The number of attempts that were not judged in time."""
        return sum(worker.timeouts for worker in self._all)

    @property
    def errors(self) -> int:
        """The number of attempts that were not judged for another reason."""
        return sum(worker.errors for worker in self._all)

    async def verify(self, task: Judge, prompt: Prompt, made: Any) -> Reward:
        """The reward that `task` gives for one answer. made: the text or image of the student."""
        return (await self.verify_many(task, [(prompt, made)]))[0]

    async def verify_many(self, task: Judge, jobs: Sequence[Job]) -> list[Reward]:
        """One reward per job (prompt, text or image), in order. ConfigError if the task cannot be sent to
        another process.
        """
        packed = _pack(task)
        size = min(AT_ONCE, -(-len(jobs) // self.workers)) or 1
        chunks = [list(jobs[start : start + size]) for start in range(0, len(jobs), size)]
        loop = asyncio.get_running_loop()
        parts = await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._judge, packed, chunk) for chunk in chunks)
        )
        return [reward for part in parts for reward in part]

    async def judge_attempts(self, task: AttemptJudge, attempts: Sequence[Attempt]) -> list[Reward]:
        """One reward per attempt, in order. Attempts that ended without a fault of the student (`UNJUDGED`)
        are not judged and not counted in `errors`.
        """
        whole = [attempt.rollout for attempt in attempts if attempt.rollout.finish not in UNJUDGED]
        jobs = [(rollout.prompt, task.evidence(rollout)) for rollout in whole]
        found = iter(await self.verify_many(task, jobs))
        why = [WHY_UNJUDGED.get(attempt.rollout.finish) for attempt in attempts]
        return [Reward(None, error=error) if error else next(found) for error in why]

    def close(self) -> None:
        """End the workers now. Verdicts in progress are lost. May be called twice."""
        for worker in self._all:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _judge(self, packed: bytes, jobs: list[Job]) -> list[Reward]:
        worker = self._idle.get()
        try:
            return worker.judge(packed, jobs)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process. It is started when it is needed, and again after it has ended. `judge` runs in one thread
    at a time, `close` in any thread.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self.timeouts = self.errors = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        # the pickled task that the process has loaded
        self._packed = b""
        self._closed = False
        # held while a process is started or ended
        self._lock = Lock()

    def judge(self, packed: bytes, jobs: list[Job]) -> list[Reward]:
        """A reward for each job. If the time limit is reached or the process ends, only the job in progress
        is not judged.
        """
        rewards: list[Reward] = []
        timeouts = 0
        while len(rewards) < len(jobs):
            connection, extra_s = self._ready(packed)
            try:
                connection.send_bytes(pickle.dumps(jobs[len(rewards) :]))
                while len(rewards) < len(jobs):
                    rewards.append(_receive(connection, self._timeout_s + extra_s))
                    extra_s = 0.0
            except TimeoutError:
                self._end()
                timeouts += 1
                rewards.append(
                    Reward(None, error=f"the verifier gave no verdict within {self._timeout_s:g} s")
                )
            except (EOFError, OSError):
                if self._closed:
                    raise RuntimeError("grading was closed while a verdict was in progress") from None
                rewards.append(Reward(None, error=f"the verifier ended its process (code {self._end(1.0)})"))
        self.timeouts += timeouts
        self.errors += sum(reward.value is None for reward in rewards) - timeouts
        return rewards

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _ready(self, packed: bytes) -> tuple[Connection, float]:
        """The connection to a process that has loaded the task, and the additional seconds that its first
        answer may take.
        """
        if self._process is not None and self._process.poll() is not None:
            # The process ended while it was idle.
            self._end()
        fresh = self._connection is None
        connection = self._connection or self._start()
        if packed != self._packed:
            try:
                connection.send_bytes(pickle.dumps(packed))
                problem = _receive(connection, START_S).error
            except (EOFError, OSError) as error:
                raise RuntimeError(
                    f"a grading process did not start (code {self._end(1.0)}); its output is above"
                ) from error
            if problem is not None:
                raise ConfigError(
                    f"the task cannot be loaded in a grading process ({problem}). Its class must be in a "
                    f"module that can be imported, not in the script that is being run."
                )
            self._packed = packed
        return connection, FIRST_S if fresh else 0.0

    def _start(self) -> Connection:
        with self._lock:
            if self._closed:
                raise RuntimeError("grading was closed")
            self._connection, theirs = Pipe()
            # The worker imports the same modules as this process.
            paths = [path or os.getcwd() for path in sys.path]
            arguments = [str(theirs.fileno()), str(os.getpid()), str(self._timeout_s + FIRST_S + 1.0)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", CODE, *arguments],
                stdin=subprocess.DEVNULL,
                # The output of a verifier is discarded, because it would disturb the live display.
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
                # A group of its own, so Ctrl-C does not reach it, even before it ignores the signal.
                process_group=0,
            )
            theirs.close()
            return self._connection

    def _end(self, patience_s: float = 0.0) -> int:
        """Kill the process if it does not end by itself within `patience_s`. Returns its exit code."""
        with self._lock:
            assert self._process is not None
            assert self._connection is not None
            self._connection.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
            self._process.kill()
            code = self._process.wait()
            self._process, self._connection, self._packed = None, None, b""
            return code


def _receive(connection: Connection, limit_s: float) -> Reward:
    if not connection.poll(limit_s):
        raise TimeoutError
    return Reward(*json.loads(connection.recv_bytes()))


def _pack(task: Judge) -> bytes:
    try:
        return pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the task {type(task).__name__} cannot be sent to a grading process ({error}). A task must be a "
            f"frozen value with plain fields, and its class must be at the top level of a module."
        ) from error
