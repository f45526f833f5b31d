"""Settings of learners: LoRA adapters, the mean of models that training starts from, an average of the
weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT

Positive = Annotated[float, Field(gt=0)]


Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class Lora:
    """Low-rank adapters by peft (arXiv 2106.09685): the LoRA matrices A and B have rank `rank` and change a
    weight by alpha / rank * B A. targets: module names, or "all-linear".
    """

    rank: Annotated[int, Field(ge=1)] = 32
    alpha: Positive = 64.0
    targets: str | tuple[str, ...] = "all-linear"


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True, config=STRICT)
class Average:
    """An exponential average of the trained weights, updated every `every` optimiser steps: mean = decay *
    mean + (1 - decay) * weights.

    The average is evaluated and exported. Attempts are sampled with the weights themselves.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9
    every: Annotated[int, Field(ge=1)] = 8


@dataclass(frozen=True, config=STRICT)
class FlowLora:
    """Low-rank adapters by peft (arXiv 2106.09685) on the transformer. rank, alpha: as in `Lora`. targets:
    ends of module names; the default is all attention layers.
    """

    rank: Annotated[int, Field(ge=1)] = 32
    alpha: Positive = 64.0
    targets: tuple[str, ...] = ATTENTION


@dataclass(frozen=True, config=STRICT)
class Merge:
    """Start from the mean of the teachers, which are models of the student's shape or adapters on it.

    by "weights": the mean of the full weights. For adapters it is the exact mean of the products B A of their
    LoRA matrices, as one adapter whose rank is the sum of their ranks. by "factors": the mean of A and the
    mean of B separately, as in the released code. This is not the mean of the products.
    """

    models: tuple[str, ...]
    by: Literal["weights", "factors"] = "weights"

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ValueError(
                "models: a merge needs two or more models; to start from one, give it as learner.model or as "
                "adapter"
            )
