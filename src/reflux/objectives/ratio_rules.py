"""What an importance ratio means for a whole run: to whom it is due."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.objectives.ratio import Ratio
from reflux.papers import Paper

PPO = Paper(
    "ppo",
    "Proximal Policy Optimization Algorithms",
    "1707.06347",
    2017,
    "Schulman, John and Wolski, Filip and Dhariwal, Prafulla and Radford, Alec and Klimov, Oleg",
)
IMPALA = Paper(
    "impala",
    "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures",
    "1802.01561",
    2018,
    "Espeholt, Lasse and Soyer, Hubert and Munos, Remi and Simonyan, Karen and others",
)


def ratio_papers(ratio: Ratio, max_lag: int) -> Iterator[Paper]:
    """Clipping at any lag; truncation under lag alone, for elsewhere nothing is truncated."""
    if ratio == "clip":
        yield PPO
    if ratio == "truncated" and max_lag:
        yield IMPALA
