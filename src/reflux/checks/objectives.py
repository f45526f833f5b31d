"""Objectives: does their teacher offer what they need, and do they live on shifts that someone gives?"""

from __future__ import annotations

from collections.abc import Iterator

from reflux.checks.teachers import heard, offered, unknown
from reflux.config import RunConfig
from reflux.objectives.base import Objective
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import GROUP_BASELINES, SampledKL
from reflux.objectives.velocity_kl import VelocityKL
from reflux.parts import kind_of
from reflux.types import FlowRollout, HiddenTarget, SampledTarget, TopKTarget, VelocityTarget

_SAID = {
    HiddenTarget: "hidden states (the full distribution)",
    TopKTarget: "a top-k list",
    SampledTarget: "the sampled token's log-prob",
    VelocityTarget: "the velocity at each denoising step",
}


def problems(cfg: RunConfig) -> Iterator[str]:
    for index, objective in enumerate(cfg.objectives):
        yield from _objective(cfg, f"objectives[{index}]", objective)
    yield from _groups(cfg)
    yield from _variance(cfg)


def _objective(cfg: RunConfig, where: str, objective: Objective) -> Iterator[str]:
    if objective.teacher is None:
        return
    if objective.teacher != "said" and objective.teacher not in heard(cfg):
        yield unknown(cfg, f"{where}.teacher", objective.teacher, or_said=True)
        return
    offers = offered(cfg, objective.teacher)
    if not offers & set(objective.accepts):
        kinds = ", ".join(_SAID[kind] for kind in objective.accepts if kind in _SAID)
        said = ", ".join(_SAID[kind] for kind in sorted(offers, key=str) if kind in _SAID)
        yield (
            f"{where}: {_called(objective)} needs {kinds}, but teacher '{objective.teacher}' offers {said or 'nothing'}. "
            f"{_remedy(cfg, objective)}."
        )


def _called(objective: Objective) -> str:
    """An objective's kind, with the field that decides what it needs of its teacher."""
    kind = kind_of("objectives", objective)
    if isinstance(objective, SampledKL) and objective.baseline != "none":
        return f'{kind} with baseline = "{objective.baseline}"'
    if isinstance(objective, Divergence) and objective.support != "full":
        return f'{kind} with support = "{objective.support}"'
    return kind


def _remedy(cfg: RunConfig, objective: Objective) -> str:
    if cfg.learner.rollouts is FlowRollout:
        return 'For pictures use kind = "velocity_kl"'
    if isinstance(objective, VelocityKL):
        return 'It compares models that draw pictures; for texts use kind = "divergence" or "sampled_kl"'
    if isinstance(objective, SampledKL):
        return 'Use baseline = "none", or "leave_one_out" in groups, or a local teacher'
    return 'Use support = "teacher" where the teacher gives a list, kind = "sampled_kl" where it gives log-probs, or a local teacher'


def _groups(cfg: RunConfig) -> Iterator[str]:
    for index, objective in enumerate(cfg.objectives):
        if isinstance(objective, SampledKL) and objective.baseline in GROUP_BASELINES and cfg.group_size < 2:
            yield (
                f'objectives[{index}]: baseline = "{objective.baseline}" compares attempts at one prompt: it needs group_size >= 2, got '
                f'{cfg.group_size}. Raise group_size, or use baseline = "kl", which needs no siblings.'
            )


def _variance(cfg: RunConfig) -> Iterator[str]:
    if not cfg.log_variance:
        return
    sampled = [(index, objective) for index, objective in enumerate(cfg.objectives) if isinstance(objective, SampledKL)]
    if not sampled:
        yield (
            'log_variance = true measures the noise of the sampled gradient, and no objective samples one. Use kind = "sampled_kl", or '
            "log_variance = false."
        )
    for index, objective in sampled:
        offers = offered(cfg, objective.teacher)
        if offers and HiddenTarget not in offers:
            yield (
                f"log_variance = true needs the whole distribution of every teacher a sampled_kl listens to, but objectives[{index}] "
                f"listens to '{objective.teacher}', which does not offer it. Use a local teacher, or log_variance = false."
            )
