"""Rules about credit: advantage offsets need an objective that uses them; group size; rewards."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig
from reflux.config.registry import kind_of


def problems(cfg: RunConfig) -> Iterator[str]:
    yield from _shifts(cfg)
    for name, rule in cfg.credit.items():
        where = f"credit.{name}"
        if rule.min_group > cfg.group_size:
            yield (
                f"{where} compares the attempts at one prompt, so it needs group_size >= {rule.min_group}, "
                f"got {cfg.group_size}."
            )
        if rule.requirements.reward and not cfg.rewards:
            yield f"{where} needs rewards. Add [rewards.verifier]."
    yield from _refresh(cfg)


def _refresh(cfg: RunConfig) -> Iterator[str]:
    measured = any(rule.measures_freshness for rule in cfg.credit.values())
    if cfg.refresh is not None and cfg.refresh.below is not None and not measured:
        yield (
            "refresh.below is compared with the freshness of a batch, which no credit rule measures. Add "
            '[credit.freshness], or set refresh.below = "none" to refresh every `every` steps.'
        )


def _shifts(cfg: RunConfig) -> Iterator[str]:
    takers = [objective for objective in cfg.objectives if objective.takes_advantage_offset]
    rules = [name for name, rule in cfg.credit.items() if rule.gives_offsets]
    if rules and not takers:
        kinds = ", ".join(f"'{kind_of('objectives', objective)}'" for objective in cfg.objectives)
        yield (
            f"credit.{rules[0]} sets advantage offsets, but no objective uses them: {kinds} differentiates "
            "its cost directly.\n"
            f'    Use kind = "sampled_kl", or add a second [[objectives]] with kind = "policy_gradient".'
        )
    for index, objective in enumerate(cfg.objectives):
        if objective.takes_advantage_offset and objective.teacher is None and not rules:
            yield (
                f"objectives[{index}]: {kind_of('objectives', objective)} learns only from advantage "
                "offsets, and no credit rule sets any. "
                f"Add [credit.group_advantage] and [rewards.verifier]."
            )
