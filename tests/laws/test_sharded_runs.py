"""Law 4 over ranks, in whole runs: the learner `fsdp` on 1, 2 and 3 ranks trains as the learner `hf` does in
one process. A run resumes on another number of ranks, and ends at once when a rank is killed.

Three processes with real collectives (gloo) do all the runs of `rank_jobs.py`. The runs of `hf` that they are
compared with are made here meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from device import ON_GPU
from laws.rank_jobs import GRADIENTS_OF, RANKS, Job, adapted, jobs
from laws.test_ranks import CASES, NORMALISE, summed, whole
from reflux import checks
from reflux.config.recipe import load_recipe
from reflux.errors import ConfigError
from reflux.loop import train
from reflux.training import Options
from tiny import close

pytestmark = [
    # The runs are made on the CPU. docs/gpu.md says what a first run on GPUs has to confirm.
    pytest.mark.skipif(ON_GPU, reason="gloo ranks are on the CPU"),
    # Three more processes import torch and transformers, and make 18 runs.
    pytest.mark.timeout(1500),
]

# The bound of losses relative to their size. With the baseline "kl" a loss is a small difference of large
# terms and loses a digit more, as in tests/golden.
LOSS, CANCELS = 1e-6, {"following": 1e-4}
COMPARED = sorted({job.name: job for job in jobs() if job.plain}.items())


class Runs:
    """The folders of all runs: of ranks by the name of the job, of `hf` under "plain"."""

    def __init__(self, folder: Path, codes: list[int], errors: list[str]):
        self.folder, self.codes, self.errors = folder, codes, errors

    def rows(self, name: str, file: str = "metrics") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name / f"{file}.jsonl").read_text().splitlines()]

    def student(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name / "student" / "model.safetensors")


def ended(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes of all ranks. When one has failed, the others would wait for it, and are killed."""
    while None in (codes := [process.poll() for process in ranks]):
        if 1 in codes:
            for process in ranks:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in ranks]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, student: str, teacher: str) -> Runs:
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("rank_jobs.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = []
    try:
        for rank in range(RANKS):
            with (folder / f"rank-{rank}.txt").open("w") as file:
                command = [sys.executable, str(script), str(rank), str(folder), student, teacher]
                ranks.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )
        for name, job in {job.plain: job for job in jobs() if job.plain}.items():
            cfg = job.config("hf", student, teacher)
            asyncio.run(train(cfg, Options(folder / "plain" / name)))
        codes = ended(ranks)
    finally:
        for process in ranks:
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("*.error")) if not path.name.startswith("hot.")]
    return Runs(folder, codes, errors)


def test_every_run_ends_as_it_should(runs: Runs) -> None:
    """Rank 1 is killed in the last job, and rank 0 ends by itself."""
    told = "\n".join((runs.folder / f"rank-{rank}.txt").read_text()[-3000:] for rank in range(RANKS))
    assert runs.errors == [], told
    assert runs.codes == [2, -9, 0], told


@pytest.mark.parametrize(("name", "job"), [pair for pair in COMPARED if pair[0] != "dying"])
def test_a_run_on_ranks_is_the_run_in_one_process(runs: Runs, name: str, job: Job) -> None:
    """Losses within 1e-6 of their size, parameters within 1e-5, the same attempts and the same metrics."""
    ours, theirs = runs.rows(name), runs.rows(f"plain/{job.plain}")
    assert len(ours) == len(theirs) == job.changes["steps"]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in ("tokens_sampled", "tokens_trained", "updates", "lr", "flops", "asked"):
            assert one.get(key) == other.get(key), key
        if "loss" in other:
            assert one["loss"] == pytest.approx(other["loss"], rel=CANCELS.get(job.plain, LOSS))
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
            assert one["kl_nats_trained"] == pytest.approx(other["kl_nats_trained"], rel=1e-5, abs=1e-9)
    mine, single = runs.student(name), runs.student(f"plain/{job.plain}")
    assert mine.keys() == single.keys()
    assert max(float((mine[key] - single[key]).abs().max()) for key in single) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_first_gradient_is_that_of_one_process(runs: Runs, ranks: int) -> None:
    """In float32, on the quickstart's shape. After one step Adam's first moment is 0.1 times the clipped
    gradient. The difference has at most 1e-6 of its norm. Single entries differ by at most 2e-6 of the
    largest one: the gradients of norms are sums over all positions, and in one process they differ by 1.2e-6
    when micro-batches of 300 tokens add in another order. In float64 they are equal, see below.
    """
    norms = [runs.rows(name)[0]["grad_norm"] for name in (f"quick-{ranks}", "plain/quick-1")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    mine, single = moments(runs.folder / f"quick-{ranks}"), moments(runs.folder / "plain" / "quick-1")
    assert mine.keys() == single.keys()
    largest = max(float(value.abs().max()) for value in single.values())
    assert largest > 1e-3
    assert max(float((mine[key] - single[key]).abs().max()) for key in single) <= 2e-6 * largest
    apart, size = (
        sum(float(value.double().square().sum()) for value in table.values()) ** 0.5
        for table in ({key: mine[key] - single[key] for key in single}, single)
    )
    assert apart <= 1e-6 * size


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_divided_weights_are_those_of_the_whole_batch(runs: Runs, name: str) -> None:
    """In float64, for every objective of law 4, over micro-batches and ranks."""
    compared = []
    for ranks in GRADIENTS_OF:
        found = torch.load(runs.folder / f"gradients-{ranks}.pt")
        for loss_aggregation in NORMALISE:
            if mine := summed(found, f"{name}/{loss_aggregation}"):
                close(whole(loss_aggregation, name), mine)
                compared.append((ranks, loss_aggregation))
    assert compared == [*((2, each) for each in NORMALISE), (3, NORMALISE[0])]


@pytest.mark.parametrize("ranks", GRADIENTS_OF)
def test_the_published_adapter_is_that_of_one_process(runs: Runs, ranks: int) -> None:
    """Its matrices are whole, in every bit, also where the number of ranks does not divide their rows."""
    config, ours = torch.load(runs.folder / f"adapter-{ranks}.pt")
    adapter = adapted().publish().adapter
    assert adapter is not None
    assert config == adapter.config
    theirs = dict(adapter.read())
    assert ours.keys() == theirs.keys()
    assert len({float(value.sum()) for value in theirs.values()}) == len(theirs) > 0
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_with_staleness_ranks_learn_every_attempt_once(runs: Runs) -> None:
    """The loop samples while the ranks learn, so which weights an attempt has depends on time."""
    rows = runs.rows("late")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert max(row["staleness_max"] for row in rows) <= 1
    attempts = [row for row in runs.rows("late", "attempts") if row["kind"] == "attempt"]
    assert len({(row["step"], row["prompt"], row["sample"]) for row in attempts}) == len(attempts)
    assert sum(row["updates"] for row in rows) == 4
    assert all(row["kl_nats"] > 0 and row["tokens_trained"] > 0 for row in rows)


def moments(run: Path) -> dict[str, Tensor]:
    """Adam's first moments after the first step, whole, from the files of all ranks."""
    whole: dict[str, Tensor] = {}
    (folder,) = run.glob("checkpoints/step-1/learner")
    for file in sorted(folder.glob("*.safetensors")):
        for key, value in load_file(file).items():
            if key.startswith("adam.exp_avg/"):
                whole[key] = torch.cat([whole[key], value]) if key in whole else value
    return whole


def test_spectra_and_jumps_are_those_of_one_process(runs: Runs) -> None:
    plain = runs.rows("plain/following", "evals")
    assert all(row["accepted"] > 1 for row in runs.rows("plain/following", "searches"))
    for ranks in (2, 3):
        for one, other in zip(runs.rows(f"following-{ranks}", "evals"), plain, strict=True):
            ours, theirs = one["foresight"], other["foresight"]
            assert ours.keys() == theirs.keys()
            assert ours["matrices"] == theirs["matrices"] > 0
            if theirs["rho"] is not None:
                assert ours["rho"] == pytest.approx(theirs["rho"], rel=1e-3)
                assert ours["spectral_norm"] == pytest.approx(theirs["spectral_norm"], rel=1e-3)


def test_a_step_that_is_not_finite_is_refused_by_all_ranks(runs: Runs) -> None:
    """The batch is on disk, and the ranks went on to the next run."""
    assert "StepRefused: step" in (runs.folder / "hot.0.error").read_text()
    assert len(list((runs.folder / "hot").glob("failed-batch-step-*.jsonl"))) == 1
    assert not (runs.folder / "hot.1.error").exists()


def test_a_killed_rank_ends_the_run_with_a_sentence_and_one_rank_continues_it(
    runs: Runs, student: str, teacher: str
) -> None:
    words = " ".join((runs.folder / "rank-0.txt").read_text().split())
    assert "reflux: rank 1 of 2 has ended, and the run ends with it." in words
    assert "Continue with --resume" in words
    job = next(job for job in jobs() if job.dies)
    assert len(runs.rows(job.name)) == job.dies
    cfg = job.config("fsdp", student, teacher)
    asyncio.run(train(cfg, Options(runs.folder / job.name, resume=True)))
    ours, theirs = runs.rows(job.name), runs.rows(f"plain/{job.plain}")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-6)
    mine, single = runs.student(job.name), runs.student(f"plain/{job.plain}")
    assert max(float((mine[key] - single[key]).abs().max()) for key in single) < 1e-5


# What does not work with divided weights is refused by name before anything is loaded.
REFUSED = {
    "learner.compile": (True, "learner.compile was not tested"),
    "learner.average": ({"decay": 0.9}, "average"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_divided_is_refused_by_name(key: str, student: str, teacher: str) -> None:
    value, words = REFUSED[key]
    with pytest.raises(ConfigError, match=words):
        checks.join(tiny.config("opd", student, teacher, **{"learner.kind": "fsdp", key: value}))


def test_the_part_is_hf_with_another_way_to_open() -> None:
    """A recipe changes the kind and keeps its keys."""
    keys = {"learner.model": "reflux:student", "learner.lr": 1e-3}
    one, other = (
        load_recipe("quickstart", {"learner.kind": kind, **keys}).learner for kind in ("fsdp", "hf")
    )
    assert one.student == other.student
    assert (one.follow(), one.trains_all) == (False, True)
