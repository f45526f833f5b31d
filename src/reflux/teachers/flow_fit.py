"""Checks that a flow teacher has the student's times, states and prompts. They read configuration files only,
before any weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from reflux.errors import ModelError
from reflux.models.flow.load import outline_flow
from reflux.models.locations import locate

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.models.flow.flow_model import FlowModel
    from reflux.runtime.services import Services
    from reflux.teachers.flow import Flow

# The grid size to compare if the sampler defines no grid.
STEPS = 10
ROUNDING = 1e-6


def refuse_misfit(cfg: Flow, context: PartContext, services: Services) -> None:
    """ModelError that names the first difference between teacher and student."""
    student_name, path = context.student.model, f"teachers.{context.name}.model"
    where = locate(student_name, "learner.model")
    if locate(cfg.model, path) == where:
        return
    student = services.shared(("flow outline", where), lambda: outline_flow(student_name, "learner.model"))
    teacher, generation = outline_flow(cfg.model, path), context.generation
    grids = generation.grids or (STEPS,)
    for difference in (
        *_times(teacher, student, grids),
        *_states(teacher, student, generation.pixels),
        *_prompts(teacher, student),
    ):
        raise ModelError(f"{path}: {cfg.model} {difference}")


def _times(teacher: FlowModel, student: FlowModel, grids: tuple[int, ...]) -> Iterator[str]:
    theirs, ours = teacher.scheduler["num_train_timesteps"], student.scheduler["num_train_timesteps"]
    if theirs != ours:
        yield (
            f"was trained with num_train_timesteps = {theirs}, and the student with {ours}. Use a teacher "
            "with the student's times."
        )
    for steps in grids:
        if not np.allclose(teacher.grid(steps), student.grid(steps), rtol=0, atol=ROUNDING):
            yield (
                f"has another grid of times than the student (shift {teacher.scheduler.get('shift')} instead "
                f"of {student.scheduler.get('shift')}; {steps} steps begin with {_first(teacher, steps)} "
                f"instead of {_first(student, steps)}). Use a teacher with the student's scheduler."
            )


def _first(model: FlowModel, steps: int) -> str:
    return ", ".join(f"{t:.4g}" for t in model.grid(steps)[:3])


def _states(teacher: FlowModel, student: FlowModel, pixels: int) -> Iterator[str]:
    theirs, ours = teacher.shape(), student.shape()
    if theirs[0] != ours[0] or (not pixels and theirs != ours):
        yield (
            f"has states of {' x '.join(map(str, theirs))} (channels, height, width), and the student has "
            f"states of {' x '.join(map(str, ours))}: the teacher's velocity is not defined at the student's "
            "states. Use a teacher of the student's family and size."
        )


def _prompts(teacher: FlowModel, student: FlowModel) -> Iterator[str]:
    theirs, ours = teacher.net.prompts, student.net.prompts
    if theirs is None:
        return
    if ours is None:
        yield (
            "knows only the prompts of its learned prompt table, and the student reads any text. Use a "
            "teacher with text encoders."
        )
        return
    unknown = [text for text in ours.texts if text not in theirs.texts]
    if unknown:
        yield (
            f"does not know {len(unknown)} of the student's prompts, such as '{unknown[0]}'. Use a teacher "
            "that was trained from the same model, or one that knows all of them."
        )
