"""The value of a prefix taken from sibling attempts: the mean reward of their tokens. No torch: it is made
before any batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def group_values(rewards: Sequence[np.ndarray | None], leave_one_out: bool) -> list[float]:
    """Mean reward per token over the group's attempts, one value an attempt, in the unit of the reward
    (nats).

    rewards: per attempt the rewards of its chosen tokens (log q - log p at temperature 1, whatever was
    sampled from), any length; None where the attempt has no say (not scored, failed), which gives it 0.
    Rewards that are not finite are left out. Tokens count alike, so a long attempt weighs more than a short
    one.

    leave_one_out: over the tokens of the OTHER attempts, so a value depends on nothing its own attempt did,
    not even by rounding, and any estimator stays unbiased (Kool et al. 2019, "Buy 4 REINFORCE samples, get a
    baseline for free!"; arXiv 2402.14740). Otherwise over all of them, oneself included, one number for the
    whole group (as the group mean of arXiv 2402.03300): biased, see `SampledKL`. Where no other attempt has a
    finite reward there is no group to compare with: 0.
    """
    finite = [
        np.asarray(own, dtype=np.float64)[np.isfinite(own)] if own is not None else np.zeros(0)
        for own in rewards
    ]
    values = []
    for i, own in enumerate(rewards):
        others = [other for j, other in enumerate(finite) if j != i and len(other)]
        counted = others if leave_one_out else [*others, finite[i]]
        silent = own is None or not others
        values.append(
            0.0 if silent else math.fsum(r for one in counted for r in one.tolist()) / sum(map(len, counted))
        )
    return values
