"""Whole runs with real vLLM servers: `make test-engines`. A sampler in a server whose processes are killed
meanwhile, and a teacher in one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.conftest import TALLIES, Found
from engines.real_server import process_of
from processes import wait_for
from reflux.config.recipe import load_recipe
from reflux.loop import train
from reflux.training import Options

# a start of the server on a machine that is busy
pytestmark = [pytest.mark.engines, pytest.mark.timeout(1700)]
SCALE: dict[str, Any] = {
    "prompts_per_step": 16,
    "save_every": 1000,
    "eval_every": 1000,
    "threads": 1,
    "evals.accuracy": "none",
    "evals.agreement": "none",
    "evals.teacher_accuracy": "none",
    "evals.test_accuracy": "none",
}
STEPS = 6


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    file = run / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextmanager
def begun(run: Path, python: str) -> Iterator[subprocess.Popen[bytes]]:
    """`reflux run quickstart` with a server of its own. A test that fails ends it."""
    told = {
        **SCALE,
        "steps": STEPS,
        "sampler.kind": "vllm",
        "sampler.max_tokens": 64,
        "sampler.python": python,
        "sampler.start_timeout_s": 1700.0,
    }
    overrides = [f"{key}={value}" for key, value in told.items()]
    command = [sys.executable, "-m", "reflux.cli.main", "run", "quickstart", *overrides, "--out", str(run)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (run.parent / f"{run.name}.txt").open("wb") as file:
        library = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield library
    finally:
        library.kill()
        library.wait()


def servers(library: int) -> list[int]:
    """The servers below a process: children of its watchers."""
    watchers = _children(library)
    return [server for watcher in watchers for server in _children(watcher)]


def _children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def finished(library: subprocess.Popen[bytes], run: Path) -> list[dict[str, Any]]:
    """The attempts of a run that ends well."""
    said = run.parent / f"{run.name}.txt"
    assert library.wait() == 0, said.read_text()
    assert (run / "summary.json").is_file()
    assert len(lines(run, "metrics")) == STEPS
    return lines(run, "attempts")


def by_name(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Attempts by step and place; each must be there once."""
    names = Counter(f"{row['kind']}/{row['step']}/{row['prompt']}/{row['sample']}" for row in rows)
    assert set(names.values()) == {1}
    return dict(zip(names, rows, strict=True))


@pytest.fixture(scope="module")
def plain(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The attempts of an undisturbed run."""
    run = tmp_path_factory.mktemp("plain") / "run"
    with begun(run, python) as library:
        return by_name(finished(library, run))


def test_a_run_from_the_command_line(plain: dict[str, Any]) -> None:
    kinds = Counter(name.split("/")[0] for name in plain)
    assert kinds == {"attempt": 16 * STEPS, "learned": 16 * STEPS}
    versions = {row["version"] for row in plain.values() if row["kind"] == "attempt"}
    assert versions == set(range(STEPS))


@pytest.mark.parametrize("victim", ["VLLM::Worker", "api_server"])
def test_a_run_whose_server_is_killed_is_the_same_run(
    python: str, tmp_path: Path, plain: dict[str, Any], victim: str
) -> None:
    run = tmp_path / "run"
    with begun(run, python) as library:
        wait_for(lambda: len(lines(run, "metrics")) >= 2 or library.poll() is not None, 1500.0)
        (server,) = servers(library.pid)
        os.kill(process_of(server, victim), signal.SIGKILL)
        struck = by_name(finished(library, run))
    assert struck.keys() == plain.keys()
    same = sum(struck[name] == plain[name] for name in plain)
    TALLIES.append(
        f"a run of {STEPS} steps, {victim} killed: {same} of {len(plain)} lines of attempts.jsonl the same"
    )
    assert same == len(plain)
    assert (tmp_path / "run.txt").read_text().count("is started again") == 1


@pytest.mark.parametrize(
    ("recipe", "gives"), [("quickstart", "hidden"), ("topk", "student_topk"), ("opd", "sampled")]
)
def test_a_run_with_a_served_teacher_is_the_run_with_a_local_one(
    found: Found, tmp_path: Path, recipe: str, gives: str
) -> None:
    served = {
        "teachers.main.kind": "vllm",
        "teachers.main.model": "reflux:teacher",
        "teachers.main.url": found.url,
        "teachers.main.gives": gives,
    }
    for name, table in (("local", {}), ("served", served)):
        # Larger steps would turn differences of rounding into other samples.
        cfg = load_recipe(recipe, {**SCALE, "steps": 3, "learner.lr": 1e-9, **table})
        asyncio.run(train(cfg, Options(tmp_path / name)))
    both = [lines(tmp_path / name, "metrics") for name in ("local", "served")]
    for local, other in zip(*both, strict=True):
        assert other["without_target"] == {"main": 0}
        for key in ("loss", "kl_nats", "grad_norm"):
            np.testing.assert_allclose(other[key], local[key], rtol=1e-3, atol=1e-4)
