"""The table [health]: when the alarms of a run are raised, and which of them end it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT

AlarmName = Literal[
    "length_inflation",
    "length_limited",
    "entropy_collapse",
    "uniform_teacher",
    "starved_teacher",
    "stalled_sampler",
    "small_effective_sample",
    "ratio_outside",
    "disk_nearly_full",
    "no_checkpoint",
    "falling_evaluation",
]
Share = Annotated[float, Field(ge=0, le=1)]
Above = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, config=STRICT)
class Health:
    """The thresholds of the alarms. An alarm is raised when its condition begins to hold, and ends when the
    condition no longer holds. Alarms read what a run records anyway, and change nothing that it computes.
    """

    # alarms that end the run: it saves a checkpoint and stops when one of them begins
    stop_on: tuple[AlarmName, ...] = ()
    # alarms that are never raised
    skip: tuple[AlarmName, ...] = ()
    # the optimiser steps over which the numbers of steps are averaged
    window: Annotated[int, Field(ge=1)] = 10
    # length_inflation: the mean answer has this many times the tokens of the first `window` steps
    length_growth: Annotated[float, Field(gt=1)] = 2.0
    # length_limited: at least this share of the answers ends at the length limit
    limited_share: Share = 0.5
    # entropy_collapse: the student's entropy is at most this share of that of the first `window` steps
    entropy_share: Share = 0.1
    # uniform_teacher: the standard deviation of the teacher's log-probs of the sampled tokens is at most this
    # share of their mean
    teacher_spread: Share = 0.25
    # uniform_teacher: the mean of minus these log-probs is at least this, nats per token
    teacher_nats: Above = 1.0
    # starved_teacher: at least this share of the attempts has no target from the teacher
    starved_share: Share = 0.9
    # stalled_sampler: sampling took this many times the median of the earlier steps
    stall_factor: Annotated[float, Field(gt=1)] = 5.0
    # stalled_sampler: sampling took at least so many seconds
    stall_s: Above = 60.0
    # small_effective_sample: the effective share of the attempts, (sum w)^2 / (n sum w^2), is at most this
    effective_share: Share = 0.25
    # ratio_outside: at least this share of the importance ratios is outside its bounds
    outside_share: Share = 0.2
    # disk_nearly_full: the free space holds fewer than so many checkpoints with the student
    disk_checkpoints: Above = 3.0
    # no_checkpoint: the steps since the last checkpoint took at least so many hours
    checkpoint_hours: Above = 2.0
    # falling_evaluation: the newest so many evaluations are all below the best one before them
    fall_evaluations: Annotated[int, Field(ge=1)] = 2

    def __post_init__(self) -> None:
        both = sorted({*self.stop_on} & {*self.skip})
        if both:
            raise ValueError(
                f"{' and '.join(both)}: an alarm in skip is never raised, so it cannot be in stop_on. Remove "
                "it from one of the two lists."
            )
