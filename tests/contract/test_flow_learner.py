"""The learner of flow models: its gradient from the definition, however the batch is cut; what it keeps,
averages and exports.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import tiny_flow
from device import here
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.credit.group_advantage import GroupAdvantage
from reflux.credit.prefix import Prefix
from reflux.errors import StepRefused
from reflux.learners.flow import Flow
from reflux.learners.flow_engine import FlowLearner
from reflux.models.flow.load import load_flow
from reflux.models.flow.sde import kl_weight
from reflux.models.flow.start import start
from reflux.models.settings import Average, FlowLora
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.velocity_kl import VelocityKL
from reflux.types import Attempt, Reward, TeacherAnswer, VelocityTarget
from tiny import close, gradients, move, same

MAIN, ANCHOR = VelocityKL(), VelocityKL(teacher="anchor", coef=0.25)
TEACHER, OTHER = tiny_flow.model(2), tiny_flow.model(3)


def opened(seed: int = 1, requirements: Requirements | None = None, **fields: Any) -> FlowLearner:
    """A learner that stands still unless it is told otherwise; gradients stay unclipped."""
    still = {"lr": 0.0, "clip": 1e12, "weight_decay": 0.0, "autocast": "off"}
    part = Flow(**{"model": "tiny", **still, **fields})
    return FlowLearner(
        part, tiny.context(requirements or Requirements()), tiny.services(), tiny_flow.model(seed)
    )


def batch(lengths: Sequence[int] = (4, 7, 5), drawn_by: Any = None, **fields: Any) -> list[list[Attempt]]:
    """Groups of one attempt each, of different prompts, with the words of two teachers."""
    groups = []
    for seed, length in enumerate(lengths):
        text = tiny_flow.TEXTS[1 + seed % 3]
        attempt = tiny_flow.attempt(
            length, teacher=TEACHER, seed=seed, text=text, drawn_by=drawn_by, **fields
        )
        attempt.answers["anchor"] = TeacherAnswer(
            target=tiny_flow.velocities(OTHER, attempt.rollout, "anchor")
        )
        groups.append([attempt])
    return groups


def by_definition(
    groups: list[list[Attempt]], coefs: dict[str, float], seed: int = 1
) -> tuple[float, dict[str, Tensor]]:
    """sum over teachers of coef times the mean over counted steps of w |v_s - v_T|^2, one step at a time, by
    autograd.
    """
    model = tiny_flow.model(seed)
    total, count = torch.zeros(()), 0
    for attempt in (attempt for group in groups for attempt in group):
        rollout: Any = attempt.rollout
        for i in np.flatnonzero(attempt.weight_T):
            t, dt = float(rollout.t_S[i]), float(rollout.t_S[i + 1] - rollout.t_S[i])
            v_D = model.velocity(
                torch.from_numpy(rollout.x_SD[i : i + 1]),
                torch.tensor([t]),
                [rollout.prompt.messages[-1]["content"]],
            )[0]
            for name, coef in coefs.items():
                target: Any = attempt.target(name)
                total = (
                    total
                    + coef
                    * kl_weight(t, dt, rollout.noise_level)
                    * (v_D - here(target.v_TD[i])).square().sum()
                )
            count += 1
    (total / count).backward()
    return float(total / count), {
        name: p.grad for name, p in model.net.named_parameters() if p.grad is not None
    }


def test_loss_and_gradient_are_the_definitions() -> None:
    learner, groups = opened(), batch()
    stats = move(learner, groups, [MAIN, ANCHOR])
    loss, expected = by_definition(groups, {"main": 1.0, "anchor": 0.25})
    assert stats["loss"].value == pytest.approx(loss, rel=1e-5)
    found = {name: p.grad for name, p in learner.trained.items() if p.grad is not None}
    close(found, expected, 2e-4)
    assert stats["kl_nats_trained"].value == pytest.approx(by_definition(batch(), {"main": 1.0})[0], rel=1e-5)
    # the last step of each grid is nobody's
    assert stats["tokens_trained"].value == 3 + 6 + 4


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_no_cut_of_the_batch_changes_the_gradient(size: int) -> None:
    whole = gradients(opened(), batch(), [MAIN, ANCHOR])
    cut = gradients(opened(micro_batch=size), list(reversed(batch())), [ANCHOR, MAIN])
    close(cut, whole, 2e-4)


@pytest.mark.parametrize("loss_aggregation", ["token-mean", "seq-mean-token-mean"])
def test_denominators_are_those_of_texts(loss_aggregation: str) -> None:
    groups = batch((4, 7))
    share_credit(groups, {"prefix": Prefix(length=3)}, StepContext(0, 0))
    found = gradients(opened(), groups, [MAIN], loss_aggregation)
    # means over 3 steps each
    parts = [by_definition([group], {"main": 1.0})[1] for group in groups]
    shares = [3 / 9, 3 / 9] if loss_aggregation == "token-mean" else [3 / (2 * 3), 3 / (2 * 6)]
    close(
        found,
        {
            name: sum(share * part[name] for share, part in zip(shares, parts, strict=True))
            for name in parts[0]
        },
        2e-4,
    )


def test_a_prefix_trains_on_the_first_steps_alone_and_computes_no_other() -> None:
    groups = batch()
    share_credit(groups, {"prefix": Prefix(length=2)}, StepContext(0, 0))
    learner = opened()
    stats = move(learner, groups, [MAIN])
    assert stats["tokens_trained"].value == 2 * 3
    close(
        {n: p.grad for n, p in learner.trained.items() if p.grad is not None},
        by_definition(groups, {"main": 1.0})[1],
        2e-4,
    )


def test_a_teacher_that_is_the_student_teaches_exactly_nothing() -> None:
    learner, groups = opened(lr=0.1), batch()
    for attempt, v_TD in learner.velocities(groups):
        attempt.answers["main"] = TeacherAnswer(target=VelocityTarget(teacher="main", v_TD=v_TD))
    before = {name: p.detach().clone() for name, p in learner.trained.items()}
    stats = move(learner, groups, [MAIN])
    assert stats["loss"].value == stats["grad_norm"].value == stats["updates"].value == 0
    assert same(before, {name: p.detach() for name, p in learner.trained.items()})


def test_an_anchor_that_is_the_teacher_weighs_one_plus_beta_and_beta_0_takes_it_away() -> None:
    groups = batch()
    for (attempt,) in groups:
        attempt.answers["anchor"] = TeacherAnswer(target=replace(attempt.target("main"), teacher="anchor"))  # type: ignore[type-var]
    one = gradients(opened(), batch(), [MAIN])
    close(
        gradients(opened(), groups, [MAIN, ANCHOR]), {name: 1.25 * value for name, value in one.items()}, 2e-4
    )
    assert same(gradients(opened(), batch(), [MAIN, VelocityKL(teacher="anchor", coef=0)]), one)


def test_rows_of_one_route_do_not_feel_the_teacher_of_another() -> None:
    learner = opened()
    groups = batch()
    move(learner, groups, [MAIN])
    before = [attempt.learned.kl_T for (attempt,) in groups if attempt.learned]
    groups = batch()
    groups[1][0].target("main").v_TD[:] += 3.0  # type: ignore[union-attr]
    move(learner, groups, [MAIN])
    after = [attempt.learned.kl_T for (attempt,) in groups if attempt.learned]
    assert [np.allclose(a, b, rtol=1e-5, equal_nan=True) for a, b in zip(before, after, strict=True)] == [
        True,
        False,
        True,
    ]


def test_what_a_teacher_said_of_the_last_step_is_never_looked_at() -> None:
    clean, groups = gradients(opened(), batch(), [MAIN]), batch()
    for (attempt,) in groups:
        attempt.target("main").v_TD[-1] = 1e30  # type: ignore[union-attr]
        attempt.rollout.x_SD[-1] += 7.0  # type: ignore[attr-defined]
    assert same(gradients(opened(), groups, [MAIN]), clean)


def test_the_verdicts_policy_gradient_is_that_of_the_drawn_steps() -> None:
    """Flow-GRPO with the parts for texts: advantage times the gradient of each log-density, at ratio 1."""
    student = tiny_flow.model(1)
    attempts = [
        Attempt(tiny_flow.rollout(4, seed=4, sample=s, drawn_by=student), Reward(float(s == 0)))
        for s in range(3)
    ]
    share_credit([attempts], {"group_advantage": GroupAdvantage()}, StepContext(0, 0))
    learner = opened()
    found = gradients(learner, [attempts], [PolicyGradient()])
    total = torch.zeros(())
    for attempt, advantage in zip(attempts, (2 / 3, -1 / 3, -1 / 3), strict=True):
        rollout: Any = attempt.rollout
        for i in range(3):
            t, dt = float(rollout.t_S[i]), float(rollout.t_S[i + 1] - rollout.t_S[i])
            x_D, next_D = here(rollout.x_SD[i]), here(rollout.x_SD[i + 1])
            v_D = student.velocity(x_D[None], torch.tensor([t]), [rollout.prompt.messages[-1]["content"]])[0]
            sigma = 0.7 * math.sqrt(t / (1 - t)) if t < 1 else 0.7 / math.sqrt(-dt)
            mean_D = x_D * (1 + sigma**2 / (2 * t) * dt) + v_D * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
            total = total - advantage * -((next_D - mean_D).square() / (2 * sigma**2 * -dt)).sum()
    (total / 9).backward()
    close(found, {name: p.grad for name, p in student.net.named_parameters() if p.grad is not None}, 1e-3)
    gaps = [attempt.learned.logp["student"][:3] - attempt.rollout.logp_T[:3] for attempt in attempts]
    # law 11: the learner gives the drawn steps the sampler's log-densities
    assert np.abs(gaps).max() < 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_refused_and_nothing_has_changed(bad: float) -> None:
    learner = opened(lr=0.1)
    move(learner, batch(), [MAIN])
    before = {name: torch.as_tensor(value).clone() for name, value in learner.state().items()}
    groups = batch()
    groups[1][0].target("main").v_TD[1] = bad  # type: ignore[union-attr]
    with pytest.raises(StepRefused, match=r"step 5: .* no weight has changed.*noise_level"):
        move(learner, groups, [MAIN], step=4)
    assert same(before, dict(learner.state()))


def test_the_student_of_now_is_observed_where_it_is_wanted() -> None:
    learner, groups = opened(requirements=Requirements(now_at_behaviour=True)), batch()
    # the attempts are of an older student
    learner.version = 1
    found = asyncio.run(learner.observe(groups))
    for (attempt,), now in zip(groups, found, strict=True):
        expected = tiny_flow.velocities(tiny_flow.model(1), attempt.rollout, "now").v_TD
        assert isinstance(now, VelocityTarget)
        assert np.allclose(now.v_TD, expected, atol=1e-5, equal_nan=True)
        assert np.isnan(now.v_TD[-1]).all()
        assert attempt.now is None
    assert asyncio.run(opened().observe(groups)) == [None] * 3


@pytest.mark.parametrize("every", [1, 2])
def test_the_average_is_exact_and_is_what_is_shown(every: int, tmp_path: Path) -> None:
    learner = opened(lr=0.05, average=Average(decay=0.75, every=every))
    mean = {name: p.detach().double() for name, p in learner.trained.items()}
    for step in range(5):
        move(learner, batch(), [MAIN], step)
        # a jump, which the loop counts; the average counts optimiser steps
        learner.version += step == 0
        if (step + 1) % every == 0:
            mean = {
                name: 0.75 * value + 0.25 * learner.trained[name].detach().double()
                for name, value in mean.items()
            }
    live = {name: p.detach().clone() for name, p in learner.trained.items()}
    with learner.at_mean() as averaged:
        shown = {name: value.clone() for name, value in learner.weights.items()}
    assert averaged
    assert all(torch.allclose(shown[name].double(), value, atol=1e-6) for name, value in mean.items())
    # looking changes nothing
    assert same(live, {name: p.detach() for name, p in learner.trained.items()})
    folder = tmp_path / "student"
    folder.mkdir()
    learner.export(folder)
    stored = load_flow(str(folder), "student").net.state_dict()
    assert all(torch.allclose(stored[name].double(), value, atol=1e-6) for name, value in mean.items())
    with opened().at_mean() as averaged:
        assert not averaged


@pytest.mark.parametrize("fields", [{}, {"lora": FlowLora(rank=2, alpha=4)}, {"average": Average(0.5, 1)}])
def test_a_learner_that_was_stopped_goes_on_bit_for_bit(fields: dict[str, Any]) -> None:
    whole = opened(lr=0.05, **fields)
    for step in range(3):
        move(whole, batch(), [MAIN], step)
    first = opened(lr=0.05, **fields)
    move(first, batch(), [MAIN])
    saved = {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in first.state().items()
    }
    second = opened(lr=0.05, **fields)
    second.take_up(saved)
    for step in range(1, 3):
        move(second, batch(), [MAIN], step)
    assert same(
        {k: torch.as_tensor(v) for k, v in whole.state().items()},
        {k: torch.as_tensor(v) for k, v in second.state().items()},
    )


def test_under_lora_adapters_alone_are_trained_and_the_export_is_merged(tmp_path: Path) -> None:
    learner = opened(lr=0.05, lora=FlowLora(rank=2, alpha=4))
    assert all("lora_" in name for name in learner.trained)
    frozen = {name: p.detach().clone() for name, p in learner.net.named_parameters() if not p.requires_grad}
    for step in range(3):
        move(learner, batch(), [MAIN], step)
    assert same(
        frozen, {name: p.detach() for name, p in learner.net.named_parameters() if not p.requires_grad}
    )
    folder = tmp_path / "student"
    folder.mkdir()
    learner.export(folder)
    again = tiny_flow.model(1)
    # the adapter alone, added to the model it was trained on
    start(again, None, str(folder), None, seed=0)
    assert all(
        torch.allclose(here(value), learner.weights[name], atol=1e-6)
        for name, value in again.net.state_dict().items()
    )
    plain = load_flow(str(folder), "student")
    assert set(plain.net.state_dict()) == set(tiny_flow.model(1).net.state_dict()) == set(learner.weights)
    groups = batch()
    for attempt, v_TD in learner.velocities(groups):
        shown = tiny_flow.velocities(plain, attempt.rollout).v_TD
        assert np.allclose(v_TD, shown, atol=1e-5, equal_nan=True)
        assert not np.allclose(
            v_TD[0], tiny_flow.velocities(tiny_flow.model(1), attempt.rollout).v_TD[0], atol=1e-3
        )


def test_jumps_are_exact_and_undone_bit_for_bit() -> None:
    learner = opened()
    names = [name for name in learner.access.names if "attn" in name]
    base = learner.access.base(names)
    learner.access.write({name: value + 0.5 for name, value in base.items()})
    assert all(torch.equal(learner.access.read([name])[name], value + 0.5) for name, value in base.items())
    learner.access.write(base)
    assert same(learner.access.read(names), base)


def test_plain_flow_matching_needs_no_density() -> None:
    """What `flow_sft` does: the mean squared velocity to what was said, at noise level 0."""
    groups = batch(noise_level=0.0)
    for (attempt,) in groups:
        behaviour = tiny_flow.velocities(TEACHER, attempt.rollout, "behaviour")
        attempt.rollout = replace(attempt.rollout, behaviour=behaviour)
        attempt.answers.clear()
    learner = opened()
    stats = move(learner, groups, [VelocityKL(teacher="behaviour", weight="mse")])
    model, total = tiny_flow.model(1), 0.0
    for (attempt,) in groups:
        own = tiny_flow.velocities(model, attempt.rollout).v_TD
        total += float(np.nansum(((own - attempt.rollout.behaviour.v_TD) ** 2).mean(-1)))  # type: ignore[union-attr]
    assert stats["loss"].value == pytest.approx(total / 13, rel=1e-4)
    assert stats["kl_nats_trained"].value is None
