"""The refusals of the credit rule `margin`: settings of a run in which the rule has no meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reflux.credit.log_ratio_rules import ratio_refusals

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig
    from reflux.credit.margin import Margin


def refusals(rule: Margin, where: str, cfg: RunConfig) -> Iterator[str]:
    """The reasons to refuse the run, each with its remedy. where: the path of the rule in the recipe."""
    yield from _one_margin(rule, cfg)
    yield from _levelled(rule, where, cfg)
    yield from ratio_refusals(where, rule.teacher, rule.student, cfg)


def _one_margin(rule: Margin, cfg: RunConfig) -> Iterator[str]:
    """Refuses margin rules with different actions. Only the first of them gives this refusal."""
    margins = {name: other for name, other in cfg.credit.items() if isinstance(other, type(rule))}
    if next(iter(margins.values())) is rule and {other.action for other in margins.values()} == {
        "mask",
        "shift",
    }:
        yield (
            f"credit.{' and credit.'.join(margins)}: one margin rule uses shifts and another masks. Keep one "
            "of them."
        )


def _levelled(rule: Margin, where: str, cfg: RunConfig) -> Iterator[str]:
    """Refuses level = "attempt" if the loss does not contain r. With this level the offset of a token is G +
    s - r, which is correct only if r is added to it. Without r its gradient points away from the teacher.
    """
    takers = [objective for objective in cfg.objectives if objective.takes_advantage_offset]
    if rule.level != "attempt" or rule.action != "shift" or not takers:
        return
    taker = next((objective for objective in takers if objective.teacher is None), takers[0])
    exact = [other for other in cfg.objectives if other.reverse_kl and other.teacher == rule.teacher]
    if not (taker.reverse_kl or any(other.coef == taker.coef for other in exact)):
        yield (
            f'{where}: level = "attempt" subtracts the log-ratio of each token, so the loss must contain it. '
            f'Use kind = "sampled_kl", or `policy_gradient` together with divergence = "reverse" to '
            f"'{rule.teacher}' with the same coef."
        )
