"""Write the groups of a failed step: the lines of all attempts and, for images, the states and velocities as
arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reflux.storage import attempt_log, files
from reflux.types import Attempt, FlowRollout, Group, VelocityTarget

# start of the file's name; the step number, from 1, follows
NAME = "failed-batch-step-"


def keep(path: Path, groups: Sequence[Group], step: int, why: str) -> Path:
    """Write the groups to the file `path` and return `path`; an old file is replaced. Each attempt is one
    line with the fields of both of its lines in attempts.jsonl, and the reason `why`.

    For flow attempts a second file with the suffix .npz holds arrays. For line number n, from 0, these are
    `n/x_SD`, `n/image` and the velocities `n/v_TD/<who>`. <who> is a teacher's name, `behaviour`
    (the policy that sampled) or `now` (the student at the step).
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
        path, [{**attempt_log.arrived(a), **attempt_log.learned(a, step), "why": why} for a in attempts]
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
