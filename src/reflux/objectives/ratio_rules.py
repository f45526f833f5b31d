"""What an importance ratio means for a whole run: what is refused, what is seldom meant, and to whom it is
due.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from reflux.config.papers import Paper
from reflux.objectives.ratio import Ratio

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig

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


def ratio_papers(ratio: Ratio, max_staleness: int) -> Iterator[Paper]:
    """Clipping at any staleness; truncation under staleness alone, for elsewhere nothing is truncated."""
    if ratio == "clip":
        yield PPO
    if ratio == "truncated" and max_staleness:
        yield IMPALA


def under_lag(where: str, kind: str, ratio: Ratio, usual: Ratio, cfg: RunConfig) -> Iterator[str]:
    """Why a sampled objective may not do without its ratio under staleness."""
    if cfg.max_staleness and ratio == "none":
        yield (
            f'{where}: {kind} with ratio = "none" is biased on attempts of an older student, and '
            f"max_staleness is {cfg.max_staleness}. "
            f'Use ratio = "{usual}".'
        )


def drawn_elsewhere(where: str, ratio: Ratio, usual: Ratio, cfg: RunConfig) -> Iterator[str]:
    """What a ratio does to attempts of another distribution than the student's own."""
    draw = cfg.draw(0)
    if not cfg.sampler.on_policy or (draw.temperature == 1 and draw.top_p == 1):
        return
    at = f"temperature = {draw.temperature:g} and top_p = {draw.top_p:g}"
    if ratio == "none":
        yield f'{where}: ratio = "none" does not correct for attempts drawn at {at}; ratio = "{usual}" does, within its bound.'
    if ratio == "clip":
        yield (
            f"{where}: at {at} the ratio p(a) / behaviour(a) is not near 1 even at the first step, so ratio "
            '= "clip" takes the gradient '
            f"of many tokens away; ratio_outside_share says how many."
        )


def idle(objective: object, where: str, needed: Mapping[str, tuple[bool, str]]) -> Iterator[str]:
    """Fields that were given a value and do nothing. needed: by field, is it at work, and the setting beside
    which it is not.
    """
    for entry in dataclasses.fields(objective):  # type: ignore[arg-type]
        at_work, beside = needed.get(entry.name, (True, ""))
        if not at_work and getattr(objective, entry.name) != entry.default:
            yield f"{where}.{entry.name} does nothing beside {beside}."
