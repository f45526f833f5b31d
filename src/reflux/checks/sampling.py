"""Rules about sampling: lengths, and objectives that need attempts from the student's own distribution."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig
from reflux.config.registry import kind_of
from reflux.types import FlowRollout, TokenRollout


def problems(cfg: RunConfig) -> Iterator[str]:
    yield from _lengths(cfg)
    yield from _sampling(cfg)
    yield from _overlap(cfg)
    if cfg.deterministic and not cfg.sampler.exact_rng:
        yield (
            "deterministic = true requires a run that repeats bit for bit, but sampler "
            f"'{kind_of('samplers', cfg.sampler)}' with these settings depends on timing. "
            'Use kind "hf" with turns = "together", or remove deterministic.'
        )


def _overlap(cfg: RunConfig) -> Iterator[str]:
    if cfg.steps_ahead > cfg.max_staleness:
        yield (
            f"ahead = {cfg.ahead} asks for attempts more steps in advance than max_staleness = "
            f"{cfg.max_staleness} allows. Lower ahead, or raise max_staleness."
        )
    if cfg.deterministic and cfg.max_staleness:
        yield (
            "deterministic = true requires a run that repeats bit for bit, but with max_staleness = "
            f"{cfg.max_staleness} the weights of a sampled token depend on timing. Use max_staleness = 0, or "
            "remove deterministic."
        )


def _lengths(cfg: RunConfig) -> Iterator[str]:
    for step in range(cfg.steps):
        if cfg.sampler.draw(step).max_positions < 1:
            yield (
                f"sampler: the limit of an attempt of step {step} is below 1 position. Start the schedule at "
                "1 or more."
            )
            return


def _sampling(cfg: RunConfig) -> Iterator[str]:
    sampler = cfg.sampler
    kind = kind_of("samplers", sampler)
    draw = sampler.draw(0)
    biased = draw.temperature != 1 or draw.top_p != 1
    if biased and sampler.on_policy and not sampler.allow_biased:
        yield (
            f"sampler.temperature = {draw.temperature:g} and top_p = {draw.top_p:g}: attempts from another "
            "distribution than the "
            "student's own make on-policy estimators biased. Use 1 and 1, or set sampler.allow_biased = "
            "true."
        )
    for index, objective in enumerate(cfg.objectives):
        name = f"objectives[{index}]: {kind_of('objectives', objective)}"
        if objective.takes_advantage_offset and not (sampler.on_policy or sampler.recorded_logp):
            yield (
                f"{name} needs attempts that the student sampled, but the attempts of sampler '{kind}' "
                "come from elsewhere. "
                f"Use {'velocity_kl' if sampler.rollouts is FlowRollout else 'nll or divergence'}."
            )
        if (
            objective.teacher is None
            and not objective.takes_advantage_offset
            and sampler.on_policy
            and sampler.rollouts is TokenRollout
        ):
            yield (
                f"{name} on the student's own attempts has an expected gradient of zero. Use sampler "
                "'references', or another objective."
            )
