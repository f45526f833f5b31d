"""The exact divergence at each position, or its top-k form. The gradient flows through the student's
log-probs.
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
from reflux.objectives.ratio_rules import idle, off_policy, ratio_papers
from reflux.objectives.sampled_kl import check_coef
from reflux.types import GivenTarget, HiddenTarget, Target, TopKTarget

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
    """divergence(student, teacher) at each position, in nats (`tv`: in [0, 1]). It is 0 at identity (student
    = teacher).

    The choice of the token adds no sampling noise to the gradient. `divergence` names a function of
    `reflux.loss.divergences`. `beta` is its mixing weight: beta of jsd (default 0.5; 0 is the forward KL and
    1 the reverse KL, as in GKD, arXiv 2306.13649), alpha of the skew KLs (default 0.1, DistiLLM, arXiv
    2402.03898), alpha of `alpha` (default 0.5, Amari's family). The other divergences have no mixing weight
    and refuse it. `tv` as a loss: arXiv 2307.15190.

    `support` gives the tokens that are compared. full: the whole vocabulary. student: the student's `k`
    most likely tokens in the current forward pass (their ids are constants), plus ONE bucket with all
    remaining mass. Both models use the same tokens. If the teacher gives log-probs at listed tokens only
    (a served teacher), these are the k most likely tokens of the policy that sampled. teacher: the same
    at the teacher's k most likely tokens. If the teacher gave only a list, the mass of its bucket is 1
    minus the listed mass, and at least `tail_floor`. With a local teacher `tail_floor` has no effect.
    union: the k most likely tokens of both models together, each token once (up to 2k), and one bucket.
    "union" needs a local teacher, because a list has no log-probs at the student's ids. With the bucket,
    all three are at most the full divergence, and they are biased inside the tail only. k >= V gives the
    full divergence exactly.

    `tail` bucket: as above. renormalised: no bucket. Each model's probabilities on the listed tokens are
    divided by their sum, as in the top-k losses of ms-swift, of NeMo-RL and of vOPD's code. This is BIASED,
    and its optimum moves: the mass of the tail is dropped, so a student that is right on the list up to a
    factor costs 0, whatever its other probabilities are. This tail is offered for comparison. k >= V gives
    the full divergence here too.

    `ratio` truncated: the cost is multiplied by min(p(a) / behaviour(a), `ratio_cap`), detached. Other
    trainers use this to correct for a sampler that differs from the learner. behaviour(a) is the probability
    with which the token was drawn, with temperature and top-p applied. The divergence already sums over all
    tokens at each prefix. So while no ratio is capped, the ratio leaves the expected gradient unchanged and
    only adds noise. Where a ratio is capped, or where top-p excluded tokens, the prefix counts less. The
    ratio cannot correct which prefixes are visited.
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
                f"beta is the mixing weight of {', '.join(MIXED)}; '{self.divergence}' has no such weight. "
                "Remove beta"
            )
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        if self.beta == 1 and self.divergence.startswith("skew"):
            raise ValueError(
                f"'{self.divergence}' with beta = 1 compares a model with itself: it is 0 everywhere and has "
                "no gradient"
            )
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.tail == "renormalised" and self.support == "full":
            raise ValueError(
                "tail = 'renormalised' divides by the mass of a list, and support = 'full' has no list. Use "
                "tail = 'bucket'"
            )
        if self.tail == "renormalised" and self.support != "union" and self.k == 1:
            raise ValueError(
                "with k = 1 and tail = 'renormalised' the one token has probability 1 under any model, so "
                "the cost is 0 everywhere. Use k = 2 or more"
            )
        check_ratio(ratio_cap=self.ratio_cap)
        if not 0 < self.tail_floor < 1:
            raise ValueError(f"tail_floor is a probability mass between 0 and 1, got {self.tail_floor}")

    def papers(self, cfg: RunConfig) -> Iterable[Paper]:
        if self.divergence.startswith("skew"):
            yield DISTILLM
        if self.divergence == "tv":
            yield FDISTILL
        yield from ratio_papers(self.ratio, cfg)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.ratio != "none" and not (cfg.sampler.on_policy or cfg.sampler.recorded_logp):
            yield (
                f'{where}: {kind_of("objectives", self)} with ratio = "{self.ratio}" divides by the '
                "probability with which the sampler drew a token, but sampler "
                f"'{kind_of('samplers', cfg.sampler)}' gives answers that it did not draw. "
                'Use ratio = "none".'
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        at_work = {
            "k": (self.support != "full", "support = 'full'"),
            "ratio_cap": (self.ratio == "truncated", "ratio = 'none'"),
        }
        yield from idle(self, where, at_work)
        if self.tail == "renormalised":
            yield (
                f'{where}: tail = "renormalised" drops the mass outside the list, so the optimum moves; '
                'tail = "bucket" keeps it.'
            )
        if self.ratio != "none" and not off_policy(cfg):
            yield (
                f'{where}: ratio = "{self.ratio}" at max_staleness = 0 is 1 up to rounding; ratio = "none" '
                "gives the same cost with less computation."
            )

    @property
    def setting(self) -> str:
        return "" if self.support == "full" else f'support = "{self.support}"'

    @property
    def reverse_kl(self) -> bool:
        return self.divergence == "reverse"

    @property
    def accepts(self) -> tuple[type[Target], ...]:
        lists: dict[str, tuple[type[Target], ...]] = {"teacher": (TopKTarget,), "student": (GivenTarget,)}
        return (HiddenTarget, *lists.get(self.support, ()))

    @property
    def requirements(self) -> Requirements:
        return Requirements(behaviour=self.k) if self.teacher == "behaviour" else Requirements()

    @property
    def listed(self) -> Requirements:
        at_student = self.support == "student" and self.teacher != "behaviour"
        return Requirements(behaviour=self.k, candidates=self.k) if at_student else Requirements()

    def __call__(self, rows: Rows[FullLogits]) -> Tensor:
        cost_N = self._cost(rows.student, rows.teachers[self.teacher])
        if self.ratio == "none":
            return cost_N
        return cost_N * truncated_ratio(rows.student.logp_N, rows.behaviour_logp_N, self.ratio_cap)

    def outside(self, rows: Rows[FullLogits]) -> Tensor | None:
        """True where the ratio is above its cap, [N]. None for ratio "none"."""
        return (
            None
            if self.ratio == "none"
            else above_cap(rows.student.logp_N, rows.behaviour_logp_N, self.ratio_cap)
        )

    def _cost(self, student: FullLogits, teacher: Outputs) -> Tensor:
        from reflux.loss.divergences import DIVERGENCES
        from reflux.loss.outputs import FullLogits, GivenLogprobs, TopKLogprobs

        weight = () if self.beta is None else (self.beta,)
        lists = {"teacher": TopKLogprobs, "student": GivenLogprobs}
        if isinstance(teacher, TopKLogprobs) and isinstance(teacher, lists.get(self.support, ())):
            one, other = self._at_list(student, teacher)
            return DIVERGENCES[self.divergence](one, other, *weight)
        if not isinstance(teacher, FullLogits):
            raise ValueError(
                f"support = '{self.support}' needs the log-probs of teacher '{self.teacher}' at any token, "
                "but it gave them for its top-k tokens only or for the sampled token only. With top-k tokens "
                "use support = 'teacher'. With the sampled token use kind = 'sampled_kl'. A local teacher "
                f"gives them at any token."
            )
        if self.support == "full" or self.k >= student.vocabulary:
            return student.divergence(teacher, self.divergence, self.beta)
        one, other = self._listed(student, teacher)
        return DIVERGENCES[self.divergence](one, other.detach(), *weight)

    def _listed(self, student: FullLogits, teacher: FullLogits) -> tuple[Tensor, Tensor]:
        """The log-probs of both models at one list of tokens, where the probabilities sum to 1."""
        from reflux.loss.divergences import renormalised, union, with_tail

        models = {"student": (student,), "teacher": (teacher,), "union": (student, teacher)}[self.support]
        ids = [model.top_ids(self.k) for model in models]
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
            # The list is longer than k if another part requires a longer list.
            whose_NK = logp_NK if self.support == "teacher" else student.at(ids_NK).detach()
            order_NK = whose_NK.topk(self.k, dim=-1).indices
            logp_NK, ids_NK = logp_NK.gather(-1, order_NK), ids_NK.gather(-1, order_NK)
        if ids_NK.shape[1] == student.vocabulary:
            # The list is the whole vocabulary, so neither model has a tail.
            return with_tail(student.logp_NV, ids_NK)[:, :-1], logp_NK
        if self.tail == "bucket":
            return with_tail(student.logp_NV, ids_NK), with_tail_listed(logp_NK, self.tail_floor)
        if ids_NK.shape[1] == 1:
            raise ValueError(
                f"teacher '{self.teacher}' lists one token, and with tail = 'renormalised' its probability "
                "is 1. Use tail = 'bucket'"
            )
        return renormalised(student.logp_NV, ids_NK), logp_NK.log_softmax(-1)
