"""The refusals, the advice and the papers that the importance ratio of an objective causes in a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from reflux.config.papers import Paper
from reflux.config.registry import kind_of
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


def off_policy(cfg: RunConfig) -> bool:
    """True if attempts may have been sampled by another policy than the current student, with log-probs that
    a ratio can divide by: at max_staleness > 0, and with attempts that were made elsewhere.
    """
    return cfg.max_staleness > 0 or (cfg.sampler.recorded_logp and not cfg.sampler.on_policy)


def ratio_papers(ratio: Ratio, cfg: RunConfig) -> Iterator[Paper]:
    """The papers of an objective's setting `ratio`: that of clipping in any run, and that of truncation only
    if attempts may be off-policy, because otherwise nothing is truncated.
    """
    if ratio == "clip":
        yield PPO
    if ratio == "truncated" and off_policy(cfg):
        yield IMPALA


def under_lag(where: str, kind: str, ratio: Ratio, usual: Ratio, cfg: RunConfig) -> Iterator[str]:
    """A refusal if attempts may be off-policy and a sampled objective uses no ratio. where: the path of the
    objective in the recipe. kind: the objective's kind. usual: the ratio that the text recommends.
    """
    if ratio != "none" or not off_policy(cfg):
        return
    if not cfg.sampler.on_policy:
        yield (
            f'{where}: {kind} with ratio = "none" is biased on attempts that another policy sampled, as '
            f"those of sampler '{kind_of('samplers', cfg.sampler)}'. Use ratio = \"{usual}\"."
        )
    else:
        yield (
            f'{where}: {kind} with ratio = "none" is biased on attempts of an older student, and '
            f'max_staleness is {cfg.max_staleness}. Use ratio = "{usual}".'
        )


def drawn_elsewhere(where: str, ratio: Ratio, usual: Ratio, cfg: RunConfig) -> Iterator[str]:
    """Advice about the ratio if attempts are sampled with a temperature or top-p other than 1. The arguments
    are those of `under_lag`.
    """
    draw = cfg.draw(0)
    if not cfg.sampler.on_policy or (draw.temperature == 1 and draw.top_p == 1):
        return
    at = f"temperature = {draw.temperature:g} and top_p = {draw.top_p:g}"
    if ratio == "none":
        yield (
            f'{where}: ratio = "none" does not correct for attempts drawn at {at}; ratio = "{usual}" does, '
            "within its bound."
        )
    if ratio == "clip":
        yield (
            f"{where}: at {at} the ratio p(a) / behaviour(a) is not near 1 even at the first step, so ratio "
            '= "clip" removes the gradient of many tokens; the metric ratio_outside_share gives their share.'
        )


def idle(objective: object, where: str, needed: Mapping[str, tuple[bool, str]]) -> Iterator[str]:
    """Advice about fields of an objective that differ from their default but have no effect. where: the path
    of the objective in the recipe. needed: for each field, whether it has an effect, and the setting because
    of which it has none.
    """
    for entry in dataclasses.fields(objective):  # type: ignore[arg-type]
        at_work, beside = needed.get(entry.name, (True, ""))
        if not at_work and getattr(objective, entry.name) != entry.default:
            yield f"{where}.{entry.name} has no effect with {beside}."
