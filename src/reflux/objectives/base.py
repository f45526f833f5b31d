"""An objective: a cost per position.

A frozen value called with `Rows` (N packed positions, what the student and each teacher say there) that returns cost_N in nats.
Position-local: row n's cost depends on row n alone. It never divides, weights or masks: that is `loss.py`'s work, and only its. A
score-function objective takes shifts: it adds `rows.shift_N` to its advantage.

What a model says at N rows comes in one of three classes, matching the targets of `types.py`; each answers what it can:

    logp_N            log-prob of the sampled token                         all three
    at(ids_NK)        log-probs at given ids                                FullSays
    ids_NK, logp_NK   listed ids and their log-probs                        ListedSays
    logp_NV           log-probs of the whole vocabulary, >= float32         FullSays
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

from reflux.types import Target, Wants

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SampledSays:
    """Only the sampled token's log-prob is known."""

    logp_N: Tensor


@dataclass
class ListedSays:
    """K listed ids per row, the sampled token's log-prob, and one tail bucket for the rest."""

    ids_NK: Tensor
    logp_NK: Tensor
    logp_N: Tensor


class FullSays:
    """The whole distribution, from logits of any float type; log-softmax is at least float32 and made once, shared by all objectives."""

    def __init__(self, logits_NV: Tensor, ids_N: Tensor):
        self.logits_NV = logits_NV
        self.ids_N = ids_N

    @cached_property
    def logp_NV(self) -> Tensor:
        narrow = self.logits_NV.element_size() < 4
        return (self.logits_NV.float() if narrow else self.logits_NV).log_softmax(-1)

    @cached_property
    def logp_N(self) -> Tensor:
        return self.at(self.ids_N[:, None])[:, 0]

    def at(self, ids_NK: Tensor) -> Tensor:
        return self.logp_NV.gather(-1, ids_NK)


Says = SampledSays | ListedSays | FullSays


@dataclass
class Rows:
    """N packed positions of one chunk. Everything but `student` is a constant; gradients flow through `student` alone."""

    ids_N: Tensor  # the sampled tokens
    student: FullSays
    teachers: dict[str, Says]  # by teacher name; "said" is the student as it acted
    behaviour_logp_N: Tensor  # recorded when sampled
    shift_N: Tensor
    peers_advantage: dict[str, Tensor] = field(default_factory=dict)  # group baselines, made by loss.py where asked for


class Objective(Protocol):
    takes_shift: ClassVar[bool]

    @property
    def teacher(self) -> str | None:
        """Whose word it needs: "main", another name, "said", or None."""
        ...

    @property
    def coef(self) -> float: ...

    @property
    def accepts(self) -> tuple[type[Target], ...]: ...

    @property
    def wants(self) -> Wants: ...

    def __call__(self, rows: Rows) -> Tensor:
        """cost_N, nats."""
        ...
