"""f-OPD: attempts of an older student count less, the more student and teacher have changed since."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.requirements import Requirements
from reflux.config.step_context import StepContext
from reflux.contexts.replay import F_OPD
from reflux.credit.base import CreditPart
from reflux.metrics.values import EffectiveShare
from reflux.models.heads import Heads
from reflux.samplers.flow import without_noise
from reflux.teachers.names import unless_known
from reflux.types import Attempt, Credit, Group

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

# Drifts this far below 0 are rounding. A lower one is a mistake.
ROUNDING = 1e-6
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def freshness(
    lag: int,
    rollout_drift: float,
    supervision_drift: float = 0.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    lag_power: float = 1.0,
) -> float:
    """f = (lag + 1)^-lag_power * exp(-(alpha sqrt(rollout_drift) + beta sqrt(supervision_drift))), in [0, 1].

    lag: policy versions between sampling and learning. The drifts are mean KLs in nats per position, of the
    current against the older model. The square root bounds the total variation (Pinsker). 1 only without lag
    and without drift; 0 for an infinite drift whose coefficient is positive. Raises ValueError for a negative
    lag or coefficient, for a drift below -1e-6 (above it is rounding and counts as 0), and for NaN.
    arXiv 2605.17862.
    """
    values = {"alpha": alpha, "beta": beta, "lag_power": lag_power, "lag": lag}
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    spent = 0.0
    for name, coefficient, drift in (
        ("rollout_drift", alpha, rollout_drift),
        ("supervision_drift", beta, supervision_drift),
    ):
        if not drift >= -ROUNDING:
            raise ValueError(f"{name} is a KL in nats and must be at least 0, got {drift}")
        # A coefficient of 0 ignores its drift, also an infinite one.
        spent += coefficient * math.sqrt(max(0.0, drift)) if coefficient else 0.0
    return (lag + 1) ** -lag_power * math.exp(-spent)


def weight(f: float, floor: float) -> float:
    """max(0, f - floor). Raises ValueError unless f is in [0, 1] and floor in [0, 1)."""
    if not (0 <= f <= 1 and 0 <= floor < 1):
        raise ValueError(f"f must lie in [0, 1] and floor in [0, 1), got {f} and {floor}")
    return max(0.0, f - floor)


@dataclass(frozen=True, config=STRICT)
class Freshness(CreditPart):
    """Weight max(0, f - `floor`) on all positions of an attempt, with f = (lag + 1)^(-`lag_power`) * exp(-(
    `alpha` sqrt(D_roll) + `beta` sqrt(D_sup))).

    lag: policy versions between the sampling of the attempt and this step. D_roll: KL(student now || student
    that sampled), D_sup: KL(teacher in its present context || in the context when it first scored the
    attempt), both as means over the chosen positions of the attempt, in nats. At lag 0, and with `alpha` 0,
    D_roll is 0 by definition and nothing is computed for it. While the context is unchanged D_sup is 0, and
    the teacher is not asked again; where it has changed, the loss uses the new answer. The weight is a
    constant: no gradient flows through it. It is not divided by the sum of the weights, so a stale batch has
    a small gradient. The learner's optimiser is AdamW, which divides by the size of recent gradients. So a
    factor that is the same in all steps does not change the weights of the student, and a batch in which few
    attempts have a weight above 0 still makes a step of the usual size. `effective` and `zero` show this.

    `drift` exact: D_roll from the `k` most likely tokens of the policy that sampled and one bucket for all
    others, at most the full KL and equal to it where `k` covers the vocabulary. Beside a rule that asks the
    teacher about the current student's own tokens, D_roll is a lower bound from the lists of both students.
    sampled: the mean of rho log rho - rho + 1 with rho = p_now / p_then of the sampled token, which needs no
    lists and is noisy; its mean is the KL only where tokens are sampled at temperature 1 and top_p 1. Images
    have "exact" alone, from their velocities. `rescale` divides the weight by 1 - `floor`, so that a fresh
    attempt weighs 1.

    An attempt without an answer of the teacher that was asked, or without a finite drift, has weight 0. With
    `lag_power`, `alpha`, `beta` and `floor` all 0 every other weight is 1 (neutral), and so is it at lag 0
    with an unchanged context and `floor` 0.

    Notes, over attempts with chosen positions: `freshness` (mean f), `aligned` (share with both drifts),
    `rollout_drift` and `supervision_drift` (nats, over those that have them), `lag`, `zero` (share of weight
    0) and `effective` ((sum w)^2 / (n sum w^2)). arXiv 2605.17862, no official code. The paper does not state
    alpha, beta and the floor, nor whether the weight is detached.
    """

    when: ClassVar[str] = (
        "Sampling runs ahead of training (`max_staleness` above 0) and the run becomes unstable. Compare it "
        "with the same recipe without the rule first, because a divergence is computed with the current "
        "student anyway."
    )
    measures_freshness: ClassVar[bool] = True

    teacher: str = "main"
    # listed tokens of the policy that sampled, for drift "exact"
    k: Annotated[int, Field(ge=1)] = 100
    alpha: Finite = 1.0
    beta: Finite = 1.0
    # subtracted from f: an attempt counts while f is above it
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lag_power: Finite = 1.0
    drift: Literal["exact", "sampled"] = "exact"
    rescale: bool = False

    gives_offsets = False
    min_group = 1

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        return (F_OPD,)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        yield from unless_known(cfg, f"{where}.teacher", self.teacher)
        if self.floor and cfg.loss_aggregation == "token-mean-weighted":
            yield (
                f'{where}: loss_aggregation = "token-mean-weighted" does not count positions of weight 0, so '
                'stale attempts would raise the weight of the others. Use "token-mean" or '
                '"seq-mean-token-mean".'
            )
        if not cfg.sampler.on_policy:
            yield (
                f"{where} compares the student with the policy that sampled, and sampler "
                f"'{kind_of('samplers', cfg.sampler)}' gives attempts that the student did not sample. "
                "Remove the rule."
            )
        if cfg.sampler.on_policy and (why := without_noise(cfg)):
            yield (
                f"{where}: {why}, so the KL of two velocities is infinite. Use a noise_level above 0, such "
                "as 0.7."
            )
        if self.floor and (cfg.max_staleness + 1) ** -self.lag_power <= self.floor:
            yield (
                f"{where}.floor = {self.floor:g} gives every attempt at max_staleness = {cfg.max_staleness} "
                f"the weight 0, also without any drift. Use max_staleness = {self.most_lag} or less, or a "
                "lower floor."
            )

    @property
    def most_lag(self) -> int:
        """The largest lag at which an attempt without drift has a weight above 0, for a floor above 0."""
        return math.ceil(round(self.floor ** (-1 / self.lag_power), 9)) - 2

    @property
    def requirements(self) -> Requirements:
        if not self.alpha:
            return Requirements(supervision_drift=True)
        if self.drift == "exact":
            return Requirements(behaviour=self.k, now_at_behaviour=True, supervision_drift=True)
        return Requirements(now_topk=1, supervision_drift=True)

    def __call__(self, group: Group, step_context: StepContext) -> list[Credit]:
        return [self._share(attempt, step_context.version) for attempt in group]

    def _share(self, attempt: Attempt, version: int) -> Credit:
        rollout = attempt.rollout
        if rollout.finish == "error" or not rollout.mask_T.any():
            return Credit()
        lag = version - rollout.version
        drifts = {
            "rollout_drift": self._rollout_drift(attempt, version) if lag and self.alpha else 0.0,
            "supervision_drift": self._supervision_drift(attempt),
        }
        known = {name: drift for name, drift in drifts.items() if drift is not None}
        f = 0.0
        if len(known) == len(drifts):
            f = freshness(lag, **known, alpha=self.alpha, beta=self.beta, lag_power=self.lag_power)
        w = weight(f, self.floor) / (1 - self.floor if self.rescale else 1)
        finite = {name: drift for name, drift in known.items() if math.isfinite(drift)}
        return Credit(
            weight_T=w,
            notes={
                "freshness": f,
                "aligned": float(len(finite) == len(drifts)),
                "lag": float(lag),
                "zero": float(w == 0),
                "effective": EffectiveShare.of(w),
                **finite,
            },
            detail={
                "lag": lag,
                "freshness": round(f, 5),
                **{name: round(x, 6) for name, x in finite.items()},
            },
        )

    def _rollout_drift(self, attempt: Attempt, version: int) -> float | None:
        """D_roll in nats; None where one of the two policies was not recorded."""
        rollout, now = attempt.rollout, attempt.now
        if now is None:
            return None
        drift_T = None
        if self.drift == "exact" and rollout.behaviour is not None:
            # Lists and velocities need no output head.
            drift_T = now.drift_T(rollout.behaviour, rollout, Heads())
        elif self.drift == "sampled" and now.logp_T is not None:
            log_rho_T = now.logp_T.astype(np.float64) - rollout.policy_logp_T
            # rho log rho is 0 at rho = 0.
            least_T = np.maximum(log_rho_T, -700.0)
            drift_T = np.exp(least_T) * least_T - np.expm1(least_T)
        if drift_T is not None and rollout.version_T is not None:
            # A position that the current policy sampled has none, also where rounding gives one.
            drift_T = np.where(rollout.version_T == version, 0.0, drift_T)
        return _mean(drift_T, rollout.mask_T)

    def _supervision_drift(self, attempt: Attempt) -> float | None:
        """D_sup in nats; None where the teacher that was asked has no target, or no comparable one."""
        answer = attempt.answers.get(self.teacher)
        if answer is None:
            # The teacher does not serve this prompt.
            return 0.0
        if answer.target is None:
            return None
        return 0.0 if answer.previous is None else _mean(answer.drift_T, attempt.rollout.mask_T)


def _mean(drift_T: np.ndarray | None, mask_T: np.ndarray) -> float | None:
    """The mean over chosen positions, without those that have no number; None where no position is left."""
    if drift_T is None:
        return None
    known_N = drift_T[mask_T & ~np.isnan(drift_T)]
    return float(known_N.mean()) if len(known_N) else None
