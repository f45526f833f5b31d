"""The reverse KL between the student and a teacher at each position."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.evals.base import Asked, EvalPart
from reflux.evals.kinds import kind_of
from reflux.evals.problems import problems
from reflux.metrics.intervals import clustered_mean
from reflux.tasks.base import Split
from reflux.teachers.names import unless_known
from reflux.types import Attempt, Rollout, SampledTarget, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig
    from reflux.evals.base import Source
    from reflux.evals.evaluation import Evaluation
    from reflux.models.heads import Heads
    from reflux.teachers.collection import Teachers

# an attempt that the teacher scored, and the KL at each position
Found = tuple[Attempt, np.ndarray]


@dataclass(frozen=True, config=STRICT)
class Agreement(EvalPart):
    """Reverse KL to `teacher` on the student's own samples, an attempt for each of the first `prompts`
    prompts.

    For texts it is the mean of log p(a) - log q(a), which is unbiased. For images, which are sampled with the
    noise of training, it is the KL of each denoising step in closed form (`objectives.velocity_kl`).

    `kl_nats` has the 95% interval `low`, `high`, in nats per token or per denoising step. `by_position` is
    the same in `bins` of equal width (tokens or denoising steps). `kl_nats.<route>` is the same for each
    route, if the prompts have several. `by_teacher` is the same for each teacher table (`[teachers.NAME]`)
    with this alias, if there are several; it is null for one that scored nothing. `split` is the split of the
    prompts, and `max_tokens` the length limit. An attempt that the teacher did not score is left out, and so
    is an image sampled without noise, whose KL is infinite. If none is left, kl_nats is null.

    The interval comes from the spread between attempts, because positions of one attempt are not independent
    (`metrics.intervals.clustered_mean`: Student's t with one degree of freedom less than the number of
    attempts). With one attempt, also in one bin, there is no interval and both ends are null.
    """

    asked: ClassVar[Asked] = "always"

    prompts: int = 128
    teacher: str = "main"
    bins: int = 24
    max_tokens: int | None = None
    split: Split = "validation"

    def __post_init__(self) -> None:
        if min(self.prompts, self.bins, self.max_tokens or 1) < 1:
            raise ValueError("prompts, bins and max_tokens must be at least 1")

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        return unless_known(cfg, f"{where}.teacher", self.teacher) if cfg.teachers else ()

    async def __call__(self, evaluation: Evaluation, source: Source) -> dict[str, Any]:
        prompts = list(islice(problems(evaluation.task, self.split), self.prompts))
        teachers = evaluation.teachers
        # An evaluation that needs teachers is refused earlier if there are none.
        assert teachers is not None
        draw = replace(evaluation.draw("eval", limit=self.max_tokens), stop=())
        groups = await evaluation.groups(prompts, 1, draw)
        await teachers.score(groups, evaluation.step_context)
        found = [
            (group[0], gap)
            for group in groups
            if (gap := gap_T(group[0], self.teacher, evaluation.services.heads)) is not None
        ]
        gaps = [gap for _, gap in found]
        return {
            **_interval([_chosen(gap) for gap in gaps]),
            "attempts": len(gaps),
            "split": self.split,
            **_by_route(found),
            **self._by_teacher(teachers, found),
            "by_position": _binned(gaps, self.bins, kind_of(groups[0][0].rollout).units),
        }

    def _by_teacher(self, teachers: Teachers, found: list[Found]) -> dict[str, Any]:
        tables = [table for table, name in teachers.tables.items() if name == self.teacher]
        if len(tables) < 2:
            return {}
        gaps_by_table = {
            table: [_chosen(gap) for attempt, gap in found if attempt.answers[self.teacher].table == table]
            for table in tables
        }
        return {
            "by_teacher": {
                table: {**_interval(gaps), "attempts": len(gaps)} for table, gaps in gaps_by_table.items()
            }
        }


def gap_T(attempt: Attempt, teacher: str, heads: Heads) -> np.ndarray | None:
    """The reverse KL at each position, nats, NaN where the student did not choose. None if `teacher` gave no
    target for the attempt. heads: the output heads of the models, which compute log-probs from hidden states.

    For a text it is log p - log q of the sampled tokens, whose mean estimates the KL. Unlike credit.log_ratio
    this needs no `Requirements`: if the target has hidden states only, they go through the teacher's head
    here. For an image it is w |v_student - v_teacher|^2 >= 0, exact at the sampled states. It is None if the
    velocities were not recorded, or if the noise level is 0.
    """
    target, rollout = attempt.target(teacher), attempt.rollout
    student = (
        SampledTarget(teacher="behaviour", logp_T=_at_temperature_1(rollout))
        if isinstance(rollout, TokenRollout)
        else rollout.behaviour
    )
    if student is None or target is None:
        return None
    gap_T = student.kl_T(target, rollout, heads)
    return None if gap_T is None else np.where(rollout.mask_T, gap_T, np.nan)


def _at_temperature_1(rollout: Rollout) -> np.ndarray:
    return rollout.logp_T if rollout.logp_raw_T is None else rollout.logp_raw_T


def _chosen(gap: np.ndarray) -> np.ndarray:
    """The values without the NaN of positions that the student did not choose."""
    return gap[gap == gap]


def _by_route(found: list[Found]) -> dict[str, Any]:
    """The same numbers by route, as flat keys, if there are several routes."""
    gaps: dict[str, list[np.ndarray]] = {}
    for attempt, gap in found:
        if attempt.rollout.prompt.route is not None:
            gaps.setdefault(attempt.rollout.prompt.route, []).append(_chosen(gap))
    table: dict[str, Any] = {}
    for route in sorted(gaps) if len(gaps) > 1 else ():
        whole = _interval(gaps[route])
        ends = {f"kl_nats.{route}.{end}": whole[end] for end in ("low", "high")}
        table |= {f"kl_nats.{route}": whole["kl_nats"], **ends, f"kl_nats.{route}.attempts": len(gaps[route])}
    return table


def _interval(gaps: list[np.ndarray]) -> dict[str, float | None]:
    """Mean over positions, with an interval from the spread between attempts, because positions of one
    attempt are not independent.
    """
    return dict(zip(("kl_nats", "low", "high"), clustered_mean(gaps), strict=True))


def _binned(gaps: list[np.ndarray], bins: int, units: str) -> list[dict[str, Any]]:
    longest = max((len(gap) for gap in gaps), default=0)
    width = max(1, -(-longest // bins))
    table = []
    for start in range(0, longest, width):
        inside = [_chosen(gap[start : start + width]) for gap in gaps]
        counted = sum(len(part) for part in inside)
        if counted:
            table.append({"position": start, "width": width, units: counted, **_interval(inside)})
    return table
