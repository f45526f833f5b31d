"""What a part may know of its run: small frozen values that can be pickled and sent to another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.config.requirements import Requirements

if TYPE_CHECKING:
    from reflux.tasks.base import Task
    from reflux.teachers.base import Teacher


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """The student by name, and how it is spoken to. It says the same to its sampler, its learner and a
    teacher that is the student.
    """

    model: str
    # a system prompt, put before conversations that have none
    system: str | None = None
    # arguments of the chat template
    template: Mapping[str, Any] = field(default_factory=dict)
    # a text that ends every prompt, for the student and its teachers
    prompt_suffix: str | None = None
    trust_remote_code: bool = False
    # of the master weights
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Generation:
    """How the student's attempts are sampled: of texts the first four, of images the rest."""

    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    # 0: what the context window leaves
    max_prompt_tokens: int = 0
    # numbers of denoising steps that images are drawn in, in training and in evaluation
    grids: tuple[int, ...] = ()
    noise_level: float = 0.0
    guidance: float = 1.0
    # a side of the image; 0: the size that the model was made for
    pixels: int = 0


@dataclass(frozen=True, slots=True)
class Numbers:
    """The sizes of a run."""

    steps: int
    prompts_per_step: int
    group_size: int
    # optimiser steps between sampling and learning, at most
    max_staleness: int
    # of an attempt, at most
    training_positions: int
    evaluation_positions: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Settings of the process that a part is opened in."""

    # CPU threads of torch; 0: as torch finds
    threads: int = 0
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class PartContext:
    """All that a part is told of its run. What it shares with other parts of its process is in `Services`."""

    # the table's: "main" for [teachers.main], "sampler" for [sampler]
    name: str
    seed: int
    # joined by `checks`: what has to be computed for others
    requirements: Requirements
    student: StudentSpec
    task: Task
    generation: Generation
    numbers: Numbers
    # of this part's own, inside the run directory; made by the part if it needs one
    folder: Path
    # the teacher tables as values, for a sampler that opens them
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    placement: Placement = Placement()
