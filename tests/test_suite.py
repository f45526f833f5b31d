"""The suite itself: no test can hang, whatever it waits for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HANGS = {
    "a future": "import asyncio\ndef test(): asyncio.run(asyncio.wait_for(asyncio.Event().wait(), None))",
    "a thread": "import threading\ndef test(): threading.Event().wait()",
    "a fixture": "import pytest, time\n@pytest.fixture\ndef slow(): time.sleep(60)\ndef test(slow): pass",
}
ENDLESS = {
    "swallows": "import time\ndef test():\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass",
    "computes in C": "def test(): sum(iter(int, 1))",
}


def suite(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A file of tests under the project's own settings, and one test after it."""
    (folder / "test_it.py").write_text(f"{text}\n\ndef test_next(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={folder}"]
    return subprocess.run([*command, str(folder / "test_it.py"), *options], capture_output=True, text=True)


def test_every_test_has_a_timeout_that_the_second_one_leaves_room_for(request: pytest.FixtureRequest) -> None:
    usual, last = float(request.config.getini("timeout")), float(request.config.getini("faulthandler_timeout"))
    marks = [mark for item in request.session.items for mark in item.iter_markers("timeout")]
    asked = [usual, *(float(mark.args[0] if mark.args else mark.kwargs["timeout"]) for mark in marks)]
    assert all(0 < seconds < last for seconds in asked)
    assert request.config.getini("faulthandler_exit_on_timeout") is True


@pytest.mark.parametrize("waits", HANGS)
def test_a_test_that_waits_for_ever_fails_and_the_next_one_runs(tmp_path: Path, waits: str) -> None:
    ended = suite(tmp_path, HANGS[waits], "-o", "timeout=1")
    assert "Timeout (>1.0s)" in ended.stdout
    assert "1 passed" in ended.stdout
    assert ended.returncode == 1


@pytest.mark.parametrize("how", ENDLESS)
def test_a_test_that_no_failure_can_end_takes_its_process_along_and_the_next_one_runs(tmp_path: Path, how: str) -> None:
    ended = suite(tmp_path, ENDLESS[how], "-o", "timeout=1", "-o", "faulthandler_timeout=2", "-n", "1")
    assert "test_it.py" in ended.stderr, "the stacks of its threads"
    assert "1 failed, 1 passed" in ended.stdout
    assert ended.returncode == 1
