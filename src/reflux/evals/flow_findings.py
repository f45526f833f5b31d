"""Measurements on flow models: velocities at the states that the sampler recorded.

Let a velocity v have an error of relative size s in a direction that is independent of the noise.
The log-prob of the sampled step then changes by s sqrt(2 w) |v| z - s^2 w |v|^2, where z is standard normal
and w is the weight of the KL (`kl_weight`), because the mean moves by sqrt(2 w) s |v| standard deviations. So
parity and zero at identity are both bounds on s, the same for every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reflux.config.context import PartContext
from reflux.config.recipe import RunConfig
from reflux.evals.finding import Finding
from reflux.models.flow.sde import kl_weight, step_logp, step_moments
from reflux.runtime.services import Services
from reflux.teachers.base import plain_requests
from reflux.types import Attempt, FlowRollout, Group, Rollout, Target, VelocityTarget

# bounds on s. CPU: float32 on both sides; GPU: float16 against bfloat16 autocast
SHARES = {"cpu": 1e-4, "cuda": 0.02}
SIGMAS = 5.0
# relative rounding error of a float32 log-prob, which is a sum over D, and of each value's distance from the
# mean
ROUNDING = 2.0**-22


def before(cfg: RunConfig) -> Iterator[Finding]:
    """Findings before models are loaded: the denoising grid that student and teachers share. Raises
    ModelError if a model is not a flow model.
    """
    from reflux.models.flow.load import outline_flow

    acting = cfg.sampler.generation
    if not acting.grids:
        return
    outline = outline_flow(cfg.learner.model, "learner.model")
    t_S = outline.grid(acting.grids[0])
    steps = -np.diff(t_S)
    text = (
        f"{acting.grids[0]} steps of {steps.min():.3g} to {steps.max():.3g} from t = 1 to {t_S[-1]:g}, "
        f"guidance {acting.guidance:g}"
    )
    yield Finding("ok", "grid", text)


def acted(learner: Any, groups: Sequence[Group], dtype: str) -> Iterator[Finding]:
    """Findings on the sampled images: how they ended, and parity (law 11). dtype: of a text sampler."""
    rollouts = [_rollout(attempt) for group in groups for attempt in group]
    first = rollouts[0]
    shape = " x ".join(map(str, first.image.shape))
    yield Finding(
        "ok",
        "images",
        f"{len(rollouts)} of {shape} pixels sampled in {first.length} steps, {first.x_SD.shape[1]} latent "
        "values",
    )
    yield _parity(learner, groups)


def _parity(learner: Any, groups: Sequence[Group]) -> Finding:
    """The learner's velocities at the stored states must give the log-probs that the sampler
    recorded or, without noise, the same steps.
    """
    share = SHARES.get(learner.model.device.type, SHARES["cuda"])
    gaps, excesses = [], []
    for attempt, v_TD in learner.velocities(groups):
        rollout = _rollout(attempt)
        gap_T, bound_T = (
            _log_prob_gap(rollout, v_TD, share) if rollout.noise_level else _step_gap(rollout, v_TD, share)
        )
        gaps.append(gap_T[rollout.mask_T])
        excesses.append(np.where(rollout.mask_T, gap_T / bound_T, 0.0))
    place = max(range(len(excesses)), key=lambda i: excesses[i].max())
    worst, position = float(excesses[place].max()), int(excesses[place].argmax())
    unit = "nats" if _rollout(groups[0][0]).noise_level else "of the state's length"
    text = (
        f"the largest difference between sampler and learner is {worst:.2g} times the bound for a relative "
        f"velocity error of {share:g}, at step {position} (from 0; median "
        f"difference {np.median(np.concatenate(gaps)):.2g} {unit})"
    )
    if worst <= 1:
        return Finding("ok", "parity", text)
    return Finding(
        "failed",
        "parity",
        text
        + ". If all steps differ, the usual cause is another precision or guidance. If only the first step "
        "differs, it is another grid.",
    )


def _log_prob_gap(rollout: FlowRollout, v_TD: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(|difference of log-probs|, its bound), both [T], nats; computed in float64."""
    x_SD, next_TD, v_TD = (
        rollout.x_SD[:-1].astype(np.float64),
        rollout.x_SD[1:].astype(np.float64),
        v_TD.astype(np.float64),
    )
    t_T, dt_T = rollout.t_S[:-1].astype(np.float64), np.diff(rollout.t_S).astype(np.float64)
    mean_TD, std_T1 = step_moments(x_SD, v_TD, t_T[:, None], dt_T[:, None], rollout.noise_level)
    logp_T = step_logp(next_TD, mean_TD, std_T1)
    z_TD = np.abs(next_TD - mean_TD) / std_T1
    widths_T = share * np.sqrt(2 * kl_weight(t_T, dt_T, rollout.noise_level)) * np.linalg.norm(v_TD, axis=1)
    rounding_T = ROUNDING * (np.abs(logp_T) + (z_TD * (np.abs(next_TD) + np.abs(mean_TD)) / std_T1).sum(1))
    return np.abs(rollout.logp_T - logp_T), SIGMAS * widths_T + widths_T**2 / 2 + rounding_T


def _step_gap(rollout: FlowRollout, v_TD: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(|recorded step - step computed from v|, its bound), both [T], relative to the norm of the
    state. For the ODE, whose steps have no log-prob.
    """
    dt_T = np.abs(np.diff(rollout.t_S))
    size_T = np.linalg.norm(rollout.x_SD[1:], axis=1)
    gap_T = np.linalg.norm(np.diff(rollout.x_SD, axis=0) - v_TD * np.diff(rollout.t_S)[:, None], axis=1)
    return gap_T / size_T, share * dt_T * np.linalg.norm(v_TD, axis=1) / size_T + ROUNDING


def alive(name: str, learner: Any, groups: Sequence[Group]) -> Finding:
    """A warning if the teacher `name` gives the same velocities as the student, or no target: the student
    then learns nothing from this teacher. That outputs are finite is checked by the teachers themselves.
    """
    attempts = [attempt for group in groups for attempt in group]
    silent = sum(attempt.target(name) is None for attempt in attempts)
    answered = ((attempt, attempt.target(name), v_TD) for attempt, v_TD in learner.velocities(groups))
    distances = [
        _distance(attempt.rollout, target, v_TD) for attempt, target, v_TD in answered if target is not None
    ]
    if silent:
        text = (
            f"'{name}' gave no target for {silent} of {len(attempts)} attempts (they have routes of other "
            "teachers)"
        )
        return Finding("warning", "teacher", text)
    apart = float(np.mean(distances)) if distances else 0.0
    if apart < 1e-6:
        text = (
            f"'{name}' gives the same velocities as the student. This is correct for an anchor to the start "
            "weights; otherwise its weights are not loaded"
        )
        return Finding("warning", "teacher", text)
    return Finding(
        "ok",
        "teacher",
        f"'{name}' answers; its velocities differ from the student's by {apart:.1%} of their norm",
    )


def _distance(rollout: Rollout, target: Target | None, v_TD: np.ndarray) -> float:
    """Mean of |teacher's velocity - student's| / |student's| over the unmasked steps."""
    rows_T = rollout.mask_T
    assert isinstance(target, VelocityTarget)
    return float((np.linalg.norm(target.v_TD - v_TD, axis=1) / np.linalg.norm(v_TD, axis=1))[rows_T].mean())


def early_stop(groups: Sequence[Group]) -> None:
    """None: images have no stop text."""


def gradient(learner: Any, groups: Sequence[Group]) -> Iterator[Finding]:
    """No finding: the gradients of flows are not measured."""
    return iter(())


def templates(learner: Any, context: Any, teachers: Any, groups: Sequence[Group]) -> Iterator[Finding]:
    """No finding: the prompts of images have no template."""
    return iter(())


async def alone_and_together(table: str, opened: Any, groups: Sequence[Group], heads: Any) -> Finding:
    """Check that a teacher gives an attempt the same velocities alone and in a batch."""
    rollouts = [_rollout(attempt) for group in groups for attempt in group]
    requests = plain_requests(rollouts)
    together = await opened.score(requests)
    alone = [(await opened.score([request]))[0] for request in requests]
    gap = max(
        _distance(rollout, one.target, other.target.v_TD)
        for rollout, one, other in zip(rollouts, together, alone, strict=True)
    )
    share = SHARES.get(opened.model.device.type, SHARES["cuda"])
    text = f"the velocities of '{table}' in a batch and alone differ by {gap:.1e} of their norm"
    return Finding("ok" if gap <= share else "failed", "teacher", f"{text} (bound {share:g})")


async def at_identity(
    context: PartContext, services: Services, learner: Any, groups: Sequence[Group]
) -> Finding:
    """Check that a teacher with the student's weights gives the same velocities as the student. groups:
    attempts of the student.
    """
    from reflux.models.flow.shared_base import SharedBase
    from reflux.teachers.flow import Flow
    from reflux.teachers.flow_engine import FlowTeacher

    share = SHARES.get(learner.model.device.type, SHARES["cuda"])
    itself = SharedBase(learner.model).voice(None, "learner.model")
    answers = FlowTeacher(Flow(context.student.model), context, services, itself)
    attempts = [attempt for group in groups for attempt in group]
    requests = plain_requests([attempt.rollout for attempt in attempts])
    found = {
        id(attempt): answer.target
        for attempt, answer in zip(attempts, await answers.score(requests), strict=True)
    }
    worst = max(
        _distance(attempt.rollout, found[id(attempt)], v_TD) for attempt, v_TD in learner.velocities(groups)
    )
    text = (
        f"the velocities of the student as its own teacher differ by {worst:.1e} of their norm (bound "
        f"{share:g})"
    )
    return Finding("ok" if worst <= share else "failed", "identity", text)


def _rollout(attempt: Attempt) -> FlowRollout:
    assert isinstance(attempt.rollout, FlowRollout)
    return attempt.rollout
