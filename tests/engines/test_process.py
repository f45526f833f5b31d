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
from reflux.engines import process, watcher
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
    if sys.argv[3] == "forked":
        child = os.fork()
        if child:
            (folder / "child").write_text(str(child))
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
    if (tmp_path / "child").is_file():
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


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
@pytest.mark.parametrize("kind", ["alone", "forked"])
def test_a_library_that_is_killed_leaves_nothing(tmp_path: Path, kind: str) -> None:
    """Also where a fork of it, such as a worker that loads data, holds its pipe to the watcher open."""
    library = subprocess.Popen(
        [sys.executable, "-c", LIBRARY, FAMILY, str(tmp_path), kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pids = pids_in(tmp_path)
    assert (tmp_path / "weights").is_dir()
    if kind == "forked":
        wait_for((tmp_path / "child").is_file)
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


@pytest.mark.usefixtures("cleaning")
def test_signals_to_the_library_do_not_reach_the_watcher(tmp_path: Path) -> None:
    async def act() -> None:
        server, pids = await family(tmp_path)
        assert os.getsid(server._watching.pid) == server._watching.pid
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(server._watching.pid, number)
        await asyncio.sleep(0.5)
        assert server.running
        assert all(map(alive, pids))
        await server.kill()

    asyncio.run(act())


@pytest.mark.usefixtures("cleaning")
def test_a_watcher_that_hangs_is_killed_with_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_MARGIN_S", 0.2)

    async def act() -> list[int]:
        server, pids = await family(tmp_path, "deaf", grace_s=0.1)
        os.kill(server._watching.pid, signal.SIGSTOP)
        await server.stop()
        assert not alive(server._watching.pid)
        return pids

    pids = asyncio.run(act())
    wait_for(lambda: not any(map(alive, pids[:2])))
    os.kill(pids[2], signal.SIGKILL)


def test_shared_memory_of_a_process_that_ended_meanwhile_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is looked at again and again."""
    code = (
        "import os, time; from multiprocessing.shared_memory import SharedMemory; "
        "memory = SharedMemory(create=True, size=4096); time.sleep(1.5); os._exit(0)"
    )
    reading, writing = os.pipe()
    monkeypatch.setattr(watcher, "_SHARED_LOOK_S", 0.0)
    shared: set[str] = set()
    with open(reading) as silent, open(writing, "w"):
        monkeypatch.setattr(sys, "stdin", silent)
        server = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        assert watcher._watch(server, os.getppid(), shared) == "ended"
    (path,) = shared
    # Its process did not remove it.
    Path(path).unlink(missing_ok=True)


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
