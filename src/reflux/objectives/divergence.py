"""The exact divergence at each position, or its top-k form with a tail bucket, differentiated through the
student.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from reflux.config.papers import Paper
from reflux.config.registry import STRICT, kind_of
from reflux.config.requirements import Requirements
from reflux.loss.term import Rows
from reflux.objectives.base import ObjectivePart
from reflux.objectives.ratio import above_cap, check_ratio, truncated_ratio
from reflux.objectives.ratio_rules import idle, ratio_papers
from reflux.objectives.sampled_kl import check_coef
from reflux.types import HiddenTarget, Target, TopKTarget

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.config.recipe import RunConfig
    from reflux.loss.outputs import FullLogits, Outputs, TopKLogprobs

MIXED = ("jsd", "skew_reverse", "skew_forward", "alpha")

DISTILLM = Paper(
    "distillm",
    "DistiLLM: Towards Streamlined Distillation for Large Language Models",
    "2402.03898",
    2024,
    "Ko, Jongwoo and Kim, Sungnyun and Chen, Tianyi and Yun, Se-Young",
)
FDISTILL = Paper(
    "fdistill",
    "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    "2307.15190",
    2023,
    "Wen, Yuqiao and Li, Zichao and Du, Wenyu and Mou, Lili",
)


@dataclass(frozen=True, config=STRICT)
class Divergence(ObjectivePart):
    """divergence(student, teacher) at each position: no sampling noise in the gradient, nats (`tv`: in [0,
    1]), 0 at identity.

    `divergence` names a function of `reflux.loss.divergences`. `beta` is its mixing weight: jsd's beta
    (default 0.5; 0 is the forward KL, 1 the reverse, as in GKD, arXiv 2306.13649), the skew's alpha (0.1,
    DistiLLM, arXiv 2402.03898), alpha's alpha (0.5, Amari's family); the others have none and refuse it. `tv`
    as a loss: arXiv 2307.15190.

    `support` full: over the whole vocabulary. student: the student's own `k` most likely tokens of the
    current forward (constants) plus ONE bucket with all remaining mass, the same for both models. teacher:
    the same at the teacher's k most likely tokens; where the teacher gave nothing but a list, its tail is 1
    minus the listed mass, at least `tail_floor` (idle with a local teacher). union: the k of either model
    together, each token once (up to 2k), and one bucket; a list cannot answer at the student's ids, so this
    needs a local teacher. With the bucket all three are never more than the full divergence and biased inside
    the tail only; k >= V is the full one exactly.

    `tail` renormalised: no bucket; each model's probabilities on the listed tokens are divided by their own
    sum, as the top-k losses of ms-swift, of NeMo-RL and of vOPD's code do. BIASED, and its optimum moves: the
    tail's mass is dropped, so a student that is right on the list up to a factor costs 0 whatever it says
    elsewhere. Here for comparison; k >= V is the full divergence all the same.

    `ratio` truncated: times min(p(a) / behaviour(a), `ratio_cap`), detached, as other trainers correct for a
    sampler that is not the learner. behaviour(a) is the probability that the token was drawn with:
    temperature and top-p are in it. At each prefix the divergence sums over all actions already, so while
    nothing is capped the expected gradient is the same with and without, and only noise is added; where it is
    capped, or where top-p left tokens out, the prefix counts less. It cannot correct which prefixes are
    visited.
    """

    teacher: str = "main"
    coef: float = 1.0
    divergence: Literal["reverse", "forward", "jsd", "skew_reverse", "skew_forward", "alpha", "tv"] = (
        "reverse"
    )
    beta: float | None = None
    support: Literal["full", "student", "teacher", "union"] = "full"
    k: int = 100
    tail: Literal["bucket", "renormalised"] = "bucket"
    tail_floor: float = 1e-7
    ratio: Literal["none", "truncated"] = "none"
    ratio_cap: float = 5.0

    takes_advantage_offset: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_coef(self.coef)
        if self.beta is not None and self.divergence not in MIXED:
            raise ValueError(
                f"beta mixes the two models in {', '.join(MIXED)}; '{self.divergence}' has no such weight, "
                "leave it out"
            )
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        if self.beta == 1 and self.divergence.startswith("skew"):
            raise ValueError(
                f"'{self.divergence}' with beta = 1 compares a model with itself: it is 0 everywhere and "
                "teaches nothing"
            )
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.tail == "renormalised" and self.support == "full":
            raise ValueError(
                "tail = 'renormalised' divides by the mass of a list, and support = 'full' has none. Use "
                "tail = 'bucket'"
            )
        if self.tail == "renormalised" and self.support != "union" and self.k == 1:
            raise ValueError(
                "one token renormalised has probability 1 under any model: the cost is 0 everywhere. Use k = "
                "2 or more"
            )
        check_ratio(ratio_cap=self.ratio_cap)
        if not 0 < self.tail_floor < 1:
            raise ValueError(f"tail_floor is a probability mass between 0 and 1, got {self.tail_floor}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        if self.divergence.startswith("skew"):
            yield DISTILLM
        if self.divergence == "tv":
            yield FDISTILL
        yield from ratio_papers(self.ratio, cfg.max_staleness)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.ratio != "none" and not cfg.sampler.on_policy:
            yield (
                f'{where}: {kind_of("objectives", self)} with ratio = "{self.ratio}" divides by the '
                "probability the sampler drew with, "
                f"but sampler '{kind_of('samplers', cfg.sampler)}' gives answers it did not draw. Use ratio "
                '= "none".'
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        at_work = {
            "k": (self.support != "full", "support = 'full'"),
            "ratio_cap": (self.ratio == "truncated", "ratio = 'none'"),
        }
        yield from idle(self, where, at_work)
        if self.tail == "renormalised":
            yield f'{where}: tail = "renormalised" drops the mass outside the list, so the optimum moves; tail = "bucket" keeps it.'
        if self.ratio != "none" and not cfg.max_staleness:
            yield f'{where}: ratio = "{self.ratio}" at max_staleness = 0 is 1 up to rounding; ratio = "none" is the same for less.'

    @property
    def setting(self) -> str:
        return "" if self.support == "full" else f'support = "{self.support}"'

    @property
    def reverse_kl(self) -> bool:
        return self.divergence == "reverse"

    @property
    def accepts(self) -> tuple[type[Target], ...]:
        return (HiddenTarget, TopKTarget) if self.support == "teacher" else (HiddenTarget,)

    @property
    def requirements(self) -> Requirements:
        return Requirements(behaviour=self.k) if self.teacher == "behaviour" else Requirements()

    def __call__(self, rows: Rows[FullLogits]) -> Tensor:
        cost_N = self._cost(rows.student, rows.teachers[self.teacher])
        if self.ratio == "none":
            return cost_N
        return cost_N * truncated_ratio(rows.student.logp_N, rows.behaviour_logp_N, self.ratio_cap)

    def outside(self, rows: Rows[FullLogits]) -> Tensor | None:
        """Where the ratio is above its cap, [N]; None for ratio "none"."""
        return (
            None
            if self.ratio == "none"
            else above_cap(rows.student.logp_N, rows.behaviour_logp_N, self.ratio_cap)
        )

    def _cost(self, student: FullLogits, teacher: Outputs) -> Tensor:
        from reflux.loss.divergences import DIVERGENCES
        from reflux.loss.outputs import FullLogits, TopKLogprobs

        weight = () if self.beta is None else (self.beta,)
        if self.support == "teacher" and isinstance(teacher, TopKLogprobs):
            one, other = self._at_list(student, teacher)
            return DIVERGENCES[self.divergence](one, other, *weight)
        if not isinstance(teacher, FullLogits):
            raise ValueError(
                f"support = '{self.support}' needs teacher '{self.teacher}' at any token, but it gave a list "
                "or the sampled token alone; "
                "a stored list cannot answer at the student's ids. Use support = 'teacher' for a list, kind "
                "= 'sampled_kl' for sampled "
                f"tokens, or a local teacher."
            )
        if self.support == "full" or self.k >= student.logits_NV.shape[1]:
            return student.divergence(teacher, self.divergence, self.beta)
        one, other = self._listed(student, teacher)
        return DIVERGENCES[self.divergence](one, other.detach(), *weight)

    def _listed(self, student: FullLogits, teacher: FullLogits) -> tuple[Tensor, Tensor]:
        """Log-probs of both on one list, whose probabilities sum to 1."""
        from reflux.loss.divergences import renormalised, union, with_tail

        models = {"student": (student,), "teacher": (teacher,), "union": (student, teacher)}[self.support]
        ids = [model.logits_NV.detach().topk(self.k, dim=-1, sorted=False).indices for model in models]
        if len(ids) == 1 and self.tail == "bucket":
            return student.with_tail(ids[0]), teacher.with_tail(ids[0])
        ids_NK, repeated_NK = union(*ids) if len(ids) == 2 else (ids[0], None)
        close = with_tail if self.tail == "bucket" else renormalised
        return close(student.logp_NV, ids_NK, False, repeated_NK), close(
            teacher.logp_NV, ids_NK, False, repeated_NK
        )

    def _at_list(self, student: FullLogits, teacher: TopKLogprobs) -> tuple[Tensor, Tensor]:
        from reflux.loss.divergences import renormalised, with_tail, with_tail_listed

        logp_NK, ids_NK = teacher.logp_NK, teacher.ids_NK
        if self.k < logp_NK.shape[1]:
            # another part may have asked for a longer list
            logp_NK, order_NK = logp_NK.topk(self.k, dim=-1)
            ids_NK = ids_NK.gather(-1, order_NK)
        if ids_NK.shape[1] == student.logp_NV.shape[1]:
            # the whole vocabulary: no tail on either side
            return with_tail(student.logp_NV, ids_NK)[:, :-1], logp_NK
        if self.tail == "bucket":
            return with_tail(student.logp_NV, ids_NK), with_tail_listed(logp_NK, self.tail_floor)
        if ids_NK.shape[1] == 1:
            raise ValueError(
                f"teacher '{self.teacher}' lists one token: renormalised it has probability 1. Use tail = "
                "'bucket'"
            )
        return renormalised(student.logp_NV, ids_NK), logp_NK.log_softmax(-1)
