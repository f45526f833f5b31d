"""`FullLogits` by fused kernels, for tables of raw logits on a GPU.

Student and teacher of a block of rows are read together. The first quantity that is requested of either runs
one launch. It computes all quantities that a loss usually needs (`triton_rows.SUMS`). A quantity of the
student has no graph: it is a leaf of a few numbers per row. `fused_gradient` turns the derivatives by these
leaves into the gradient of the logits.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reflux.kernels.raw_table import RawTable
from reflux.kernels.triton_rows import Sums, plan, rest, statistics, top_ids
from reflux.loss.baselines import kl_value
from reflux.loss.outputs import FullLogits


@dataclass(frozen=True)
class Cost:
    """A divergence that an objective requested: its leaf, the teacher's table and the sums of its launch."""

    leaf_N: Tensor
    teacher: RawTable
    sums: Sums


@dataclass(frozen=True)
class Listed:
    """Log-probs at listed ids that an objective requested. leaf_NK has K columns, or K + 1 with a tail.
    rest_N: the logsumexp of the tail, None without a tail.
    """

    leaf_NK: Tensor
    ids_NK: Tensor
    rest_N: Tensor | None


class FusedLogits(FullLogits):
    """What student and teachers have in common."""

    # True if the quantities of this model need a gradient
    trained = False

    def __init__(self, table: RawTable, ids_N: Tensor):
        # The kernels read the ids as neighbours in memory.
        self.table, self.ids_N = table, ids_N.contiguous()

    @property
    def vocabulary(self) -> int:
        return self.table.raw_NV.shape[1]

    @cached_property
    def logits_NV(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.table.logits_NV

    @cached_property
    def logp_NV(self) -> Tensor:
        return self._leaf(self.logits_NV.log_softmax(-1))

    @cached_property
    def logp_N(self) -> Tensor:
        return self._leaf(self._own("logp"))

    @torch.no_grad()
    def top_ids(self, k: int, ordered: bool = False) -> Tensor:
        # A cap or a positive scale keeps the order.
        plain = self.table.head.scale > 0
        return top_ids(self.table.raw_NV if plain else self.logits_NV, k, ordered)

    def at(self, ids_NK: Tensor) -> Tensor:
        return self._leaf(self.table.logits_at(ids_NK) - self._own("lse")[:, None])

    def _leaf(self, value: Tensor) -> Tensor:
        return value.detach().requires_grad_(self.trained)

    def _own(self, name: str) -> Tensor:
        raise NotImplementedError


class FusedStudent(FusedLogits):
    def __init__(self, table: RawTable, teachers: Mapping[str, RawTable], ids_N: Tensor, trained: bool):
        super().__init__(table, ids_N)
        self.trained = trained
        self.teachers = {name: FusedTeacher(other, self) for name, other in teachers.items()}
        # the teacher that is read where no other one is named
        self.main = self.teachers.get("main") or next(iter(self.teachers.values()), None)
        self.costs: list[Cost] = []
        self.lists: list[Listed] = []
        self._launches: list[tuple[FusedTeacher | None, Sums]] = []
        # the last list of ids with a tail, and the tails of both models there
        self._tails: tuple[Tensor, FusedTeacher | None, tuple[Tensor, Tensor]] | None = None

    def sums(self, teacher: FusedTeacher | None, kind: str = "", share: float = 0.0) -> Sums:
        """The sums of this student and a teacher, of one kind. kind "": of any kind but "none"."""
        for one, sums in self._launches:
            if one is teacher and (
                sums.kind != "none" if not kind else (sums.kind, sums.share) == (kind, share)
            ):
                return sums
        other = self.table if teacher is None else teacher.table
        sums = statistics(self.table, other, self.ids_N, kind or "moments", share)
        self._launches.append((teacher, sums))
        return sums

    @property
    def any_sums(self) -> Sums:
        """The sums of any launch: what they say of the student alone is the same in all."""
        known = self._launches[0][1] if self._launches else None
        return known or self.sums(self.main, "" if self.main else "none")

    def _own(self, name: str) -> Tensor:
        return self.any_sums[f"student_{name}"]

    def at(self, ids_NK: Tensor) -> Tensor:
        logp_NK = super().at(ids_NK)
        self.lists.append(Listed(logp_NK, ids_NK, None))
        return logp_NK

    def with_tail(self, ids_NK: Tensor) -> Tensor:
        rest_N, _ = self.tails(self.main, ids_NK)
        logits_NM = torch.cat([self.table.logits_at(ids_NK), rest_N[:, None]], dim=-1)
        logp_NM = self._leaf(logits_NM - self._own("lse")[:, None])
        self.lists.append(Listed(logp_NM, ids_NK, rest_N))
        return logp_NM

    def tails(self, teacher: FusedTeacher | None, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The logsumexp of the tails of this student and a teacher."""
        if self._tails is None or self._tails[0] is not ids_NK or self._tails[1] is not teacher:
            other = self.table if teacher is None else teacher.table
            self._tails = ids_NK, teacher, rest(self.table, other, ids_NK)
        return self._tails[2]

    def divergence(self, teacher: FullLogits, kind: str, weight: float | None = None) -> Tensor:
        teacher = self._fused(teacher)
        kind, share = plan(kind, weight)
        if kind == "itself":
            return self._own("lse").new_zeros(len(self.ids_N))
        sums = self.sums(teacher, kind, share)
        leaf_N = self._leaf(sums["cost"])
        self.costs.append(Cost(leaf_N, teacher.table, sums))
        return leaf_N

    def kl(self, teacher: FullLogits) -> Tensor:
        return self.sums(self._fused(teacher))["kl"]

    def topk_kl_value(self, teacher: FullLogits, k: int) -> Tensor:
        if k >= self.vocabulary:
            return -self.kl(teacher)
        ids_NK = self.top_ids(k)
        # By logits: the log-probs of the list are normalised again, so the logsumexp is not needed.
        own_NK, other_NK = (
            model.table.logits_at(ids_NK).log_softmax(-1) for model in (self, self._fused(teacher))
        )
        return kl_value(own_NK, other_NK)

    def minimum_variance_value(self, teacher: FullLogits) -> Tensor:
        """E_p[r w] / E_p[w] = 2 E_p[(1 - p) r] / E_p[1 - p] - E_p[r], with r = log q - log p."""
        sums = self.sums(self._fused(teacher), "moments")
        mean_N, kl_N = sums["cost"], sums["kl"]
        value_N = 2 * sums["slopes"] / mean_N + kl_N
        return value_N.masked_fill(kl_N == torch.inf, -torch.inf).masked_fill(mean_N <= 0, 0)

    def entropy(self) -> Tensor:
        known = [sums for _, sums in self._launches if sums.kind != "none"]
        return (known[0] if known else self.sums(self.main))["entropy"]

    @staticmethod
    def _fused(teacher: FullLogits) -> FusedTeacher:
        assert isinstance(teacher, FusedTeacher)
        return teacher


class FusedTeacher(FusedLogits):
    def __init__(self, table: RawTable, student: FusedStudent):
        super().__init__(table, student.ids_N)
        # Weak, so that the tables are freed as soon as the student is, and not by the garbage collector.
        self.student = weakref.proxy(student)

    def _own(self, name: str) -> Tensor:
        return self.student.sums(self)[f"teacher_{name}"]

    def with_tail(self, ids_NK: Tensor) -> Tensor:
        _, rest_N = self.student.tails(self, ids_NK)
        logits_NM = torch.cat([self.table.logits_at(ids_NK), rest_N[:, None]], dim=-1)
        return logits_NM - self._own("lse")[:, None]
