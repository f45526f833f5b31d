"""A learner: the student moves.

`open(run)` gives an object with the training state. `step` turns groups whose targets and shares are known into one optimiser step
(`run.off_loop`). Where every weight is 0 there is no optimiser step (moments and decay would move weights on no evidence): the
version stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reflux.metrics import Stats
from reflux.objectives.base import Objective
from reflux.types import Group, Moment

if TYPE_CHECKING:
    from torch import Tensor

    from reflux.models import Model
    from reflux.rundir import Run


class OpenLearner(Protocol):
    version: int  # optimiser steps done
    model: Model  # transformers' view of it, for preflight

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The student's full weights by the model's own parameter names, adapters merged; not to be written to."""
        ...

    @property
    def parameters(self) -> int:
        """Active parameters of the student, for FLOP accounting."""
        ...

    async def observe(self, groups: Sequence[Group]) -> None:
        """Fill `attempt.now` as `run.wants` asks; nothing wanted, nothing done."""
        ...

    async def step(self, groups: Sequence[Group], objectives: Sequence[Objective], moment: Moment) -> Stats:
        """Raises StepRefused, with nothing changed, where loss or gradient norm is not finite."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...

    def export(self, folder: Path) -> None:
        """The student in Hugging Face format, tokenizer included."""
        ...


class Learner(Protocol):
    model: str

    def open(self, run: Run) -> AbstractAsyncContextManager[OpenLearner]: ...
