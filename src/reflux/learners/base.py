"""A learner: the student moves.

`open(run)` gives an object with the training state. `step` turns groups whose targets and shares are known into one optimiser step
(`run.off_loop`). Where every weight is 0 there is no optimiser step (moments and decay would move weights on no evidence): the
version stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    def names(self) -> Sequence[str]:
        """The student's parameters by the model's own names: the keys of `weights` without buffers and adapters."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of these full weights on the CPU, float32, adapters merged. ModelError where they are kept in a narrower type."""
        ...

    def places(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies on the CPU of what holds these weights: the parameter itself, or the frozen base under its adapters. See `write`."""
        ...

    def write(self, places: Mapping[str, Tensor]) -> None:
        """Put values into the places of these names: what `places` gave goes back bit for bit, and `places` plus d moves a full weight by d
        whether or not there are adapters (their factors stay). Optimiser moments and version stay. A frozen base that was written to is in
        `state`, and in what is exported.
        """
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
