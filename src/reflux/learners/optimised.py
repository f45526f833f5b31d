"""The settings of AdamW, which every learner of this package has."""

from __future__ import annotations

from typing import Protocol

from reflux.config.schedules import Number


class Optimised(Protocol):
    """The keys of the recipe's `[learner]` table that the optimiser reads."""

    @property
    def lr(self) -> Number: ...

    @property
    def betas(self) -> tuple[float, float]: ...

    @property
    def eps(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def clip(self) -> float: ...

    @property
    def min_grad_norm(self) -> float: ...

    @property
    def gradient_checkpointing(self) -> bool: ...
