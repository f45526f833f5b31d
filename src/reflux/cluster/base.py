"""The protocol of a cluster, which opens samplers and teachers in other processes than that of the loop.

Without a cluster every part is opened in the process of the loop (`InThisProcess`). With one, the loop gets
objects with the same protocols, which send the work to the processes where the parts are open. A part is
opened there from its value and its `PartContext`, with services of that process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reflux.config.part import Part

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.learners.base import Learner
    from reflux.runtime.services import Services
    from reflux.samplers.base import OpenSampler, Sampler
    from reflux.teachers.base import OpenTeacher, Teacher


@dataclass(frozen=True)
class Bundle:
    """What one process of a cluster is for, and the CPUs and GPUs that are reserved for it.

    role: "learner", "sampler" or "teacher". name: the teacher's table, else "". index: its number among the
    processes of the same role and name. The learner's process 0 is the one that runs the loop.
    """

    role: str
    name: str
    index: int
    cpus: float
    gpus: float

    @property
    def label(self) -> str:
        """The role and the name, for users."""
        return f"{self.role} {self.name}".strip()


class OpenCluster(Protocol):
    def sampler(
        self, part: Sampler, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenSampler]:
        """The open sampler. services: of the process of the loop."""
        ...

    def teacher(
        self, part: Teacher, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenTeacher]:
        """The open teacher. services: of the process of the loop."""
        ...


class ClusterPart(Part, Protocol):
    """Base class of clusters."""


class Cluster(ClusterPart, Protocol):
    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """All processes of the run, that of the loop first."""
        ...

    def open(self, learner: Learner, services: Services) -> AbstractAsyncContextManager[OpenCluster]:
        """Reserve what the run needs, and start the learner's other ranks. ConfigError where there is less
        than the recipe asks for.
        """
        ...


class InThisProcess:
    """A run without a cluster."""

    def sampler(
        self, part: Sampler, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenSampler]:
        return part.open(context, services)

    def teacher(
        self, part: Teacher, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[OpenTeacher]:
        return part.open(context, services)


@asynccontextmanager
async def opened(cluster: Cluster | None, learner: Learner, services: Services) -> AsyncIterator[OpenCluster]:
    """The open cluster of a config; `InThisProcess` if the config has none."""
    if cluster is None:
        yield InThisProcess()
        return
    async with cluster.open(learner, services) as found:
        yield found
