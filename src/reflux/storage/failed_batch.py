"""The batch of a refused step, whole: its lines, and of images the states and velocities, which no line has
room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reflux.storage import attempt_log, files
from reflux.types import Attempt, FlowRollout, Group, VelocityTarget

# of the file; the step from 1 follows
NAME = "failed-batch-step-"


def keep(path: Path, groups: Sequence[Group], step: int, why: str) -> Path:
    """Write `path`, one line an attempt (both of its lines in one, and `why`), in place of what was there,
    and return it.

    Of flow attempts a file beside it, of the same name in .npz, holds for line number n, from 0, the arrays
    `n/x_SD`, `n/image` and the velocities `n/v_TD/<who>`: each teacher by its name, `behaviour` the student
    when it acted, `now` as it learned.
    """
    attempts = [attempt for group in groups for attempt in group]
    arrays = {
        f"{row}/{name}": array
        for row, attempt in enumerate(attempts)
        for name, array in _arrays(attempt).items()
    }
    beside = path.with_suffix(".npz")
    for old in (path, beside):
        old.unlink(missing_ok=True)
    if arrays:
        np.savez(beside, **arrays)  # type: ignore[arg-type]
    files.append_lines(
        path, [{**attempt_log.arrived(a, step), **attempt_log.learned(a, step), "why": why} for a in attempts]
    )
    return path


def _arrays(attempt: Attempt) -> dict[str, np.ndarray]:
    rollout = attempt.rollout
    if not isinstance(rollout, FlowRollout):
        return {}
    told = {
        **{name: answer.target for name, answer in attempt.answers.items()},
        "behaviour": rollout.behaviour,
        "now": attempt.now,
    }
    velocities = {
        f"v_TD/{who}": target.v_TD for who, target in told.items() if isinstance(target, VelocityTarget)
    }
    return {"x_SD": rollout.x_SD, "image": rollout.image, **velocities}
