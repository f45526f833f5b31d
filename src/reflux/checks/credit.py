"""Credit rules: shifts that are taken, groups large enough, verdicts."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig
from reflux.config.registry import kind_of


def problems(cfg: RunConfig) -> Iterator[str]:
    yield from _shifts(cfg)
    for name, rule in cfg.credit.items():
        where = f"credit.{name}"
        if rule.min_group > cfg.group_size:
            yield f"{where} compares attempts at one prompt: it needs group_size >= {rule.min_group}, got {cfg.group_size}."
        if rule.requirements.reward and not cfg.rewards:
            yield f"{where} needs verdicts: add [rewards.verifier]."


def _shifts(cfg: RunConfig) -> Iterator[str]:
    takers = [objective for objective in cfg.objectives if objective.takes_advantage_offset]
    rules = [name for name, rule in cfg.credit.items() if rule.shifts]
    if rules and not takers:
        kinds = ", ".join(f"'{kind_of('objectives', objective)}'" for objective in cfg.objectives)
        yield (
            f"credit.{rules[0]} shifts advantages, but no objective takes a shift: {kinds} differentiates "
            "its cost itself.\n"
            f'    Use kind = "sampled_kl", or add a second [[objectives]] with kind = "policy_gradient".'
        )
    for index, objective in enumerate(cfg.objectives):
        if objective.takes_advantage_offset and objective.teacher is None and not rules:
            yield (
                f"objectives[{index}]: {kind_of('objectives', objective)} learns from shifts alone, and no "
                "credit rule gives any. "
                f"Add [credit.group_advantage] and [rewards.verifier]."
            )
