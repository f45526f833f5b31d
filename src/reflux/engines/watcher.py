"""A small process between the library and a server that it starts. It needs the standard library only.

    python watcher.py GRACE_S LOG FOLDER COMMAND...

It starts COMMAND in a process group of its own and prints one line of JSON for each event: {"started": PID}
and {"ended": CODE}. It ends the whole group as soon as the server has ended, because a server that was killed
leaves its workers. It also ends the group when the library is gone: the end of the standard input says so,
and another parent. Then it also removes FOLDER, which holds weights in shared memory; "" for none. A line
"stop" ends the server with SIGTERM, and after GRACE_S seconds with SIGKILL; a line "kill" ends it with
SIGKILL. Processes that have left the group are found as children, because they become children of this
process.

Python's shared memory and semaphores outlive processes that are killed: vLLM 0.32 leaves 0.4 GB of them. The
files that processes of the server had open are removed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

# seconds between two looks at the parent and the server, and between two looks at shared memory
_LOOK_S, _SHARED_LOOK_S = 0.2, 5.0
# files of Python's shared memory and of its semaphores
_SHARED = ("/dev/shm/psm_", "/dev/shm/sem.mp-")
# the option of prctl by which orphaned descendants become children of this process
_SET_CHILD_SUBREAPER = 36


def main(grace_s: float, log: str, folder: str, command: list[str]) -> None:
    parent = os.getppid()
    # A signal to the group of the library, such as Ctrl-C, is the library's to answer.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _adopt_orphans()
    with open(log, "ab") as file:
        try:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_listen_again,
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return
    why, shared = "gone", set[str]()
    try:
        _tell({"started": server.pid})
        why = _watch(server, parent, shared)
        if why == "stop":
            shared |= _shared_by(_group(server.pid))
            _end_kindly(server, grace_s)
    finally:
        _end_all(server, shared)
        for path in shared:
            with contextlib.suppress(OSError):
                os.unlink(path)
        _tell({"ended": server.wait()})
        # A library that is there starts another server with the same weights.
        if why == "gone" and folder:
            shutil.rmtree(folder, ignore_errors=True)


def _watch(server: subprocess.Popen[bytes], parent: int, shared: set[str]) -> str:
    """Wait until the server has "ended", the library is "gone", or the library says "stop" or "kill".
    shared: gets the files of shared memory that processes of the server have open.
    """
    looked = time.monotonic()
    while server.poll() is None:
        if os.getppid() != parent:
            return "gone"
        readable, _, _ = select.select([sys.stdin], [], [], _LOOK_S)
        if readable:
            said = sys.stdin.readline().strip()
            return said if said in ("stop", "kill") else "gone"
        # Processes that end meanwhile cannot be looked at later.
        if time.monotonic() - looked > _SHARED_LOOK_S:
            shared |= _shared_by(_group(server.pid))
            looked = time.monotonic()
    return "ended"


def _end_kindly(server: subprocess.Popen[bytes], grace_s: float) -> None:
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(grace_s)


def _end_all(server: subprocess.Popen[bytes], shared: set[str]) -> None:
    """Kill the group and every descendant, and wait for them. shared: as in `_watch`."""
    shared |= _shared_by(_group(server.pid))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    while children := _children():
        for child in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _group(number: int) -> list[int]:
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if name.isdigit() and os.getpgid(int(name)) == number:
                found.append(int(name))
    return found


def _shared_by(processes: list[int]) -> set[str]:
    """The files of shared memory that these processes have open."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError), open(f"/proc/{process}/maps") as file:
            found.update(line.split()[-1] for line in file if "/dev/shm/" in line)
    return {path for path in found if path.startswith(_SHARED)}


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def _adopt_orphans() -> None:
    # Only Linux has this call. Elsewhere the group alone is ended.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _listen_again() -> None:
    """In the server's process: signals act as usual."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _tell(event: dict[str, int]) -> None:
    # The library may be gone.
    with contextlib.suppress(OSError):
        print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
