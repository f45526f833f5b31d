"""A cluster of Ray: samplers, teachers and the learner's ranks in processes that Ray places and watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.cluster.base import Bundle, ClusterPart
from reflux.config.registry import STRICT
from reflux.types import FlowRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig
    from reflux.learners.base import Learner
    from reflux.runtime.services import Services

Count = Annotated[int, Field(ge=1)]
Cores = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Cards = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class Ray(ClusterPart):
    """Samplers, teachers and the learner's ranks are actors of Ray, on this machine or on many.

    The process that is started runs the loop and is the learner's first rank. What is not named here stays in
    it. The prompts of a step are cut into as many shares as there are samplers, and a share goes to the
    sampler with the least outstanding work. Attempts scored by a teacher are divided in the same way, by
    length. A share is always the same prompts, whichever actor gets it, and random numbers depend on prompts,
    so a run repeats with the same numbers of actors. Weights are put into Ray's object store once for each
    version, and every machine holds one copy.

    An actor that ends is replaced by a new one, which opens its part again, gets the current weights, and
    does the lost share again. Nothing of the lost share is counted. A rank of the learner is not replaced:
    the run ends with a sentence, and its last checkpoint continues it.
    """

    when: ClassVar[str] = (
        "Sampling or scoring takes longer than learning, or the models do not fit beside each other. "
        "docs/cluster.md has the arithmetic."
    )

    # The address of a cluster that runs already, such as "auto" or "HOST:6379". Not set: a cluster on this
    # machine alone, started for this run and stopped with it.
    address: str | None = None
    # Sampler actors, each with its own copy of the student. 0: the sampler stays in the process of the loop.
    samplers: Annotated[int, Field(ge=0)] = 0
    # Actors of each teacher table, for example {main = 2}, each with its own copy of that teacher. A table
    # that is not named stays in the process of the loop.
    teachers: dict[str, Count] = Field(default_factory=dict)
    # Processes that share the student's weights, that of the loop included. More than 1 needs a learner that
    # can be divided, such as "fsdp".
    learner_ranks: Count = 1
    # CPUs that are reserved for each sampler actor. They do not limit its threads.
    cpus_per_sampler: Cores = 1.0
    # GPUs of each sampler actor: a share of one, or a whole number.
    gpus_per_sampler: Cards = 0.0
    # CPUs that are reserved for each teacher actor.
    cpus_per_teacher: Cores = 1.0
    # GPUs of each teacher actor. With several, set teachers.NAME.device_map = "auto".
    gpus_per_teacher: Cards = 0.0
    # CPUs that are reserved for each rank of the learner, the process of the loop included.
    cpus_per_rank: Cores = 1.0
    # GPUs of each rank of the learner.
    gpus_per_rank: Cards = 0.0
    # Where Ray puts the actors: on few machines, or on as many as possible.
    strategy: Literal["PACK", "SPREAD"] = "PACK"
    # Size of the object store of a cluster that is started here, in MB; 0: Ray's choice. It must hold the
    # student's weights twice, and the hidden states of a step.
    object_store_mb: Annotated[int, Field(ge=0)] = 0
    # How often an actor may end without an answer in between. After that the run ends.
    restarts: Annotated[int, Field(ge=0)] = 3
    # Seconds in which the actors must be placed and started, and in which one must be replaced.
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0

    def __post_init__(self) -> None:
        if not (self.samplers or self.teachers or self.learner_ranks > 1):
            raise ValueError(
                "nothing is placed. Give samplers, teachers or learner_ranks, or remove the table with "
                "cluster=none"
            )
        for bundle in self.bundles:
            if bundle.gpus > 1 and bundle.gpus % 1:
                raise ValueError(
                    f"Ray gives a {bundle.label} a share of one GPU or whole GPUs, and not {bundle.gpus:g}. "
                    f"Use {int(bundle.gpus)} or {int(bundle.gpus) + 1}"
                )
        if self.address is not None and self.object_store_mb:
            raise ValueError(
                "object_store_mb is for a cluster that is started here, and address names one that runs. "
                "Remove one of them"
            )

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        ranks = (
            Bundle("learner", "", index, self.cpus_per_rank, self.gpus_per_rank)
            for index in range(self.learner_ranks)
        )
        samplers = (
            Bundle("sampler", "", index, self.cpus_per_sampler, self.gpus_per_sampler)
            for index in range(self.samplers)
        )
        teachers = (
            Bundle("teacher", table, index, self.cpus_per_teacher, self.gpus_per_teacher)
            for table, count in self.teachers.items()
            for index in range(count)
        )
        return (*ranks, *samplers, *teachers)

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if cfg.task.rollouts is FlowRollout and (self.samplers or self.teachers):
            yield (
                f"{where}: samplers and teachers of images cannot be placed yet, because their teachers "
                "share one model in one process. Remove the table with cluster=none."
            )
            return
        yield from self._about_samplers(where, cfg)
        for table, count in self.teachers.items():
            yield from self._about_teacher(f"{where}.teachers.{table}", cfg, table, count)
        if self.learner_ranks > 1 and not cfg.learner.divides:
            yield (
                f"{where}.learner_ranks = {self.learner_ranks}, but this learner is one process. Use "
                'learner.kind = "fsdp", or 1 rank.'
            )

    def _about_samplers(self, where: str, cfg: RunConfig) -> Iterator[str]:
        if not self.samplers:
            return
        if not cfg.sampler.on_policy:
            yield (
                f"{where}.samplers = {self.samplers}, but this sampler takes its training attempts from "
                "elsewhere, so there is nothing to divide. Set samplers = 0, or use another sampler."
            )
        elif why := cfg.sampler.one_process_because:
            yield f"{where}.samplers = {self.samplers}, but {why}. Set samplers = 0, or change the sampler."
        if self.samplers > cfg.prompts_per_step:
            yield (
                f"{where}.samplers = {self.samplers}, but a step has {cfg.prompts_per_step} prompts, and "
                f"each prompt goes to one sampler. Use at most {cfg.prompts_per_step}, or raise "
                "prompts_per_step."
            )

    def _about_teacher(self, where: str, cfg: RunConfig, table: str, count: int) -> Iterator[str]:
        teacher = cfg.teachers.get(table)
        if teacher is None:
            yield (
                f"{where}: the recipe has no teacher table '{table}'. It has: "
                f"{', '.join(sorted(cfg.teachers)) or 'none'}."
            )
        elif teacher.follows or teacher.is_student:
            yield (
                f"{where}: teacher '{table}' is made from the student's own weights, which are in the "
                "process of the loop. Leave it out of this table."
            )
        elif not teacher.in_process:
            yield (
                f"{where}: teacher '{table}' is in a server already, so there is no model to place. Leave it "
                "out of this table. Its own table may name several servers."
            )
        elif count > cfg.prompts_per_step * cfg.group_size:
            yield f"{where} = {count} is more than the attempts of a step. Use fewer actors."

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.samplers and cfg.sampler.precision == "auto":
            yield (
                f'{where}: with sampler.dtype = "auto" the weights are sent as the learner has them, in '
                'float32. sampler.dtype = "bfloat16" sends half as many bytes.'
            )
        placed = [table for table in self.teachers if table in cfg.teachers]
        if placed and any(evaluation.samples_from_teacher for evaluation in cfg.evals.values()):
            yield (
                f"{where}: an evaluation samples from a teacher, and for that it loads the teacher into the "
                "process of the loop. Remove it where the teacher does not fit there, for example with "
                "evals.teacher_accuracy=none."
            )

    def open(self, learner: Learner, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.cluster.placing import RayCluster

        return RayCluster.opened(self, learner, services)
