"""A learner: the student moves.

`open(run)` gives an object with the training state. `step` turns groups whose targets and shares are known into one optimiser step
(`run.off_loop`). Where every weight is 0 there is no optimiser step (moments and decay would move weights on no evidence): the
version stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from reflux.metrics import Stats
from reflux.objectives.base import Objective
from reflux.types import Group, Moment, Rollout

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

    def at_mean(self) -> AbstractContextManager[bool]:
        """Within, the student has its weights averaged over training, where an average is kept (True): what is evaluated and exported."""
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
    def macs(self) -> int:
        """Multiply-accumulates of one position, for FLOP accounting: of a language model, its active parameters."""
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
    rollouts: ClassVar[type[Rollout]]  # what it learns from
    model: str

    def open(self, run: Run) -> AbstractAsyncContextManager[OpenLearner]: ...
