"""Policy gradient whose advantage comes from the credit rules alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.requirements import Requirements
from reflux.loss.term import Rows
from reflux.objectives.base import ObjectivePart
from reflux.objectives.ratio import Clip, Ratio, check_ratio, outside, score_cost
from reflux.objectives.ratio_rules import drawn_elsewhere, ratio_papers, under_lag
from reflux.objectives.sampled_kl import check_coef

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.config.recipe import RunConfig

DAPO = Paper(
    "dapo",
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    "2503.14476",
    2025,
    "Yu, Qiying and others",
)


@dataclass(frozen=True, config=STRICT)
class PolicyGradient(ObjectivePart):
    """Policy gradient whose advantage is the advantage offset of the credit rules.

    With credit `group_advantage` this is group-relative policy gradient, similar to GRPO.

    Cost per token: -min(rho A, clip(rho, 1 - clip[0], 1 + clip[1]) A), with A the advantage offset and rho =
    p(a) / behaviour(a). With ratio "none" the cost is -A log p(a). behaviour(a) is the probability with which
    the token was drawn, with temperature and top-p applied. At a temperature other than 1 the ratio therefore
    differs from 1 even at the first step, and the clip binds more often. A position whose advantage offset is
    0 costs exactly 0.

    A dead group is one in which no attempt has an offset other than 0, such as a group whose rewards are all
    equal. It has no gradient. `count_dead_groups` false leaves the attempts of dead groups out of the
    denominator of this objective, so that the gradient of the other groups does not shrink where many are
    dead. The denominators of other objectives do not change. With loss_aggregation "token-mean-weighted" an
    attempt without offsets is not counted anyway. Dead groups are only left out: no other prompts are sampled
    in their place, as the dynamic sampling of DAPO (arXiv 2503.14476) does.

    There is no teacher, so this objective is exempt from law 2 of the tests (cost 0 at
    identity, where student = teacher).
    """

    coef: float = 1.0
    ratio: Literal["clip", "none"] = "clip"
    clip: tuple[float, float] = (0.2, 0.2)
    # false: groups without any advantage are not counted in the denominator of this objective
    count_dead_groups: bool = True

    teacher = None
    takes_advantage_offset: ClassVar[bool] = True
    accepts = ()

    def __post_init__(self) -> None:
        check_coef(self.coef)
        check_ratio(self.clip)

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        yield from ratio_papers(self.ratio, cfg)
        if not self.count_dead_groups:
            yield DAPO

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return under_lag(where, kind_of("objectives", self), self.ratio, "clip", cfg)

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        yield from drawn_elsewhere(where, self.ratio, "clip", cfg)
        if not self.count_dead_groups and cfg.loss_aggregation == "token-mean-weighted":
            yield (
                f"{where}.count_dead_groups = false has no effect with loss_aggregation = "
                '"token-mean-weighted", which counts no attempt without an advantage.'
            )

    @property
    def skips_dead_groups(self) -> bool:
        return not self.count_dead_groups

    @property
    def requirements(self) -> Requirements:
        return Requirements()

    def __call__(self, rows: Rows[Any]) -> Tensor:
        return score_cost(*self._arguments(rows))

    def outside(self, rows: Rows[Any]) -> Tensor | None:
        """True where the clip binds, [N]. None for ratio "none"."""
        return outside(*self._arguments(rows))

    def _arguments(self, rows: Rows[Any]) -> tuple[Tensor, Tensor, Tensor, Ratio, Clip, float]:
        """The arguments of `score_cost` and `outside`. The last, ratio_cap, has no effect on these ratios."""
        advantage_N, behaviour_logp_N = rows.advantage_offset_N, rows.behaviour_logp_N
        return advantage_N, rows.student.logp_N, behaviour_logp_N, self.ratio, self.clip, 1.0
