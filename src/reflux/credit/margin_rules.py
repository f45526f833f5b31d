"""What a run must be for the rule `margin` to mean something in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reflux.config.registry import kind_of
from reflux.teachers.names import unless_known

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig
    from reflux.credit.margin import Margin


def refusals(rule: Margin, where: str, cfg: RunConfig) -> Iterator[str]:
    """Sentences with the remedy."""
    yield from _one_margin(rule, cfg)
    yield from _levelled(rule, where, cfg)
    yield from unless_known(cfg, f"{where}.teacher", rule.teacher)
    if rule.student == "behaviour" and not cfg.sampler.on_policy:
        yield (
            f"{where} compares the teacher with the student's own log-probs, and this sampler "
            f"('{kind_of('samplers', cfg.sampler)}') gives "
            f'answers it did not draw. Use student = "now".'
        )


def _one_margin(rule: Margin, cfg: RunConfig) -> Iterator[str]:
    """Told once, by the first of them."""
    margins = {name: other for name, other in cfg.credit.items() if isinstance(other, type(rule))}
    if next(iter(margins.values())) is rule and {other.action for other in margins.values()} == {
        "mask",
        "shift",
    }:
        yield f"credit.{' and credit.'.join(margins)}: a margin is kept by shifts or by masks, never by both. Keep one of them."


def _levelled(rule: Margin, where: str, cfg: RunConfig) -> Iterator[str]:
    """The level of an attempt is G + s - r per token, made to be added to r: alone it points away from the
    teacher.
    """
    takers = [objective for objective in cfg.objectives if objective.takes_advantage_offset]
    if rule.level != "attempt" or rule.action != "shift" or not takers:
        return
    taker = next((objective for objective in takers if objective.teacher is None), takers[0])
    exact = [other for other in cfg.objectives if other.reverse_kl and other.teacher == rule.teacher]
    if not (taker.reverse_kl or any(other.coef == taker.coef for other in exact)):
        yield (
            f'{where}: level = "attempt" takes each token\'s own log-ratio out again, so it must be in the '
            'loss. Use kind = "sampled_kl", '
            f"or a divergence = \"reverse\" to '{rule.teacher}' of the same coef beside `policy_gradient`."
        )
