"""What is measured of flow models: velocities at the states that the sampler recorded.

A velocity off by a share s of itself, in a direction that knows nothing of the noise, moves the log-prob of
the step that was drawn by s sqrt(2 w) |v| z - s^2 w |v|^2, z standard normal and w the KL's weight
(`kl_weight`): the mean moves by sqrt(2 w) s |v| widths. So both parity and zero at identity are bounds on s,
whatever the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from reflux.config.context import PartContext
from reflux.config.recipe import RunConfig
from reflux.config.requirements import Requirements
from reflux.contexts.base import TeacherPrompt
from reflux.inspection.finding import Finding
from reflux.models.flow.sde import kl_weight, step_logp, step_moments
from reflux.runtime.services import Services
from reflux.teachers.base import TeacherRequest
from reflux.types import Attempt, FlowRollout, Group, Rollout, Target, VelocityTarget

# s: float32 on both sides; float16 against bfloat16 autocast
SHARES = {"cpu": 1e-4, "cuda": 0.02}
SIGMAS = 5.0
# of a float32 log-prob, which is a sum over D: relative, and for each value's distance in widths
ROUNDING = 2.0**-22


def before(cfg: RunConfig) -> Iterator[Finding]:
    """The grid that student and teachers share. ModelError where a model is none."""
    from reflux.models.flow.load import outline_flow

    acting = cfg.sampler.generation
    if not acting.grids:
        return
    outline = outline_flow(cfg.learner.model, "learner.model")
    t_S = outline.grid(acting.grids[0])
    steps = -np.diff(t_S)
    text = f"{acting.grids[0]} steps of {steps.min():.3g} to {steps.max():.3g} from t = 1 to {t_S[-1]:g}, guidance {acting.guidance:g}"
    yield Finding("ok", "grid", text)


def acted(learner: Any, groups: Sequence[Group]) -> Iterator[Finding]:
    """What was drawn, and parity."""
    rollouts = [_rollout(attempt) for group in groups for attempt in group]
    first = rollouts[0]
    shape = " x ".join(map(str, first.image.shape))
    yield Finding(
        "ok",
        "images",
        f"{len(rollouts)} of {shape} pixels drawn in {first.length} steps, {first.x_SD.shape[1]} latent "
        "values",
    )
    yield _parity(learner, groups)


def _parity(learner: Any, groups: Sequence[Group]) -> Finding:
    """The learner's velocities at the stored states give the log-probs that the sampler recorded; without
    noise, the very steps.
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
        f"sampler and learner disagree by at most {worst:.2g} of what velocities {share:g} apart would "
        f"explain, at step {position} (from "
        f"0; median gap {np.median(np.concatenate(gaps)):.2g} {unit})"
    )
    if worst <= 1:
        return Finding("ok", "parity", text)
    return Finding(
        "failed",
        "parity",
        text + ". All steps off usually means another precision or guidance, the first alone another grid.",
    )


def _log_prob_gap(rollout: FlowRollout, v_TD: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """(|difference of log-probs|, its bound), [T], nats; computed in float64."""
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
    """(|step taken - step that v makes|, its bound), [T], as shares of the state's length: of the ODE, whose
    steps have no log-prob.
    """
    dt_T = np.abs(np.diff(rollout.t_S))
    size_T = np.linalg.norm(rollout.x_SD[1:], axis=1)
    gap_T = np.linalg.norm(np.diff(rollout.x_SD, axis=0) - v_TD * np.diff(rollout.t_S)[:, None], axis=1)
    return gap_T / size_T, share * dt_T * np.linalg.norm(v_TD, axis=1) / size_T + ROUNDING


def alive(name: str, learner: Any, groups: Sequence[Group]) -> Finding:
    """A teacher that says what the student says anyway, or nothing at all, teaches nothing. What is not
    finite it refuses itself.
    """
    attempts = [attempt for group in groups for attempt in group]
    silent = sum(attempt.target(name) is None for attempt in attempts)
    answered = ((attempt, attempt.target(name), v_TD) for attempt, v_TD in learner.velocities(groups))
    distances = [
        _distance(attempt.rollout, target, v_TD) for attempt, target, v_TD in answered if target is not None
    ]
    if silent:
        text = (
            f"'{name}' said nothing about {silent} of {len(attempts)} attempts (their routes are not its own)"
        )
        return Finding("warning", "teacher", text)
    apart = float(np.mean(distances)) if distances else 0.0
    if apart < 1e-6:
        text = f"'{name}' says the student's very velocities: an anchor to where the student begins does, else its weights are not loaded"
        return Finding("warning", "teacher", text)
    return Finding(
        "ok",
        "teacher",
        f"'{name}' answers; its velocities are {apart:.1%} of their length away from the student's",
    )


def _distance(rollout: Rollout, target: Target | None, v_TD: np.ndarray) -> float:
    """Mean over the counted steps of |teacher's velocity - student's| / |student's|."""
    rows_T = rollout.mask_T
    assert isinstance(target, VelocityTarget)
    return float((np.linalg.norm(target.v_TD - v_TD, axis=1) / np.linalg.norm(v_TD, axis=1))[rows_T].mean())


async def at_identity(
    context: PartContext, services: Services, learner: Any, groups: Sequence[Group]
) -> Finding:
    """A teacher that is the student must be at distance zero from it."""
    from reflux.teachers.flow import Flow
    from reflux.teachers.flow_engine import FlowTeacher

    share = SHARES.get(learner.model.device.type, SHARES["cuda"])
    answers = FlowTeacher(Flow(context.student.model), context, services, learner.model)
    attempts = [attempt for group in groups for attempt in group]
    requests = [
        TeacherRequest(attempt.rollout, TeacherPrompt(attempt.rollout.prompt.messages), Requirements())
        for attempt in attempts
    ]
    found = {
        id(attempt): answer.target
        for attempt, answer in zip(attempts, await answers.score(requests), strict=True)
    }
    worst = max(
        _distance(attempt.rollout, found[id(attempt)], v_TD) for attempt, v_TD in learner.velocities(groups)
    )
    text = (
        f"the student as its own teacher is {worst:.1e} of its velocities away from itself (bound {share:g})"
    )
    return Finding("ok" if worst <= share else "failed", "zero at identity", text)


def _rollout(attempt: Attempt) -> FlowRollout:
    assert isinstance(attempt.rollout, FlowRollout)
    return attempt.rollout
