"""The sampled reverse KL: a policy gradient whose reward at each token is log teacher minus log student."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from reflux.config.papers import GRPO, RLOO, Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.requirements import Requirements
from reflux.loss.term import Rows
from reflux.objectives.base import ObjectivePart
from reflux.objectives.ratio import Ratio, check_ratio, outside, score_cost
from reflux.objectives.ratio_rules import drawn_elsewhere, idle, ratio_papers, under_lag
from reflux.types import GivenTarget, HiddenTarget, SampledTarget, Target, TopKTarget

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.config.recipe import RunConfig
    from reflux.loss.outputs import FullLogits

# baselines whose values `loss.batch.plan` computes from the attempts of the group
GROUP_BASELINES = ("group_mean", "leave_one_out")

VOPD = Paper("vopd", "KL for a KL: On-Policy Distillation with Control Variate Baseline", "2605.07865", 2026)
OPTIMAL_BASELINE = Paper(
    "optimal_baseline",
    "The Optimal Reward Baseline for Gradient-Based Reinforcement Learning",
    "1301.2315",
    2013,
    "Weaver, Lex and Tao, Nigel",
)


@dataclass(frozen=True, config=STRICT)
class SampledKL(ObjectivePart):
    """Score-function estimate of the gradient of KL(student || teacher), with one sampled token per position.

    Advantage: A = log q(a) - log p(a) - value + advantage offset, detached. Cost: -A log p(a), with the ratio
    rho = p(a) / behaviour(a) (see `score_cost`). p and q are the probabilities of student and teacher at
    temperature 1. behaviour(a) is the probability with which the token was drawn, with temperature and top-p
    applied. While no bound of the ratio binds, the expected gradient at each visited prefix is exact at any
    temperature. With top-p below 1 it is the sum over the tokens inside the set of top-p alone.

    `baseline` chooses the value. A value that depends on the prefix alone leaves the expected gradient
    unchanged and affects only its variance, if top-p excludes no token. If top-p excludes tokens, the value
    times the gradient of the set's mass is added.

    - `none`: 0. This is plain on-policy distillation.
    - `kl`: -KL(p || q), the mean of the reward (vOPD, arXiv 2605.07865).
    - `topk_kl`: the same over the student's `baseline_k` most likely tokens, with each model renormalised
      there.
    - `minimum_variance`: the value per prefix with the least variance of the logit gradient (see
      `minimum_variance_value`).
    - `leave_one_out`: the mean of log q(a) - log p(a) over all chosen tokens of the OTHER attempts of the
      group, so long attempts weigh more. Here p is the behaviour policy at temperature 1. The value is 0 if
      no other attempt was scored. It follows RLOO (arXiv 2402.14740), but per token instead of per sequence.
    - `group_mean`: the same mean over all attempts of the group, including the attempt itself (as in GRPO,
      arXiv 2402.03300). BIASED: the value contains the token's own reward. For answers of one token the
      expected gradient is exactly (1 - 1/G) times the exact one, with G attempts in the group. For longer
      answers the own token counts less, but the rewards of later tokens of the same attempt enter the value,
      so the direction changes too. docs/methods.md has a table of measured biases.

    `kl`, `topk_kl` and `minimum_variance` need the teacher's whole distribution. The two group baselines need
    group_size >= 2 and the teacher's log-probs at scoring time. A local teacher then computes them twice.

    `max_gap_nats`: positions where the log-probs of student and teacher at the sampled token differ by this
    many nats or more cost exactly 0, even with an advantage offset. These positions stay in the denominator.
    Uni-OPD (arXiv 2605.03677) drops such positions at 10. BIASED: the dropped positions are those where the
    two models differ most, and with a small bound the gradient of the others can point in the opposite
    direction. Without this bound, a teacher that gives the token probability 0 causes an infinite cost.

    The cost is not a divergence: only its gradient has a meaning. At identity (student = teacher) A is the
    advantage offset.
    """

    teacher: str = "main"
    coef: float = 1.0
    baseline: Literal["none", "kl", "topk_kl", "minimum_variance", "group_mean", "leave_one_out"] = "none"
    baseline_k: int = 20
    ratio: Ratio = "truncated"
    ratio_cap: float = 5.0
    clip: tuple[float, float] = (0.2, 0.2)
    max_gap_nats: float | None = None

    takes_advantage_offset: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    remedy: ClassVar[str] = 'Use baseline = "none", or "leave_one_out" in groups, or a local teacher'

    def __post_init__(self) -> None:
        check_coef(self.coef)
        check_ratio(self.clip, self.ratio_cap)
        if self.baseline_k < 1:
            raise ValueError(f"baseline_k must be at least 1, got {self.baseline_k}")
        if self.max_gap_nats is not None and not self.max_gap_nats > 0:
            raise ValueError(
                f"max_gap_nats must be positive, got {self.max_gap_nats}. To drop no position, remove it"
            )

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        of_baseline = {
            "kl": VOPD,
            "topk_kl": VOPD,
            "minimum_variance": OPTIMAL_BASELINE,
            "leave_one_out": RLOO,
            "group_mean": GRPO,
        }
        if self.baseline in of_baseline:
            yield of_baseline[self.baseline]
        yield from ratio_papers(self.ratio, cfg)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        yield from under_lag(where, kind_of("objectives", self), self.ratio, "truncated", cfg)
        if self.group_baseline is not None and cfg.group_size < 2:
            yield (
                f'{where}: baseline = "{self.baseline}" compares attempts at one prompt: it needs '
                f'group_size >= 2, got {cfg.group_size}. Raise group_size, or use baseline = "kl", which '
                "works with one attempt per prompt."
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        by_baseline, by_ratio = f"baseline = '{self.baseline}'", f"ratio = '{self.ratio}'"
        at_work = {
            "baseline_k": (self.baseline == "topk_kl", by_baseline),
            "ratio_cap": (self.ratio == "truncated", by_ratio),
        }
        yield from idle(self, where, {**at_work, "clip": (self.ratio == "clip", by_ratio)})
        yield from drawn_elsewhere(where, self.ratio, "truncated", cfg)
        if self.baseline == "group_mean":
            yield (
                f'{where}: baseline = "group_mean" includes the attempt itself. This changes the length and '
                'the direction of the gradient; "leave_one_out" does not.'
            )

    @property
    def reverse_kl(self) -> bool:
        return True

    @property
    def setting(self) -> str:
        return "" if self.baseline == "none" else f'baseline = "{self.baseline}"'

    @property
    def group_baseline(self) -> Literal["all", "others"] | None:
        return {"group_mean": "all", "leave_one_out": "others"}.get(self.baseline)  # type: ignore[return-value]

    def variance(self, rows: Rows[Any]) -> tuple[Tensor, Tensor] | None:
        from reflux.loss.baselines import gradient_variance

        student, teacher = rows.student, rows.teachers[self.teacher]
        with_N, without_N = (
            gradient_variance(student.logp_NV, teacher.logp_NV, value) for value in (self.value(rows), 0.0)
        )
        return with_N, without_N

    @property
    def accepts(self) -> tuple[type[Target], ...]:
        anywhere = self.baseline == "none" or self.baseline in GROUP_BASELINES
        return (SampledTarget, TopKTarget, GivenTarget, HiddenTarget) if anywhere else (HiddenTarget,)

    @property
    def requirements(self) -> Requirements:
        """A teacher that offers no hidden states gives the log-prob of the sampled token with every target,
        so only the group baselines require it. The target of `behaviour` is a list, or it is absent.
        """
        return Requirements(behaviour=int(self.teacher == "behaviour"), logp=self.baseline in GROUP_BASELINES)

    def __call__(self, rows: Rows[FullLogits]) -> Tensor:
        logp_N, dropped_N = rows.student.logp_N, self._dropped(rows)
        cost_N = score_cost(
            self._advantage(rows, dropped_N),
            logp_N,
            rows.behaviour_logp_N,
            self.ratio,
            self.clip,
            self.ratio_cap,
        )
        return cost_N if dropped_N is None else cost_N.masked_fill(dropped_N, 0)

    def outside(self, rows: Rows[FullLogits]) -> Tensor | None:
        """True where the bound of the ratio binds, [N], except at dropped positions. None without a bound."""
        dropped_N = self._dropped(rows)
        # Only the clip uses the advantage. Otherwise the advantage is not computed, because a baseline over
        # the vocabulary is expensive.
        advantage_N = self._advantage(rows, dropped_N) if self.ratio == "clip" else rows.advantage_offset_N
        outside_N = outside(
            advantage_N, rows.student.logp_N, rows.behaviour_logp_N, self.ratio, self.clip, self.ratio_cap
        )
        return outside_N if outside_N is None or dropped_N is None else outside_N & ~dropped_N

    def _advantage(self, rows: Rows[FullLogits], dropped_N: Tensor | None) -> Tensor:
        advantage_N = (
            advantage(rows.student.logp_N, rows.teachers[self.teacher].logp_N, self.value(rows))
            + rows.advantage_offset_N
        )
        return advantage_N if dropped_N is None else advantage_N.masked_fill(dropped_N, 0)

    def _dropped(self, rows: Rows[FullLogits]) -> Tensor | None:
        """True where student and teacher differ by `max_gap_nats` or more, [N]. None without this bound."""
        if self.max_gap_nats is None:
            return None
        return (rows.student.logp_N - rows.teachers[self.teacher].logp_N).detach().abs() >= self.max_gap_nats

    def value(self, rows: Rows[FullLogits]) -> Tensor | float:
        """The baseline that is subtracted from the advantage, nats, [N]. 0 without a baseline."""
        if self.baseline == "none":
            return 0.0
        if self.baseline in GROUP_BASELINES:
            if rows.group_value_N is None:
                raise ValueError(
                    f"baseline = '{self.baseline}' needs rows.group_value_N, which `loss.batch.plan` "
                    f"computes from whole groups. Outside the loop use baseline = 'none' with "
                    "advantage_offset_N = -value."
                )
            return rows.group_value_N
        from reflux.loss.outputs import FullLogits

        teacher = rows.teachers[self.teacher]
        if not isinstance(teacher, FullLogits):
            raise ValueError(
                f"baseline = '{self.baseline}' needs the log-probs of teacher '{self.teacher}' at every "
                "token of the vocabulary, but it gave a list or the sampled token alone. Use baseline = "
                "'none' or 'leave_one_out', or a local teacher."
            )
        if self.baseline == "kl":
            return -rows.student.kl(teacher)
        if self.baseline == "topk_kl":
            return rows.student.topk_kl_value(teacher, self.baseline_k)
        return rows.student.minimum_variance_value(teacher)


def advantage(student_logp_N: Tensor, teacher_logp_N: Tensor, value_N: Tensor | float = 0) -> Tensor:
    """teacher_logp_N - student_logp_N - value_N at the sampled tokens, detached, nats, [N]. With the
    baseline `kl`, value_N is -KL(student || teacher), so subtracting it adds the KL.
    """
    advantage_N = teacher_logp_N.detach() - student_logp_N.detach()
    return advantage_N - (value_N if isinstance(value_N, (int, float)) else value_N.detach())


def check_coef(coef: float) -> None:
    if not math.isfinite(coef):
        raise ValueError(f"coef must be a finite number, got {coef}")
