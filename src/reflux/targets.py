"""What a model said along one attempt, as a sum type: what it does not know is not there. `types.py` gives these names on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTarget:
    """Only the log-probs of the tokens that were sampled."""

    teacher: str
    logp_T: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTarget:
    """Log-probs at K listed ids and at the sampled token. The unlisted mass is one tail bucket; K = V is the full distribution."""

    teacher: str
    ids_TK: np.ndarray
    logp_TK: np.ndarray
    logp_T: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTarget:
    """The last hidden states (on CPU) and the output head that turns them into the full distribution.

    logp_T is None where nobody wanted it at scoring time; the learner fills the record in as it passes through the head.
    """

    teacher: str
    h_TH: torch.Tensor
    head: Any  # kernels.head.Head
    logp_T: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VelocityTarget:
    """A flow's velocity at each step; NaN where the student did not choose."""

    teacher: str
    v_TD: np.ndarray  # float32
