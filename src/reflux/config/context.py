"""What a part may know of its run: small frozen values that can be pickled and sent to another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.types import Requirements

if TYPE_CHECKING:
    from reflux.tasks.base import Task
    from reflux.teachers.base import Teacher


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """The student by name, and how it is spoken to. It says the same to its sampler, its learner and a teacher that is the student."""

    model: str
    system: str | None = None  # a system prompt, put before conversations that have none
    template: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template
    prompt_suffix: str | None = None  # a text that ends every prompt, for the student and its teachers
    trust_remote_code: bool = False
    dtype: str = "float32"  # of the master weights


@dataclass(frozen=True, slots=True)
class Generation:
    """How the student's attempts are sampled: of texts the first four, of images the rest."""

    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    max_prompt_tokens: int = 0  # 0: what the context window leaves
    grids: tuple[int, ...] = ()  # numbers of denoising steps that images are drawn in, in training and in evaluation
    noise_level: float = 0.0
    guidance: float = 1.0
    pixels: int = 0  # a side of the image; 0: the size that the model was made for


@dataclass(frozen=True, slots=True)
class Numbers:
    """The sizes of a run."""

    steps: int
    prompts_per_step: int
    group_size: int
    max_staleness: int  # optimiser steps between sampling and learning, at most
    training_positions: int  # of an attempt, at most
    evaluation_positions: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Settings of the process that a part is opened in."""

    threads: int = 0  # CPU threads of torch; 0: as torch finds
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class PartContext:
    """All that a part is told of its run. What it shares with other parts of its process is in `Services`."""

    name: str  # the table's: "main" for [teachers.main], "sampler" for [sampler]
    seed: int
    requirements: Requirements  # joined by `checks`: what has to be computed for others
    student: StudentSpec
    task: Task
    generation: Generation
    numbers: Numbers
    folder: Path  # of this part's own, inside the run directory; made by the part if it needs one
    teachers: Mapping[str, Teacher] = field(default_factory=dict)  # the teacher tables as values, for a sampler that opens them
    placement: Placement = Placement()
