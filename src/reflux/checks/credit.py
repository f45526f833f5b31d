"""Credit rules: shifts that are taken, groups large enough, verdicts, what teachers must answer."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.checks.teachers import heard, tables_of, unknown
from reflux.config import RunConfig
from reflux.credit.margin import Margin
from reflux.credit.release import Release
from reflux.objectives.divergence import Divergence
from reflux.objectives.sampled_kl import SampledKL
from reflux.parts import kind_of


def problems(cfg: RunConfig) -> Iterator[str]:
    yield from _shifts(cfg)
    yield from _one_margin(cfg)
    for name, rule in cfg.credit.items():
        where = f"credit.{name}"
        if rule.min_group > cfg.group_size:
            yield f"{where} compares attempts at one prompt: it needs group_size >= {rule.min_group}, got {cfg.group_size}."
        if rule.wants.reward and cfg.reward is None:
            yield f'{where} needs verdicts: add [reward] with kind = "verifier".'
        if isinstance(rule, Release):
            yield from _release(cfg, where, rule)
        if isinstance(rule, Margin):
            yield from _margin(cfg, where, rule)


def _shifts(cfg: RunConfig) -> Iterator[str]:
    takers = [objective for objective in cfg.objectives if objective.takes_shift]
    rules = [name for name, rule in cfg.credit.items() if rule.shifts]
    if rules and not takers:
        kinds = ", ".join(f"'{kind_of('objectives', objective)}'" for objective in cfg.objectives)
        yield (
            f"credit.{rules[0]} shifts advantages, but no objective takes a shift: {kinds} differentiates its cost itself.\n"
            f'    Use kind = "sampled_kl", or add a second [[objectives]] with kind = "outcome".'
        )
    for index, objective in enumerate(cfg.objectives):
        if objective.takes_shift and objective.teacher is None and not rules:
            yield (
                f"objectives[{index}]: {kind_of('objectives', objective)} learns from shifts alone, and no credit rule gives any. "
                f"Add [credit.outcome] and a [reward]."
            )


def _one_margin(cfg: RunConfig) -> Iterator[str]:
    margins = {name: rule for name, rule in cfg.credit.items() if isinstance(rule, Margin)}
    if {rule.action for rule in margins.values()} == {"mask", "shift"}:
        yield f"credit.{' and credit.'.join(margins)}: a margin is kept by shifts or by masks, never by both. Keep one of them."


def _release(cfg: RunConfig, where: str, rule: Release) -> Iterator[str]:
    if rule.rescale and cfg.normalise == "kept":
        yield (
            f'{where}: rescale gives every attempt the mass of its full length, and normalise = "kept" divides by the kept positions: the '
            f'release would count twice. Use normalise = "chosen" or "rollout_means", or {where}.rescale = false.'
        )
    if rule.teacher not in heard(cfg):
        yield unknown(cfg, f"{where}.teacher", rule.teacher)
    for table in tables_of(cfg, rule.teacher):
        if not cfg.teachers[table].at_ids:
            yield (
                f"{where} needs the teacher's log-probs at the student's {rule.k} likeliest tokens, but teachers.{table} answers with a "
                f"list of its own: a token missing from it has an unknown probability, not a low one. Use a teacher that answers at given "
                f"ids, such as a local one."
            )
    if rule.candidates == "said" and not cfg.sampler.on_policy:
        yield (
            f"{where} looks at the tokens the student was about to choose, and this sampler ('{kind_of('samplers', cfg.sampler)}') gives "
            f"answers it did not write. Use candidates = \"now\", or sampler 'hf'."
        )


def _margin(cfg: RunConfig, where: str, rule: Margin) -> Iterator[str]:
    yield from _levelled(cfg, where, rule)
    if rule.teacher not in heard(cfg):
        yield unknown(cfg, f"{where}.teacher", rule.teacher)
    if rule.student == "behaviour" and not cfg.sampler.on_policy:
        yield (
            f"{where} compares the teacher with the student's own log-probs, and this sampler ('{kind_of('samplers', cfg.sampler)}') gives "
            f'answers it did not draw. Use student = "now".'
        )


def _levelled(cfg: RunConfig, where: str, rule: Margin) -> Iterator[str]:
    """The level of an attempt is G + s - r per token, made to be added to r: alone it points away from the teacher."""
    takers = [objective for objective in cfg.objectives if objective.takes_shift]
    if rule.level != "attempt" or rule.action != "shift" or not takers:
        return
    taker = next((objective for objective in takers if objective.teacher is None), takers[0])
    exact = [o for o in cfg.objectives if isinstance(o, Divergence) and o.divergence == "reverse" and o.teacher == rule.teacher]
    if not (isinstance(taker, SampledKL) or any(o.coef == taker.coef for o in exact)):
        yield (
            f'{where}: level = "attempt" takes each token\'s own log-ratio out again, so it must be in the loss. Use kind = "sampled_kl", '
            f"or a divergence = \"reverse\" to '{rule.teacher}' of the same coef beside `outcome`."
        )
