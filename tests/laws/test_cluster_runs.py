"""A run on a cluster of Ray is the run in one process, also where actors are killed in its middle: the same
attempts, and the same numbers up to rounding.

One process does all the runs of `cluster_jobs.py` on one cluster. The tests read what it has written.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from device import ON_GPU

pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
jobs = pytest.importorskip("laws.cluster_jobs")
STEPS, DIES_AFTER = jobs.STEPS, jobs.DIES_AFTER
pytestmark = [
    # The actors are on the CPU. docs/gpu.md says what a first run on GPUs has to confirm.
    pytest.mark.skipif(ON_GPU, reason="the actors are on the CPU"),
    # Ray starts, and ten processes import torch and transformers.
    pytest.mark.timeout(1500),
]

# What depends on the machine.
MEASURED = ("seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Ran:
    folder: Path
    code: int
    told: str

    def rows(self, name: str, file: str = "metrics") -> list[Any]:
        path = self.folder / name / f"{file}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def notes(self, name: str) -> list[str]:
        return self.rows(name, "notes")

    def student(self, name: str) -> dict[str, np.ndarray]:
        return load_file(self.folder / name / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, student: str, teacher: str) -> Ran:
    """The processes of pytest share one cluster: the first one makes the runs, and the others wait."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, done = shared / "cluster", shared / "cluster-done.json"
    with (shared / "cluster.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            script = Path(__file__).with_name("cluster_jobs.py")
            environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
            command = [sys.executable, str(script), str(folder), student, teacher]
            ended = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            done.write_text(json.dumps([ended.returncode, ended.stdout]))
    return Ran(folder, *json.loads(done.read_text()))


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in MEASURED}


def sampled(ran: Ran, name: str) -> dict[tuple[int, str, int], list[int]]:
    return {
        (row["step"], row["prompt"], row["sample"]): row["tokens"]
        for row in ran.rows(name, "attempts")
        if "tokens" in row
    }


def test_every_run_but_the_last_ends_by_itself(ran: Ran) -> None:
    """In the last one a rank of the learner is killed, which ends the process."""
    assert ran.code == 2, ran.told[-6000:]
    assert len(ran.rows("killed")) == STEPS


@pytest.mark.parametrize("name", ["placed", "killed", "divided"])
def test_a_run_on_actors_is_the_run_in_one_process(ran: Ran, name: str) -> None:
    """The same attempts, and numbers within rounding: batches have other rows, and sums another order."""
    theirs = ran.rows("plain")
    ours = ran.rows(name)
    assert len(ours) == (DIES_AFTER if name == "divided" else STEPS), ran.told[-6000:]
    for one, other in zip(ours, theirs[: len(ours)], strict=True):
        assert one.keys() == other.keys()
        for key in (
            "tokens_sampled",
            "tokens_trained",
            "updates",
            "flops",
            "asked",
            "finishes",
            "staleness_max",
        ):
            assert one[key] == other[key], key
        for key in ("loss", "grad_norm", "kl_nats", "kl_nats_trained"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), key
    if name != "divided":
        assert sampled(ran, name) == sampled(ran, "plain")
        mine, single = ran.student(name), ran.student("plain")
        assert mine.keys() == single.keys()
        assert max(float(np.abs(mine[key] - single[key]).max()) for key in single) < 1e-5


def test_killed_actors_change_no_bit_and_nothing_counts_twice(ran: Ran) -> None:
    """A sampler and a teacher were killed while they worked on a share of the third step."""
    replaced = [note for note in ran.notes("killed") if "has ended and is replaced" in note]
    assert sorted(note.split(" actor ")[0] for note in replaced) == ["sampler", "teacher main"]
    assert not [note for note in ran.notes("placed") if "replaced" in note]
    assert [plain(row) for row in ran.rows("killed")] == [plain(row) for row in ran.rows("placed")]
    assert len(ran.rows("killed", "attempts")) == len(ran.rows("placed", "attempts"))
    mine, other = ran.student("killed"), ran.student("placed")
    assert all(np.array_equal(mine[key], other[key]) for key in other)


def test_a_run_holds_one_version_of_the_weights(ran: Ran) -> None:
    assert ran.rows("placed", "held") == ran.rows("killed", "held") == [1] * STEPS
    assert ran.rows("plain", "held") == [0] * STEPS


def test_seconds_of_the_actors_are_known(ran: Ran) -> None:
    assert all(row["seconds"]["sample"] > 0 and row["seconds"]["teach"] > 0 for row in ran.rows("placed"))


def test_a_killed_rank_ends_the_run_with_a_sentence(ran: Ran) -> None:
    words = " ".join(ran.told.split())
    assert "has ended, and the run ends with it" in words
    assert "Continue with --resume" in words
