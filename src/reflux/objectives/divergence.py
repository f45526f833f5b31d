"""The exact divergence at each position, or its top-k form with a tail bucket, differentiated through the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic.dataclasses import dataclass

from reflux.objectives.base import FullSays, ListedSays, Rows, Says
from reflux.objectives.sampled_kl import check_coef
from reflux.parts import STRICT
from reflux.types import HiddenTarget, Target, TopKTarget, Wants

if TYPE_CHECKING:
    from torch import Tensor

MIXED = ("jsd", "skew_reverse", "skew_forward", "alpha")


@dataclass(frozen=True, config=STRICT)
class Divergence:
    """divergence(student, teacher) at each position: no sampling noise in the gradient, nats (`tv`: in [0, 1]), 0 at home.

    `divergence` names a function of `reflux.objectives.divergences`. `beta` is its mixing weight: jsd's beta (default 0.5; 0 is the
    forward KL, 1 the reverse, as in GKD), the skew's alpha (0.1, DistiLLM), alpha's alpha (0.5); the others have none and refuse it.

    `support` full: over the whole vocabulary. student: the student's own k most likely tokens of the current forward (constants) plus
    ONE bucket with all remaining mass, the same for both models. teacher: the same at the k most likely tokens of the teacher's list,
    the teacher's tail being 1 minus its listed mass, at least `tail_floor`, where the list is all that is known. Both are never more than
    the full divergence and are biased inside the tail only; k >= V is the full one exactly.
    """

    teacher: str = "main"
    coef: float = 1.0
    divergence: Literal["reverse", "forward", "jsd", "skew_reverse", "skew_forward", "alpha", "tv"] = "reverse"
    beta: float | None = None
    support: Literal["full", "student", "teacher"] = "full"
    k: int = 100
    tail_floor: float = 1e-7

    takes_shift: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_coef(self.coef)
        if self.beta is not None and self.divergence not in MIXED:
            raise ValueError(f"beta mixes the two models in {', '.join(MIXED)}; '{self.divergence}' has no such weight, leave it out")
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        if self.beta == 1 and self.divergence.startswith("skew"):
            raise ValueError(f"'{self.divergence}' with beta = 1 compares a model with itself: it is 0 everywhere and teaches nothing")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if not 0 < self.tail_floor < 1:
            raise ValueError(f"tail_floor is a probability mass between 0 and 1, got {self.tail_floor}")

    @property
    def accepts(self) -> tuple[type[Target], ...]:
        return (HiddenTarget, TopKTarget) if self.support == "teacher" else (HiddenTarget,)

    @property
    def wants(self) -> Wants:
        return Wants(said=self.k) if self.teacher == "said" else Wants()

    def __call__(self, rows: Rows) -> Tensor:
        from reflux.objectives.divergences import DIVERGENCES

        student, teacher = self._pair(rows.student, rows.teachers[self.teacher])
        weight = () if self.beta is None else (self.beta,)
        return DIVERGENCES[self.divergence](student, teacher.detach(), *weight)

    def _pair(self, student: FullSays, teacher: Says) -> tuple[Tensor, Tensor]:
        """Log-probs of both on one support, whose probabilities sum to 1."""
        if self.support == "teacher" and isinstance(teacher, ListedSays):
            return self._at_list(student, teacher)
        if not isinstance(teacher, FullSays):
            raise ValueError(
                f"support = '{self.support}' needs teacher '{self.teacher}' at any token, but it gave a list or the sampled token alone. "
                f"Use support = 'teacher' for a list, kind = 'sampled_kl' for sampled tokens, or a local teacher."
            )
        if self.support == "full" or self.k >= student.logp_NV.shape[1]:
            return student.logp_NV, teacher.logp_NV
        from reflux.objectives.divergences import with_tail

        whose = student if self.support == "student" else teacher
        ids_NK = whose.logp_NV.detach().topk(self.k, dim=-1, sorted=False).indices
        return with_tail(student.logp_NV, ids_NK, check=False), with_tail(teacher.logp_NV, ids_NK, check=False)

    def _at_list(self, student: FullSays, teacher: ListedSays) -> tuple[Tensor, Tensor]:
        from reflux.objectives.divergences import with_tail, with_tail_listed

        logp_NK, ids_NK = teacher.logp_NK, teacher.ids_NK
        if self.k < logp_NK.shape[1]:  # another part may have asked for a longer list
            logp_NK, order_NK = logp_NK.topk(self.k, dim=-1)
            ids_NK = ids_NK.gather(-1, order_NK)
        student_logp = with_tail(student.logp_NV, ids_NK)
        if ids_NK.shape[1] == student.logp_NV.shape[1]:  # the whole vocabulary: no tail on either side
            return student_logp[:, :-1], logp_NK
        return student_logp, with_tail_listed(logp_NK, self.tail_floor)
