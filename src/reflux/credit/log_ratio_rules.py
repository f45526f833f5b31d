"""What a run must have for a credit rule that reads the log-ratio of teacher and student (`log_ratio.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reflux.config.registry import kind_of
from reflux.credit.log_ratio import Side
from reflux.teachers.names import unless_known

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig


def ratio_refusals(where: str, teacher: str, student: Side, cfg: RunConfig) -> Iterator[str]:
    """The reasons to refuse a rule that reads this log-ratio, each with its remedy. where: the path of the
    rule in the recipe.
    """
    yield from unless_known(cfg, f"{where}.teacher", teacher)
    if student == "behaviour" and not cfg.sampler.on_policy:
        yield (
            f"{where} compares the teacher with the log-probs of the student that sampled, and this sampler "
            f"('{kind_of('samplers', cfg.sampler)}') gives answers that the student did not sample. Use "
            f'student = "now".'
        )


def ratio_advice(where: str, student: Side, cfg: RunConfig) -> Iterator[str]:
    """Advice for a rule that reads this log-ratio, where the policy that sampled may be an old one."""
    if student == "behaviour" and cfg.max_staleness:
        yield (
            f'{where}: student = "behaviour" compares with the student of up to {cfg.max_staleness} '
            'steps ago; see "now".'
        )
