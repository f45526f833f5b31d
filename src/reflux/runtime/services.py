"""What the parts of one process share. It stays in its process; another one makes its own from a context."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from reflux.models.heads import Heads
from reflux.models.shared_cache import SharedCache
from reflux.runtime.timers import Clock
from reflux.runtime.weights import Lent

if TYPE_CHECKING:
    from reflux.config.context import StudentSpec
    from reflux.grading.graders import Graders
    from reflux.runtime.weights import Weights

Result = TypeVar("Result")
Append = Callable[[str, Mapping[str, Any]], None]


class Listener(Protocol):
    """Someone who is told what a user should know. What they do changes nothing in the run."""

    def noted(self, text: str) -> None: ...


class Deaf:
    """Nobody listens."""

    def noted(self, text: str) -> None: ...


def _unwritten(name: str, row: Mapping[str, Any]) -> None:
    """There is no run directory, so lines go nowhere."""


class Services:
    """Timers, an executor for model work, things of which one is enough, graders, the student's tokenizer and
    the output heads.

    overlap: sampling overlaps with learning (staleness above 0) or with environments that answer meanwhile,
    so model work leaves the event loop's thread. append(name, row): a line of the file `name` of the run
    directory; lines with a `step` after the checkpoint are cut off when the run is resumed.
    """

    def __init__(
        self,
        student: StudentSpec,
        *,
        overlap: bool = False,
        listener: Listener | None = None,
        append: Append = _unwritten,
    ):
        self.student, self.listener, self.append = student, listener or Deaf(), append
        self.clock = Clock()
        self.shared = SharedCache()
        # output heads of the models in this process, by the key that hidden states name
        self.heads = Heads()
        self._lendings = itertools.count(1)
        self._closing = ExitStack()
        self._threads = self._closing.enter_context(_model_threads()) if overlap else None

    @cached_property
    def tokenizer(self) -> Any:
        """The student's."""
        from reflux.models.text import load_tokenizer

        return load_tokenizer(self.student.model, "learner.model", self.student.trust_remote_code)

    @cached_property
    def graders(self) -> Graders:
        """Worker processes for verdicts, shared by rewards and evaluations."""
        from reflux.grading.graders import Graders

        return self._closing.enter_context(Graders())

    async def run_model(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run model work: beside the event loop where something overlaps with it, else right here.

        Elsewhere nothing could overlap, and a second thread would bring a second OpenMP team: on few cores
        both then sleep and wake at every operation (measured on 2 cores: decoding takes 1.8 times as long).
        """
        if self._threads is None:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def lend(self, weights: Weights) -> Weights:
        """The same tensors under a version that no other weights have and no training attempt carries: -1,
        -2, ... in this process.

        For weights that a sampler holds for a while without being trained from there: the candidates of a
        search, an average. They were made without a step of the learner, so its own version is that of other
        weights.
        """
        return Lent(weights, -next(self._lendings))

    def close(self) -> None:
        self._closing.close()


def _model_threads() -> ThreadPoolExecutor:
    """Two threads, each with half of the cores."""
    from reflux.models.text import share_cores

    return ThreadPoolExecutor(2, "reflux-model", share_cores, (2,))
