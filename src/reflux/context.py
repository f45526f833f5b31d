"""What a part may know of its run: small frozen values that can be pickled and sent to another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """The student by name, and how it is spoken to. It says the same to its sampler, its learner and a teacher that is the student."""

    model: str
    system: str | None = None  # a system prompt, put before conversations that have none
    template: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template
    trust_remote_code: bool = False
    dtype: str = "float32"  # of the master weights


@dataclass(frozen=True, slots=True)
class Generation:
    """How the student's attempts are sampled: of texts the first four, of pictures the rest."""

    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    max_prompt_tokens: int = 0  # 0: what the context window leaves
    grids: tuple[int, ...] = ()  # numbers of denoising steps that pictures are drawn in, in training and in evaluation
    noise_level: float = 0.0
    guidance: float = 1.0
    pixels: int = 0  # a side of the picture; 0: the size that the model was made for
