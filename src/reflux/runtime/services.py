"""Objects that the parts of one process share. These objects are not sent to other processes: each process
makes its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from reflux.clients.usage import Usage
from reflux.models.heads import Heads
from reflux.models.shared_cache import SharedCache
from reflux.runtime.timers import Clock
from reflux.runtime.together import end_of
from reflux.runtime.weights import Lent

if TYPE_CHECKING:
    from reflux.config.context import StudentSpec
    from reflux.grading.graders import Graders
    from reflux.runtime.weights import Weights

Result = TypeVar("Result")
Append = Callable[[str, Mapping[str, Any]], None]


class Listener(Protocol):
    """Receives messages for the user. It does not change the run."""

    def noted(self, text: str) -> None: ...


class Deaf:
    """A listener that ignores all messages."""

    def noted(self, text: str) -> None: ...


def _unwritten(name: str, row: Mapping[str, Any]) -> None:
    """Drop the line, because there is no run directory."""


class Services:
    """Timers, an executor for model work, a cache of shared objects, graders, the student's tokenizer and the
    output heads.

    student: the model whose tokenizer is used. overlap: True if sampling runs at the same time as learning
    (staleness above 0) or as environments. Model work then runs in other threads than the event loop.
    parties: the number of these threads, which share the cores.
    listener: receives notes for the user. append(name, row): adds a line to the file `name` in the run
    directory. Lines whose `step` is after the checkpoint are removed when the run is resumed.
    """

    def __init__(
        self,
        student: StudentSpec,
        *,
        overlap: bool = False,
        parties: int = 2,
        listener: Listener | None = None,
        append: Append = _unwritten,
    ):
        self.student, self.listener, self.append = student, listener or Deaf(), append
        self.clock = Clock()
        # requests to chat servers, their tokens and costs
        self.usage = Usage()
        self.shared = SharedCache()
        # output heads of the models in this process, by the key `HiddenTarget.head`
        self.heads = Heads()
        self._told: set[str] = set()
        # numbers of parts for the metrics of a step
        self._reported: dict[str, dict[str, Mapping[str, float]]] = {}
        self._lendings = itertools.count(1)
        self._closing = ExitStack()
        self._threads = self._closing.enter_context(_model_threads(parties)) if overlap else None

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        from reflux.models.text import load_tokenizer

        return load_tokenizer(
            self.student.model, "learner.model", self.student.trust_remote_code, self.student.base_model
        )

    @cached_property
    def graders(self) -> Graders:
        """Worker processes that grade answers, shared by rewards and evaluations."""
        from reflux.grading.graders import Graders

        return self._closing.enter_context(Graders())

    def tell(self, notes: Iterable[str]) -> None:
        """Give the listener the sentences that it was not given before, such as those on a model that
        several parts load.
        """
        for text in dict.fromkeys(notes):
            if text not in self._told:
                self._told.add(text)
                self.listener.noted(text)

    def report(self, where: str, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a part to the metrics of this step. where: the path of the part's table in the
        recipe, such as "rewards.NAME"; metrics.jsonl has them in the same place.
        """
        group, _, name = where.partition(".")
        self._reported.setdefault(group, {})[name] = numbers

    def take_reported(self) -> dict[str, dict[str, Mapping[str, float]]]:
        """What was reported since the last call."""
        taken, self._reported = self._reported, {}
        return taken

    async def run_model(
        self, work: Callable[..., Result], *arguments: Any, interrupt: Callable[[], None] | None = None
    ) -> Result:
        """Run model work, in another thread if `overlap` was set and in this one otherwise. A cancellation
        waits for the end of the work. interrupt: makes the work end early then.

        Without overlap a second thread has no use, and it costs time: it brings a second OpenMP
        team, and on few cores both teams sleep and wake at every operation. On 2 cores decoding then takes
        1.8 times as long.
        """
        if self._threads is None:
            return work(*arguments)
        running = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if interrupt is not None:
                interrupt()
            await end_of(running)
            raise

    def lend(self, weights: Weights) -> Weights:
        """A handle of the same tensors with a version that no other weights and no training attempt have: -1,
        -2, ... in this process.

        This is for weights that the sampler uses for a time and that are not trained further: candidates of a
        search, or an average. They do not come from an optimiser step, so the learner's version
        belongs to other weights.
        """
        return Lent(weights, -next(self._lendings))

    def close(self) -> None:
        self._closing.close()
        self.clock.close()


def _model_threads(count: int) -> ThreadPoolExecutor:
    """A pool of threads, each with an equal part of the cores."""
    from reflux.models.text import share_cores

    return ThreadPoolExecutor(count, "reflux-model", share_cores, (count,))
