"""Servers end with the library, whatever happens to either."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import alive, wait_for
from reflux.engines.process import ServerProcess

# A server with a worker in its group and one that has left it. Both ignore SIGTERM. The server and the
# first worker have a piece of shared memory open. The server writes their ids and its name.
FAMILY = """
import json, os, signal, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
shares = "; from multiprocessing.shared_memory import SharedMemory; memory = SharedMemory(sys.argv[1])"
waits = "; print(1, flush=True); time.sleep(600)"
children = [
    subprocess.Popen(
        [sys.executable, "-c", deaf + more + waits, memory.name],
        stdout=subprocess.PIPE,
        start_new_session=away,
    )
    for away, more in ((False, shares), (True, ""))
]
for child in children:
    child.stdout.readline()
with open(sys.argv[1] + ".shared", "w") as file:
    file.write(memory.name)
with open(sys.argv[1] + ".tmp", "w") as file:
    json.dump([os.getpid(), *(child.pid for child in children)], file)
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
# A library that starts such a server, and does nothing more.
LIBRARY = """
import asyncio, os, sys
from pathlib import Path
from reflux.engines.process import ServerProcess

async def main():
    folder = Path(sys.argv[2])
    command = [sys.executable, "-c", sys.argv[1], str(folder / "pids"), "deaf"]
    weights = folder / "weights"
    weights.mkdir()
    await ServerProcess.start(command, os.environ, folder / "log", folder=weights)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def pids_in(folder: Path) -> list[int]:
    wait_for((folder / "pids").is_file)
    return json.loads((folder / "pids").read_text())


def shared_memory(folder: Path) -> Path:
    return Path("/dev/shm", (folder / "pids.shared").read_text())


@pytest.fixture
def cleaning(tmp_path: Path) -> Iterator[None]:
    """A failed test leaves nothing behind."""
    yield
    if (tmp_path / "pids").is_file():
        for pid in json.loads((tmp_path / "pids").read_text()):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        shared_memory(tmp_path).unlink(missing_ok=True)


async def family(folder: Path, kind: str = "kind", grace_s: float = 0.5) -> tuple[ServerProcess, list[int]]:
    command = [sys.executable, "-c", FAMILY, str(folder / "pids"), kind]
    server = await ServerProcess.start(command, os.environ, folder / "log", grace_s=grace_s)
    return server, await asyncio.to_thread(pids_in, folder)


@pytest.mark.usefixtures("cleaning")
@pytest.mark.parametrize("kind", ["kind", "deaf"])
def test_stop_ends_every_process(tmp_path: Path, kind: str) -> None:
    async def act() -> tuple[list[int], int | None]:
        server, pids = await family(tmp_path, kind)
        assert server.pid == pids[0]
        assert all(map(alive, pids))
        assert shared_memory(tmp_path).exists()
        await server.stop()
        return pids, server.code

    pids, code = asyncio.run(act())
    assert not any(map(alive, pids))
    assert not shared_memory(tmp_path).exists()
    assert code == (-signal.SIGTERM if kind == "kind" else -signal.SIGKILL)


@pytest.mark.usefixtures("cleaning")
def test_kill_ends_every_process_at_once(tmp_path: Path) -> None:
    async def act() -> tuple[list[int], int | None]:
        # With its grace of an hour `stop` would wait.
        server, pids = await family(tmp_path, "deaf", grace_s=3600.0)
        await server.kill()
        await server.kill()
        return pids, server.code

    pids, code = asyncio.run(act())
    assert not any(map(alive, pids))
    assert not shared_memory(tmp_path).exists()
    assert code == -signal.SIGKILL


@pytest.mark.usefixtures("cleaning")
def test_a_server_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    async def act() -> list[int]:
        server, pids = await family(tmp_path)
        os.kill(pids[0], signal.SIGKILL)
        await server.ended.wait()
        assert not server.running
        assert server.code == -signal.SIGKILL
        return pids

    assert not any(map(alive, asyncio.run(act())))
    assert not shared_memory(tmp_path).exists()


@pytest.mark.usefixtures("cleaning")
def test_a_library_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    library = subprocess.Popen(
        [sys.executable, "-c", LIBRARY, FAMILY, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pids = pids_in(tmp_path)
    assert (tmp_path / "weights").is_dir()
    library.kill()
    library.wait()
    wait_for(lambda: not any(map(alive, pids)))
    wait_for(lambda: not (tmp_path / "weights").exists())
    assert not shared_memory(tmp_path).exists()


@pytest.mark.usefixtures("cleaning")
def test_a_watcher_that_is_killed_takes_the_group_along(tmp_path: Path) -> None:
    """What has left the group is not found then."""

    async def act() -> list[int]:
        server, pids = await family(tmp_path)
        os.kill(server._watching.pid, signal.SIGKILL)
        await server.ended.wait()
        return pids

    pids = asyncio.run(act())
    wait_for(lambda: not any(map(alive, pids[:2])))
    os.kill(pids[2], signal.SIGKILL)


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    async def act() -> None:
        with pytest.raises(OSError, match="no-such-program cannot be started"):
            await ServerProcess.start(["no-such-program"], os.environ, tmp_path / "log")

    asyncio.run(act())


def test_the_end_of_the_log_is_shown(tmp_path: Path) -> None:
    async def act() -> tuple[int | None, str]:
        code = "print('\\n'.join(map(str, range(99)))); raise SystemExit(3)"
        server = await ServerProcess.start([sys.executable, "-c", code], os.environ, tmp_path / "log")
        await server.ended.wait()
        return server.code, server.tail()

    code, tail = asyncio.run(act())
    assert code == 3
    assert tail.splitlines()[-1] == "98"
    assert len(tail.splitlines()) == 12
