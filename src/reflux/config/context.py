"""The values that a part of the recipe (such as the sampler or a teacher) gets from its run. These values are
small and frozen, and can be pickled for another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reflux.config.requirements import Requirements

if TYPE_CHECKING:
    from reflux.tasks.base import Task
    from reflux.teachers.base import Teacher


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """The student's model and how its prompts are rendered. The sampler, the learner and a teacher that is
    the student share these values.
    """

    # a folder, a hub id or a shipped model such as reflux:student
    model: str
    # a system prompt, added to conversations that have none
    system: str | None = None
    # arguments of the chat template
    template: Mapping[str, Any] = field(default_factory=dict)
    # a text at the end of every prompt, for the student and its teachers
    prompt_suffix: str | None = None
    trust_remote_code: bool = False
    # the base model if `model` is an adapter; None: the one that the adapter's config names
    base_model: str | None = None
    # data type of the master weights
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Generation:
    """How the student's attempts are sampled. The first four fields are for texts, the others for images."""

    temperature: float = 1.0
    top_p: float = 1.0
    # texts that end a response
    stop: tuple[str, ...] = ()
    # 0: what the context window leaves
    max_prompt_tokens: int = 0
    # numbers of denoising steps per image, in training and in evaluation
    grids: tuple[int, ...] = ()
    noise_level: float = 0.0
    guidance: float = 1.0
    # height and width of the image; 0: the size that the model was trained for
    pixels: int = 0


@dataclass(frozen=True, slots=True)
class Numbers:
    """The sizes of a run."""

    steps: int
    prompts_per_step: int
    group_size: int
    # at most so many optimiser steps between sampling an attempt and learning from it
    max_staleness: int
    # "ready" or "strict": the key `order` of the recipe
    order: Literal["ready", "strict"]
    # the most positions of a training attempt, over all steps
    training_positions: int
    # the most positions of an attempt of an evaluation or of extrapolation's score
    evaluation_positions: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Settings of the process that a part is opened in."""

    # CPU threads of torch; 0: torch's own choice
    threads: int = 0
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class PartContext:
    """What a part knows of its run. Objects that the parts of one process share are in `Services`."""

    # name of the part's table in the recipe: "main" for [teachers.main], "sampler" for [sampler]
    name: str
    # the run's seed
    seed: int
    # what all parts together require to be computed, joined by `checks.join`
    requirements: Requirements
    student: StudentSpec
    task: Task
    generation: Generation
    numbers: Numbers
    # a folder for this part alone, inside the run directory; the part makes it if it needs it
    folder: Path
    # the teachers of the recipe by key, for a sampler that opens teachers itself
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    placement: Placement = Placement()
