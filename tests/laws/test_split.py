"""Law 4. The gradient is a property of the batch: it does not depend on micro-batches, order, chunks or
padding. It equals the formula.

All tests use float64, so that the difference between two splits is far below the effect of a wrong count. The
fixture has unequal lengths, missing targets, weights of 0 and siblings, so that counts per micro-batch, per
objective and over the batch all differ.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from device import here
from reflux.assets.characters import character_tokenizer
from reflux.kernels import budget, row_pass
from reflux.models.text import Model, as_model
from reflux.objectives.divergence import Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import SampledKL
from reflux.types import Attempt, Group, TeacherAnswer, TopKTarget
from tiny import attempt, close, gradients, rollout

TOKENS = 102
SETS: dict[str, list[Any]] = {
    "full": [Divergence()],
    "jsd": [Divergence(divergence="jsd", beta=0.3, coef=2.0)],
    "student_topk": [Divergence(support="student", k=5)],
    "sampled_kl": [SampledKL(baseline="kl", coef=0.7)],
    "policy_gradient": [PolicyGradient()],
    "nll": [NLL()],
    "together": [
        Divergence(coef=0.5),
        SampledKL(baseline="none", ratio="none"),
        PolicyGradient(coef=2.0, ratio="none"),
        NLL(coef=0.1),
    ],
}


def batch(teacher: Model) -> list[Group]:
    """Three groups. Targets are present, missing, or present with weight 0."""
    whole = [attempt(rollout(n, seed=0, sample=s), teacher, shift=0.5 - s) for s, n in enumerate((9, 2))]
    faded = [
        attempt(
            rollout(6, seed=1, prompt_tokens=11),
            teacher,
            weight=[1, 0, 0.25, 2, 0, 0],
            shift=[0, 1, 2, -1, 1, 3],
        )
    ]
    turns = [
        attempt(rollout(7, seed=2, prompt_tokens=2, mask=[1, 1, 0, 0, 1, 1, 1]), teacher),
        attempt(rollout(4, seed=2, sample=1)),
    ]
    return [whole, faded, turns]


# the other objectives, for tests that need no formula
MENU: dict[str, list[Any]] = {
    "teacher_topk": [Divergence(support="teacher", k=5, divergence="forward")],
    "union": [Divergence(support="union", k=5)],
    "renormalised": [Divergence(support="union", k=5, tail="renormalised")],
    "skew": [Divergence(divergence="skew_reverse"), Divergence(divergence="skew_forward", coef=0.5)],
    "alpha": [Divergence(divergence="alpha", ratio="truncated")],
    "tv": [Divergence(divergence="tv")],
    "topk_kl": [SampledKL(baseline="topk_kl", baseline_k=5, ratio="clip")],
    "minimum_variance": [SampledKL(baseline="minimum_variance", max_gap_nats=4.0)],
    "group_mean": [SampledKL(baseline="group_mean")],
    "leave_one_out": [SampledKL(baseline="leave_one_out")],
}


def crowd(teacher: Model, other: Model) -> list[Group]:
    """Two teachers of different width, one with a target for every second attempt only, and the student's
    list of top tokens from sampling.
    """
    rng = np.random.default_rng(0)
    groups = []
    for g in range(3):
        group = []
        for s in range(2):
            spoken = rollout(4 + 3 * g + s, seed=g, sample=s)
            ids_TK = np.stack([rng.permutation(TOKENS)[:5] for _ in range(spoken.length)])
            logp_TK = np.log(rng.dirichlet(np.ones(6), spoken.length)[:, :5]).astype(np.float32)
            behaviour = TopKTarget(teacher="behaviour", ids_TK=ids_TK, logp_TK=logp_TK, logp_T=spoken.logp_T)
            entry = attempt(dataclasses.replace(spoken, behaviour=behaviour), teacher)
            if (g + s) % 2:
                entry.answers["b"] = TeacherAnswer(target=tiny.hidden(other, spoken, "b"))
            group.append(entry)
        groups.append(group)
    return groups


@pytest.fixture(scope="module")
def nets() -> tuple[Any, Model]:
    return tiny.net(1, layers=2).double(), as_model(tiny.net(2).double(), character_tokenizer())


def gradient(
    nets: tuple[Any, Model], objectives: list[Any], groups: list[Group], loss_aggregation: str, budget: int
) -> dict[str, torch.Tensor]:
    return gradients(tiny.learner(nets[0], micro_batch_tokens=budget), groups, objectives, loss_aggregation)


@pytest.mark.parametrize("loss_aggregation", ["token-mean-weighted", "token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", SETS)
def test_the_gradient_is_that_of_the_formula(
    nets: tuple[Any, Model], name: str, loss_aggregation: str
) -> None:
    """Bound 1e-6: coefficients and shifts are float32 in the library."""
    groups = batch(nets[1])
    close(
        by_hand(nets, SETS[name], groups, loss_aggregation),
        gradient(nets, SETS[name], groups, loss_aggregation, 1 << 20),
        rtol=1e-6,
    )


@pytest.mark.parametrize("loss_aggregation", ["token-mean-weighted", "token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", SETS)
def test_micro_batches_and_order_change_nothing(
    nets: tuple[Any, Model], name: str, loss_aggregation: str
) -> None:
    groups = batch(nets[1])
    whole = gradient(nets, SETS[name], groups, loss_aggregation, 1 << 20)
    for tokens in (1, 20):
        close(whole, gradient(nets, SETS[name], groups, loss_aggregation, tokens))
    close(
        whole, gradient(nets, SETS[name], [group[::-1] for group in groups[::-1]], loss_aggregation, 1 << 20)
    )


@pytest.mark.parametrize("name", SETS)
def test_packed_rows_change_nothing(nets: tuple[Any, Model], name: str) -> None:
    groups = batch(nets[1])
    whole = gradient(nets, SETS[name], groups, "token-mean-weighted", 1 << 20)
    for tokens in (1, 20, 1 << 20):
        learner = tiny.learner(nets[0], micro_batch_tokens=tokens)
        learner.padded_because = ""
        close(whole, gradients(learner, groups, SETS[name]))


@pytest.mark.parametrize("name", SETS)
def test_chunks_of_rows_change_nothing(
    nets: tuple[Any, Model], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = batch(nets[1])
    whole = gradient(nets, SETS[name], groups, "token-mean-weighted", 1 << 20)
    monkeypatch.setattr(row_pass, "chunk_rows", lambda vocabulary, device, tables: 3)
    monkeypatch.setattr(row_pass, "block_rows", lambda vocabulary, device: 2)
    close(whole, gradient(nets, SETS[name], groups, "token-mean-weighted", 1 << 20))


@pytest.mark.parametrize("name", MENU)
def test_no_split_changes_the_other_objectives(
    nets: tuple[Any, Model], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = batch(nets[1])
    for entry in (entry for group in groups for entry in group):
        for key, target in [
            (name, answer.target)
            for name, answer in entry.answers.items()
            # as a local teacher does if a group baseline requires it
        ]:
            logp_T = (
                tiny.HEADS[target.head]
                .logp_of(target.h_TH, torch.from_numpy(entry.rollout.tokens_T))
                .cpu()
                .numpy()
            )
            entry.answers[key] = TeacherAnswer(target=dataclasses.replace(target, logp_T=logp_T))
    whole = gradient(nets, MENU[name], groups, "token-mean-weighted", 1 << 20)
    close(whole, gradient(nets, MENU[name], groups, "token-mean-weighted", 1))
    monkeypatch.setattr(row_pass, "chunk_rows", lambda vocabulary, device, tables: 3)
    monkeypatch.setattr(row_pass, "block_rows", lambda vocabulary, device: 2)
    close(whole, gradient(nets, MENU[name], groups, "token-mean-weighted", 20))


def test_gradients_of_several_teachers_and_behaviour_add_up(
    nets: tuple[Any, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each objective uses its teacher. Together they give the sum of the gradients that each gives alone, in
    any split.
    """
    other = as_model(tiny.net(3, width=24).double(), character_tokenizer())
    objectives = [
        Divergence(support="teacher", teacher="behaviour", k=3, coef=0.5),
        SampledKL(teacher="behaviour", coef=2.0),
        Divergence(teacher="b", divergence="jsd"),
        SampledKL(baseline="kl"),
        NLL(coef=0.0),
    ]
    whole = gradient(nets, objectives, crowd(nets[1], other), "token-mean-weighted", 1 << 20)
    parts = [
        gradient(nets, [objective], crowd(nets[1], other), "token-mean-weighted", 1 << 20)
        for objective in objectives[:-1]
    ]
    close(whole, {name: sum((part[name] for part in parts), torch.zeros(())) for name in whole}, rtol=1e-6)
    assert all(max(float(value.abs().max()) for value in part.values()) > 0 for part in parts)
    monkeypatch.setattr(row_pass, "block_rows", lambda vocabulary, device: 2)
    close(whole, gradient(nets, objectives, crowd(nets[1], other), "token-mean-weighted", 1))


def test_the_reported_loss_is_the_sum_over_micro_batches(nets: tuple[Any, Model]) -> None:
    losses = []
    for tokens in (1, 1 << 20):
        learner = tiny.learner(nets[0], micro_batch_tokens=tokens)
        stats = tiny.move(learner, batch(nets[1]), SETS["together"])
        losses.append(
            [
                stats["loss"].value,
                stats["kl_nats_trained"].value,
                stats["grad_norm"].value,
                stats["tokens_trained"].value,
            ]
        )
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_a_chunk_holds_at_least_sixteen_rows_and_fits_the_budget() -> None:
    cpu = torch.device("cpu")
    assert budget.chunk_rows(10**9, cpu) == 16
    for tables in (1, 2, 3):
        table_bytes = budget.chunk_rows(151_669, cpu, tables) * 151_669 * 4
        assert 310 < tables * table_bytes / 2**20 <= 320


# --- the formula, without the library


def by_hand(
    nets: tuple[Any, Model], objectives: list[Any], groups: list[Group], loss_aggregation: str
) -> dict[str, torch.Tensor]:
    """loss = sum_k coef_k sum_n w_n cost_k,n c_n, attempt by attempt, from the models' own logits."""
    student, teacher = nets[0], nets[1].net
    attempts = [entry for group in groups for entry in group]
    student.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for objective in objectives:
        kept = sum(
            int((entry.weight_T > 0).sum()) for entry in attempts if contributes(objective, entry, objectives)
        )
        chosen = sum(int(entry.rollout.mask_T.sum()) for entry in attempts)
        for entry in attempts:
            if not contributes(objective, entry, objectives):
                continue
            scale = {
                "token-mean-weighted": 1 / kept,
                "token-mean": 1 / chosen,
                "seq-mean-token-mean": 1 / (len(attempts) * int(entry.rollout.mask_T.sum())),
            }
            cost_T = costs(objective, logp(student, entry), logp(teacher, entry).detach(), entry, objectives)
            for t in np.flatnonzero(entry.weight_T):
                loss = loss + objective.coef * float(entry.weight_T[t]) * cost_T[t] * scale[loss_aggregation]
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters()}


def contributes(objective: Any, entry: Attempt, objectives: list[Any]) -> bool:
    if isinstance(objective, NLL):
        return True
    return (
        bool(entry.advantage_offset_T.any())
        if isinstance(objective, PolicyGradient)
        else entry.target("main") is not None
    )


def logp(model: Any, entry: Attempt) -> torch.Tensor:
    spoken = entry.rollout
    ids = np.concatenate([spoken.prompt_tokens, spoken.tokens_T])
    logits_LV = model(input_ids=here(ids)[None]).logits[0, len(spoken.prompt_tokens) - 1 : -1, :TOKENS]
    return logits_LV.log_softmax(-1).cpu()


def costs(
    objective: Any, p: torch.Tensor, q: torch.Tensor, entry: Attempt, objectives: list[Any]
) -> list[torch.Tensor]:
    tokens = entry.rollout.tokens_T
    rows = range(len(tokens))
    if isinstance(objective, NLL):
        return [-p[t, tokens[t]] for t in rows]
    behaviour = entry.rollout.logp_T.astype(np.float64)
    ratio = [(p[t, tokens[t]] - behaviour[t]).exp() for t in rows]
    if isinstance(objective, PolicyGradient):
        shift = entry.advantage_offset_T
        if objective.ratio == "none":
            return [-float(shift[t]) * p[t, tokens[t]] for t in rows]
        return [
            -torch.minimum(ratio[t] * float(shift[t]), ratio[t].clamp(0.8, 1.2) * float(shift[t]))
            for t in rows
        ]
    if isinstance(objective, SampledKL):
        value = [(p[t].exp() * (p[t] - q[t])).sum() if objective.baseline == "kl" else 0.0 for t in rows]
        # offsets go to exactly one objective
        takes = not any(isinstance(other, PolicyGradient) for other in objectives)
        pushed = [float(entry.advantage_offset_T[t]) if takes else 0.0 for t in rows]
        advantage = [(q[t, tokens[t]] - p[t, tokens[t]] + value[t] + pushed[t]).detach() for t in rows]
        weight = [ratio[t].detach().clamp(max=5.0) if objective.ratio == "truncated" else 1.0 for t in rows]
        return [-advantage[t] * weight[t] * p[t, tokens[t]] for t in rows]
    if objective.support == "student":
        p, q = bucketed(p, q, objective.k)
    if objective.divergence == "jsd":
        m = (objective.beta * q.exp() + (1 - objective.beta) * p.exp()).log()
        b = objective.beta
        return [
            b * (q[t].exp() * (q[t] - m[t])).sum() + (1 - b) * (p[t].exp() * (p[t] - m[t])).sum()
            for t in rows
        ]
    return [(p[t].exp() * (p[t] - q[t])).sum() for t in rows]


def bucketed(p: torch.Tensor, q: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = p.detach().topk(k).indices
    listed = [x.gather(-1, ids) for x in (p, q)]
    one, other = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in listed)
    return one, other
