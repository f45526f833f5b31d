"""Law 4 over ranks: processes with unequal shares of a batch sum their gradients to the gradient of the whole
batch.

It uses real processes and real collectives (gloo). The shares differ in attempts, lengths, missing targets
and kept positions, so that every local count differs from the global one. A rank can have an empty share.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from laws.test_split import SETS, batch
from reflux.assets.characters import character_tokenizer
from reflux.loss.batch import plan
from reflux.models.text import as_model
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import TeacherAnswer
from tiny import close

# Groups by rank. A group is never split, because its baseline needs all of it.
SHARES = {"unequal": [[0], [1, 2]], "one_holds_nothing": [[0, 1, 2], []]}
CASES = {**SETS, "leave_one_out": [SampledKL(baseline="leave_one_out")]}
NORMALISE = ("token-mean-weighted", "token-mean", "seq-mean-token-mean")
TESTS = Path(__file__).parent.parent


def worlds() -> tuple[Any, list[Any]]:
    """The student's learner and the batch, equal in every process."""
    student, teacher = tiny.net(1, layers=2).double(), as_model(tiny.net(2).double(), character_tokenizer())
    groups = batch(teacher)
    for attempt in (attempt for group in groups for attempt in group):
        for name, target in [
            (name, answer.target)
            for name, answer in attempt.answers.items()
            # as a local teacher does if a baseline requires it
        ]:
            logp_T = (
                tiny.HEADS[target.head]
                .logp_of(target.h_TH, torch.from_numpy(attempt.rollout.tokens_T))
                .cpu()
                .numpy()
            )
            attempt.answers[name] = TeacherAnswer(target=dataclasses.replace(target, logp_T=logp_T))
    return tiny.learner(student), groups


def whole(loss_aggregation: str, name: str) -> dict[str, torch.Tensor]:
    learner, groups = worlds()
    learner.gradients(plan(groups, CASES[name], loss_aggregation), CASES[name])
    return {key: value.grad.clone().cpu() for key, value in learner.trained.items()}


def rank_main(rank: int, port: int, folder: str) -> None:
    """One process: computes its share of each case's gradient and sums over ranks. Rank 0 saves the sums."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def over_ranks(counts: np.ndarray) -> np.ndarray:
        table = torch.from_numpy(counts)
        dist.all_reduce(table)
        return table.numpy()

    learner, groups = worlds()
    sums = {}
    for share, name, loss_aggregation, counted in cases():
        mine = [groups[index] for index in SHARES[share][rank]]
        learner.optimiser.zero_grad()
        items = (
            plan(mine, CASES[name], loss_aggregation, over_ranks)
            if counted == "global"
            else plan(mine, CASES[name], loss_aggregation)
        )
        learner.gradients(items, CASES[name])
        for key, value in learner.trained.items():
            grad = (torch.zeros_like(value) if value.grad is None else value.grad).cpu()
            dist.all_reduce(grad)
            sums[f"{share}/{name}/{loss_aggregation}/{counted}/{key}"] = grad
    if rank == 0:
        torch.save(sums, Path(folder) / "sums.pt")
    dist.destroy_process_group()


def cases() -> list[tuple[str, str, str, str]]:
    found = [
        ("unequal", name, loss_aggregation, "global") for name in CASES for loss_aggregation in NORMALISE
    ]
    found += [("one_holds_nothing", name, "token-mean-weighted", "global") for name in CASES]
    return found + [("unequal", "full", loss_aggregation, "local") for loss_aggregation in NORMALISE]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = json.dumps([str(TESTS), *sys.path])
    start = f"import sys; sys.path[:0] = {paths}; from laws.test_ranks import rank_main; "
    commands = [
        [sys.executable, "-c", f"{start}rank_main({rank}, {port}, {str(folder)!r})"] for rank in range(2)
    ]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate()[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not any(process.returncode for process in ranks), "\n".join(errors)
    return torch.load(folder / "sums.pt")


def summed(sums: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{case}/"): value for key, value in sums.items() if key.startswith(f"{case}/")}


@pytest.mark.parametrize("loss_aggregation", NORMALISE)
@pytest.mark.parametrize("name", CASES)
def test_ranks_add_up_to_the_whole_batch(
    sums: dict[str, torch.Tensor], name: str, loss_aggregation: str
) -> None:
    close(whole(loss_aggregation, name), summed(sums, f"unequal/{name}/{loss_aggregation}/global"))


@pytest.mark.parametrize("name", CASES)
def test_a_rank_with_an_empty_share_takes_part_in_the_counts(
    sums: dict[str, torch.Tensor], name: str
) -> None:
    close(
        whole("token-mean-weighted", name),
        summed(sums, f"one_holds_nothing/{name}/token-mean-weighted/global"),
    )


@pytest.mark.parametrize("loss_aggregation", NORMALISE)
def test_local_counts_would_be_another_gradient(sums: dict[str, torch.Tensor], loss_aggregation: str) -> None:
    """The control: without counts over ranks the sums differ, so the fixture can detect an error."""
    with pytest.raises(AssertionError):
        close(whole(loss_aggregation, "full"), summed(sums, f"unequal/full/{loss_aggregation}/local"))
