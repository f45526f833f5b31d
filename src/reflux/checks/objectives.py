"""Rules about objectives: each teacher must offer the target that the objective needs."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig
from reflux.config.registry import kind_of
from reflux.config.requirements import Requirements
from reflux.objectives.base import Objective
from reflux.teachers.names import objective_teachers, offered, unknown
from reflux.types import FlowRollout, GivenTarget, HiddenTarget, SampledTarget, TopKTarget, VelocityTarget

_OFFERED = {
    HiddenTarget: "hidden states (the full distribution)",
    TopKTarget: "a top-k list",
    GivenTarget: "log-probs at the student's most likely tokens",
    SampledTarget: "the sampled token's log-prob",
    VelocityTarget: "the velocity at each denoising step",
}


def problems(cfg: RunConfig) -> Iterator[str]:
    for index, objective in enumerate(cfg.objectives):
        yield from _objective(cfg, f"objectives[{index}]", objective)
        yield from _without_lists(cfg, f"objectives[{index}]", objective)
    yield from _variance(cfg)


def _objective(cfg: RunConfig, where: str, objective: Objective) -> Iterator[str]:
    if objective.teacher is None:
        return
    if objective.teacher != "behaviour" and objective.teacher not in objective_teachers(cfg):
        yield unknown(cfg, f"{where}.teacher", objective.teacher, or_said=True)
        return
    offers = offered(cfg, objective.teacher)
    if not offers & set(objective.accepts):
        kinds = " or ".join(_OFFERED[kind] for kind in objective.accepts if kind in _OFFERED)
        said = ", ".join(_OFFERED[kind] for kind in sorted(offers, key=str) if kind in _OFFERED)
        yield (
            f"{where}: {_called(objective)} needs {kinds}, but teacher '{objective.teacher}' offers "
            f"{said or 'nothing'}. "
            f"{_remedy(cfg, objective)}."
        )


def _without_lists(cfg: RunConfig, where: str, objective: Objective) -> Iterator[str]:
    """Only a sampler that samples from the student records lists of its most likely tokens."""
    if cfg.sampler.on_policy or cfg.sampler.rollouts is FlowRollout:
        return
    if (objective.requirements | _listed(cfg, objective)).behaviour:
        yield (
            f"{where}: {_called(objective)} with the teacher '{objective.teacher}' needs the most likely "
            "tokens of the policy that sampled, and the attempts of sampler "
            f"'{kind_of('samplers', cfg.sampler)}' have no such lists. Use a local teacher."
        )


def listed(cfg: RunConfig) -> Iterator[Requirements]:
    """What objectives require besides, because their teacher does not offer the full distribution."""
    return (_listed(cfg, objective) for objective in cfg.objectives)


def _listed(cfg: RunConfig, objective: Objective) -> Requirements:
    known = objective.teacher is None or HiddenTarget in offered(cfg, objective.teacher)
    return Requirements() if known else objective.listed


def _called(objective: Objective) -> str:
    """An objective's kind, with the key that determines which target it needs."""
    kind = kind_of("objectives", objective)
    return f"{kind} with {objective.setting}" if objective.setting else kind


def _remedy(cfg: RunConfig, objective: Objective) -> str:
    return 'For images use kind = "velocity_kl"' if cfg.learner.rollouts is FlowRollout else objective.remedy


def _variance(cfg: RunConfig) -> Iterator[str]:
    if not cfg.log_variance:
        return
    sampled = [(index, objective) for index, objective in enumerate(cfg.objectives) if objective.samples]
    if not sampled:
        yield (
            "log_variance = true measures the variance of a sampled gradient, and no objective has one. "
            'Use kind = "sampled_kl", or '
            "log_variance = false."
        )
    for index, objective in sampled:
        offers = offered(cfg, objective.teacher) if objective.teacher else set()
        if offers and HiddenTarget not in offers:
            yield (
                "log_variance = true needs the full distribution of the teacher of every sampled_kl, "
                f"but objectives[{index}] "
                f"has the teacher '{objective.teacher}', which does not offer it. Use a local teacher, or "
                "log_variance = false."
            )
