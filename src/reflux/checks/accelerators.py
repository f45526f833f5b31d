"""Accelerators: what they compare weights by must be there."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.accelerators.extrapolate import Extrapolate
from reflux.checks.teachers import heard, tables_of, unknown
from reflux.config import RunConfig


def problems(cfg: RunConfig) -> Iterator[str]:
    accelerator = cfg.accelerator
    if accelerator is not None and vars(cfg.learner).get("average") is not None:
        yield (
            "learner.average is what would be evaluated and exported, and a jump moves the weights but not their average: the jump would "
            "hardly be seen. Leave out learner.average, or the accelerator."
        )
    if not isinstance(accelerator, Extrapolate) or accelerator.score != "minus_kl":
        return
    if accelerator.teacher not in heard(cfg):
        yield unknown(cfg, "accelerator.teacher", accelerator.teacher)
    for table in tables_of(cfg, accelerator.teacher):
        teacher = cfg.teachers[table]
        if teacher.follows:
            yield (
                f'accelerator.score = "minus_kl" compares candidates with teachers.{table}, which follows the student. Name a teacher that '
                f'stays, or use score = "accuracy".'
            )
        if teacher.context.min_group > accelerator.samples:
            yield (
                f'accelerator.score = "minus_kl" asks teachers.{table} about {accelerator.samples} answer(s) to a prompt, and its context '
                f"needs {teacher.context.min_group}. Raise accelerator.samples."
            )
        if teacher.context.wants.reward:
            yield (
                f'accelerator.score = "minus_kl" asks teachers.{table} about answers without verdicts, and its context sorts attempts by '
                f'their verdicts. Use score = "accuracy", or name another teacher.'
            )
