"""The outputs of a model along one attempt, in five classes. Each class holds only what the model gave.
`types.py` re-exports these classes.

Each class of targets implements the same methods, so callers do not test its type. `heads` are the output
heads of this process, the matrices that map hidden states to logits (`reflux.models.heads.Heads`); only
hidden states need them. `logp_T` are the log-probs of the sampled tokens where they are known without a head,
else None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reflux.models.heads import Heads
    from reflux.types import Rollout, Target


class _Known:
    """The methods of every target. The defaults are those of a target with only the sampled tokens'
    log-probs.
    """

    __slots__ = ()

    teacher: str
    logp_T: Any

    @property
    def head_key(self) -> str | None:
        """Key of the head that turns `rows` into logits; None where no head is needed."""
        return None

    @property
    def signature(self) -> tuple[str, str | int | None]:
        """Targets with the same signature may share a micro-batch."""
        return (type(self).__name__, None)

    def rows(self, rows_N: np.ndarray) -> dict[str, Tensor]:
        """The columns of this target at the positions `rows_N`, by name, on the host. A micro-batch
        concatenates the columns of its items.
        """
        return {"logp_N": _rows(self.logp_T, rows_N)}

    def outputs(self, columns: Mapping[str, Tensor]) -> Any:
        """The outputs that objectives read (`loss.outputs`), from the columns that `rows` gave. ValueError
        where an output head or the state of a flow is needed as well.
        """
        raise ValueError(
            f"the rows of a {type(self).__name__} give no outputs without a head or a flow's state"
        )

    def sampled_logp_T(self, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        """Log-probs of the sampled tokens, nats; None where this target has none."""
        return self.logp_T

    def logp_at(self, ids_TK: np.ndarray, heads: Heads) -> np.ndarray:
        """Log-probs at given ids, [T, K], nats. ValueError where the log-prob of one of the ids is not known,
        because an unknown log-prob is not a low one.
        """
        raise ValueError(
            f"a teacher's log-probs at given tokens are needed, but a {type(self).__name__} has none. "
            "Use a local teacher."
        )

    def kl_T(self, other: Target, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        """KL(this || other) at each position, nats. Exact where both are hidden states, or velocities of a
        rollout with noise; else the sampled estimate log p - log q of the KL. None where one of the two
        targets has no log-probs.
        """
        own_T, other_T = (target.sampled_logp_T(rollout, heads) for target in (self, other))
        return None if own_T is None or other_T is None else own_T - other_T

    def drift_T(self, other: Target, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        """KL(this || other) of two outputs of one model, or of one model that was shown two contexts; >= 0 up
        to rounding, nats, [T]. Never an estimate from the sampled token, so None where no more is known.
        Exact of hidden states and of velocities; of lists see `loss.listed_kl`.
        """
        return None

    def uniformity(self, heads: Heads) -> float | None:
        """The mean entropy divided by the largest possible entropy, log V; None where it is not known."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTarget(_Known):
    """Only the log-probs of the tokens that were sampled."""

    teacher: str
    logp_T: np.ndarray

    def outputs(self, columns: Mapping[str, Tensor]) -> Any:
        from reflux.loss.outputs import SampledLogprobs

        return SampledLogprobs(**columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTarget(_Known):
    """Log-probs at K listed ids and at the sampled token. The mass of the other ids is one tail bucket. K =
    V is the full distribution.
    """

    teacher: str
    ids_TK: np.ndarray
    logp_TK: np.ndarray
    logp_T: np.ndarray

    @property
    def signature(self) -> tuple[str, str | int | None]:
        return (type(self).__name__, self.ids_TK.shape[1])

    def rows(self, rows_N: np.ndarray) -> dict[str, Tensor]:
        columns = {"logp_N": self.logp_T, "ids_NK": self.ids_TK, "logp_NK": self.logp_TK}
        return {name: _rows(column, rows_N) for name, column in columns.items()}

    def outputs(self, columns: Mapping[str, Tensor]) -> Any:
        from reflux.loss.outputs import TopKLogprobs

        return TopKLogprobs(**columns)

    def logp_at(self, ids_TK: np.ndarray, heads: Heads) -> np.ndarray:
        size = 1 + max(int(ids.max(initial=0)) for ids in (ids_TK, self.ids_TK))
        full_TV = np.full((len(ids_TK), size), np.nan)
        np.put_along_axis(full_TV, self.ids_TK, self.logp_TK, axis=1)
        logp_TK = np.take_along_axis(full_TV, ids_TK, axis=1)
        if np.isnan(logp_TK).any():
            raise ValueError(
                f"teacher '{self.teacher}' lists its own most likely tokens, and some of the student's are "
                "not among them. Their probability is unknown, which does not mean low. "
                f"Use a teacher that gives log-probs at given ids, such as 'local'."
            )
        return logp_TK

    def drift_T(self, other: Target, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        from reflux.loss.listed_kl import listed_kl

        if not isinstance(other, TopKTarget):
            return None
        return listed_kl(self.ids_TK, self.logp_TK, other.ids_TK, other.logp_TK)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenTarget(TopKTarget):
    """A TopKTarget at ids that the student listed: its K most likely tokens when it sampled. The log-probs
    belong to the full distribution, so the tail 1 - sum exp(logp_TK) is exact up to rounding.
    """

    def outputs(self, columns: Mapping[str, Tensor]) -> Any:
        from reflux.loss.outputs import GivenLogprobs

        return GivenLogprobs(**columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTarget(_Known):
    """The last hidden states (on CPU), and the key of the output head that turns them into the full
    distribution.

    logp_T is None unless it was requested at scoring time. The learner fills it into the record when it
    applies the head.
    """

    teacher: str
    h_TH: torch.Tensor
    # a key of `Heads`
    head: str
    logp_T: np.ndarray | None = None

    @property
    def head_key(self) -> str | None:
        return self.head

    @property
    def signature(self) -> tuple[str, str | int | None]:
        return (type(self).__name__, self.head)

    def rows(self, rows_N: np.ndarray) -> dict[str, Tensor]:
        return {"h_NH": _rows(self.h_TH, rows_N)}

    def sampled_logp_T(self, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        from reflux.types import TokenRollout

        if self.logp_T is not None or not isinstance(rollout, TokenRollout):
            return self.logp_T
        return self.logp_at(rollout.tokens_T[:, None], heads)[:, 0]

    def logp_at(self, ids_TK: np.ndarray, heads: Heads) -> np.ndarray:
        import torch

        head = heads[self.head]
        return head.logp_at(self.h_TH.to(head.device), torch.from_numpy(ids_TK).to(head.device)).cpu().numpy()

    def kl_T(self, other: Target, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        if not isinstance(other, HiddenTarget):
            return _Known.kl_T(self, other, rollout, heads)
        from reflux.kernels.head import kl_of

        return kl_of(heads[self.head], self.h_TH, heads[other.head], other.h_TH).cpu().numpy()

    def drift_T(self, other: Target, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        if not isinstance(other, HiddenTarget):
            return None
        kl_T = self.kl_T(other, rollout, heads)
        # Below 0 it is rounding over a large vocabulary.
        return None if kl_T is None else np.maximum(kl_T, 0.0)

    def uniformity(self, heads: Heads) -> float | None:
        logp_TV = heads[self.head].logits(self.h_TH).float().log_softmax(-1)
        return float(-(logp_TV.exp() * logp_TV).sum(-1).mean()) / float(np.log(logp_TV.shape[-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class VelocityTarget(_Known):
    """A flow's velocity at each step; NaN where the student did not choose."""

    teacher: str
    # float32, [T, D]
    v_TD: np.ndarray

    logp_T: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def rows(self, rows_N: np.ndarray) -> dict[str, Tensor]:
        return {"v_ND": _rows(self.v_TD, rows_N)}

    def kl_T(self, other: Target, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        """w |v - v_other|^2 of each step, >= 0, with w from `models.flow.sde.kl_weight`. None without noise,
        because the KL is infinite there.
        """
        from reflux.models.flow.sde import kl_weight
        from reflux.types import FlowRollout

        if (
            not isinstance(other, VelocityTarget)
            or not isinstance(rollout, FlowRollout)
            or not rollout.noise_level
        ):
            return None
        weight_T = kl_weight(
            rollout.t_S[:-1].astype(np.float64), np.diff(rollout.t_S).astype(np.float64), rollout.noise_level
        )
        return weight_T * ((self.v_TD.astype(np.float64) - other.v_TD) ** 2).sum(1)

    def drift_T(self, other: Target, rollout: Rollout, heads: Heads) -> np.ndarray | None:
        return self.kl_T(other, rollout, heads)


def _rows(column: Any, rows_N: np.ndarray) -> Tensor:
    import torch

    return (
        column[torch.from_numpy(rows_N)]
        if isinstance(column, torch.Tensor)
        else torch.from_numpy(column[rows_N])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What a step computed along one attempt. Every array is float32 [T], nats, NaN at the positions that
    the step did not compute.

    logp: log-probs of the choices, by model: "student" (at this step), and each teacher by its name. kl_T:
    reverse KL to teacher "main" at each position, exact where both distributions are known, else log p -
    log q of the choice; None without "main".
    """

    logp: Mapping[str, np.ndarray] = field(default_factory=dict)
    kl_T: np.ndarray | None = None
