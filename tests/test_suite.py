"""The suite itself: no test can hang, whatever it waits for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
WAIT = """
import asyncio, pytest, threading, time
@pytest.fixture
def slow(): time.sleep(60)
def test_a_future(): asyncio.run(asyncio.wait_for(asyncio.Event().wait(), None))
def test_a_lock(): threading.Event().wait()
def test_a_fixture(slow): pass
def test_next(): pass
"""
ENDLESS = """
import time
def test_swallows():
    while True:
        try: time.sleep(60)
        except BaseException: pass
def test_computes_in_c(): sum(iter(int, 1))
def test_next(): pass
"""


def suite(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A file of tests under the project's own settings, but for shorter timeouts."""
    (folder / "test_it.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        str(ROOT / "pyproject.toml"),
        f"--rootdir={folder}",
        "-o",
        "timeout=1",
    ]
    return subprocess.run([*command, str(folder / "test_it.py"), *options], capture_output=True, text=True)


def test_every_test_has_a_timeout_that_the_second_one_leaves_room_for(request: pytest.FixtureRequest) -> None:
    usual, last = (
        float(request.config.getini("timeout")),
        float(request.config.getini("faulthandler_timeout")),
    )
    marks = [mark for item in request.session.items for mark in item.iter_markers("timeout")]
    asked = [usual, *(float(mark.args[0] if mark.args else mark.kwargs["timeout"]) for mark in marks)]
    assert all(0 < seconds < last for seconds in asked)
    assert request.config.getini("faulthandler_exit_on_timeout") is True
    assert settings.default is not None
    assert settings.default.deadline is None, "a limit for each drawn example would be a time asserted"


def test_a_test_that_waits_for_ever_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    ended = suite(tmp_path, WAIT)
    assert ended.stdout.count("Failed: Timeout (>1.0s)") >= 3, ended.stdout
    assert "2 failed, 1 passed, 1 error" in ended.stdout
    assert ended.returncode == 1


def test_a_test_that_no_failure_can_end_takes_its_process_along_and_the_next_one_runs(tmp_path: Path) -> None:
    ended = suite(tmp_path, ENDLESS, "-o", "faulthandler_timeout=2", "-n", "1")
    for name in ("test_swallows", "test_computes_in_c"):
        assert f"in {name}" in ended.stderr, "the stacks of its threads"
        assert f"crashed while running 'test_it.py::{name}'" in ended.stdout
    assert "2 failed, 1 passed" in ended.stdout
    assert ended.returncode == 1
