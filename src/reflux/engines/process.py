"""A server in processes of its own, which end with the library in every case: see `watcher`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from reflux.engines import watcher

# what an error shows of a log
_TAIL_LINES = 12
# seconds beyond its own grace that the watcher has to end a group
_MARGIN_S = 10.0


class ServerProcess:
    """A command that serves until `stop`. `ended` is set when its last process is gone.

    The watcher has a session of its own, so a signal to the group of the library does not reach it.
    """

    def __init__(self, watching: asyncio.subprocess.Process, log: Path, grace_s: float):
        self._watching, self.log, self._grace_s = watching, log, grace_s
        # the server's own process, which is also the id of its group
        self.pid = 0
        self.ended = asyncio.Event()
        # the exit status of the server's own process, negative for a signal
        self.code: int | None = None
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        folder: Path | None = None,
        grace_s: float = 10.0,
    ) -> ServerProcess:
        """Start `command` with exactly this environment; its output is appended to `log`. folder: removed
        where the library is killed. grace_s: between SIGTERM and SIGKILL at `stop`.

        OSError if the command cannot be started.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        told = [str(grace_s), str(log.absolute()), str(folder or ""), *command]
        watching = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", watcher.__file__),
            *told,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,
        )
        server = cls(watching, log, grace_s)
        event = await server._event()
        if event is None:
            await watching.wait()
            raise OSError(f"{command[0]} cannot be started: {server.tail()}")
        server.pid = event["started"]
        server._reading = asyncio.create_task(server._until_ended())
        return server

    @property
    def running(self) -> bool:
        return not self.ended.is_set()

    async def stop(self) -> None:
        """SIGTERM, after the grace SIGKILL to the whole group; returns when every process is gone."""
        await self._tell(b"stop\n", self._grace_s + _MARGIN_S)

    async def kill(self) -> None:
        """SIGKILL to the whole group at once; returns when every process is gone."""
        await self._tell(b"kill\n", _MARGIN_S)

    async def _tell(self, line: bytes, seconds: float) -> None:
        """The watcher ends the server. If it has not done so after `seconds`, it is killed, and the group is
        ended from here.
        """
        assert self._watching.stdin is not None
        if not self.running:
            return
        with suppress(ConnectionError):
            self._watching.stdin.write(line)
            await self._watching.stdin.drain()
        try:
            await asyncio.wait_for(self.ended.wait(), seconds)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._watching.kill()
            await self.ended.wait()

    def tail(self) -> str:
        """The last lines of the log."""
        if not self.log.is_file():
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    async def _until_ended(self) -> None:
        event = await self._event()
        if event is None:
            # The watcher was killed, so nothing else ends the group.
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        else:
            self.code = event["ended"]
        # The pipe to the watcher is closed, or the event loop would warn of it at its end.
        assert self._watching.stdin is not None
        self._watching.stdin.close()
        await self._watching.wait()
        self.ended.set()

    async def _event(self) -> dict[str, int] | None:
        """The next event of the watcher; None if it has ended."""
        assert self._watching.stdout is not None
        line = await self._watching.stdout.readline()
        return json.loads(line) if line else None


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]
