"""Ray for one run: the cluster is started or joined, places are reserved, and actors are put into them."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reflux.cluster.base import Seat
from reflux.errors import ConfigError

# For the clusters that Reflux starts. Ray reads both when it is imported. No usage statistics are sent. Ray
# gives its workers a low priority, with which they hardly run beside other programs of the same machine.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
try:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as missing:
    raise ConfigError(
        "cluster.kind = 'ray' needs the package ray, which is not installed. Run: pip install '.[ray]'"
    ) from missing

from reflux.cluster.actors import SamplerActor, TeacherActor
from reflux.cluster.learner_ranks import started
from reflux.cluster.pool import Pool
from reflux.cluster.remote_sampler import RemoteSampler
from reflux.cluster.remote_teacher import RemoteTeacher

if TYPE_CHECKING:
    from reflux.cluster.ray import Ray
    from reflux.config.context import PartContext
    from reflux.learners.base import Learner
    from reflux.runtime.services import Services
    from reflux.samplers.base import Sampler
    from reflux.teachers.base import Teacher


class RayCluster:
    """The reserved places of one run. reserved: Ray's placement group, with one bundle for each seat."""

    def __init__(self, cfg: Ray, reserved: Any, services: Services):
        self.cfg, self.reserved, self.services = cfg, reserved, services

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: Ray, learner: Learner, services: Services) -> AsyncIterator[RayCluster]:
        with connected(cfg), reserved_for(cfg) as reserved:
            cluster = cls(cfg, reserved, services)
            services.listener.noted(f"cluster: {in_words(cfg.seats)} placed by Ray {ray.__version__}")
            with started(learner, cfg.seats, cluster.place):
                yield cluster

    def place(self, actor: type, seat: Seat, *arguments: Any) -> Any:
        """Start an actor of this class in the seat's place. An actor that ends is not started again by Ray,
        because it would come back without its part and its weights.
        """
        strategy = PlacementGroupSchedulingStrategy(
            self.reserved, placement_group_bundle_index=self.cfg.seats.index(seat)
        )
        options = ray.remote(actor).options(
            num_cpus=seat.cpus,
            num_gpus=seat.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategy,
        )
        return options.remote(*arguments, seat.gpus)

    @asynccontextmanager
    async def sampler(self, part: Sampler, context: PartContext, services: Services) -> AsyncIterator[Any]:
        if not self.cfg.samplers:
            async with part.open(context, services) as here:
                yield here
            return
        sampler = RemoteSampler(services, part.precision)
        async with self._pool(SamplerActor, "sampler", "", part, context, sampler) as pool:
            sampler.pool = pool
            await pool.prepare()
            yield sampler

    @asynccontextmanager
    async def teacher(self, part: Teacher, context: PartContext, services: Services) -> AsyncIterator[Any]:
        if context.name not in self.cfg.teachers:
            async with part.open(context, services) as here:
                yield here
            return
        with closing(RemoteTeacher(part, context, services)) as teacher:
            async with self._pool(TeacherActor, "teacher", context.name, part, context, teacher) as pool:
                teacher.pool = pool
                await pool.prepare()
                yield teacher

    @asynccontextmanager
    async def _pool(
        self,
        actor: type,
        role: str,
        name: str,
        part: Any,
        context: PartContext,
        front: RemoteSampler | RemoteTeacher,
    ) -> AsyncIterator[Pool]:
        """The actors of one part. They are ended with the block, also on an error."""

        def start(seat: Seat) -> Any:
            # Parts that write files, such as the log of a server, have a folder each.
            own = replace(context, folder=context.folder / f"{seat.index}")
            return self.place(actor, seat, part, own)

        seats = [seat for seat in self.cfg.seats if (seat.role, seat.name) == (role, name)]
        pool = Pool(
            seats,
            start,
            front.prepare,
            self.services,
            restarts=self.cfg.restarts,
            patience_s=self.cfg.start_timeout_s,
        )
        try:
            yield pool
        finally:
            await pool.close()


@contextmanager
def connected(cfg: Ray) -> Iterator[None]:
    """A cluster, until the block ends. Where this process is part of one already, that one is used and goes
    on. ConfigError for an address at which there is none.
    """
    if ray.is_initialized():
        yield
        return
    with own_signals():
        try:
            ray.init(
                address=cfg.address or "local",
                object_store_memory=cfg.object_store_mb * 10**6 or None,
                include_dashboard=None if cfg.address else False,
                logging_level=logging.WARNING,
            )
        except Exception as error:
            # Ray raises a bare Exception where its own processes do not start in time.
            why = str(error).strip().splitlines()[0].rstrip(".")
            raise ConfigError(
                f"cluster: Ray did not start on this machine: {why}. Another try may help where it is busy."
                if cfg.address is None
                else f"cluster.address: there is no cluster of Ray at {cfg.address}: {why}. Start one with "
                "`ray start --head`, set RAY_AUTH_MODE=token if it wants a token, or leave the address out."
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which `ray.init` replaces. A run saves when it gets that signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def reserved_for(cfg: Ray) -> Iterator[Any]:
    """A placement group with one bundle for each seat, the first one on this machine. ConfigError where the
    cluster has less than is asked for: Ray would wait for it without a word.
    """
    refuse_too_much(cfg.seats, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    here = f"node:{ray.util.get_node_ip_address()}"
    bundles = [{"CPU": seat.cpus, "GPU": seat.gpus} for seat in cfg.seats]
    bundles[0][here] = 0.001
    reserved = placement_group(
        [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles],
        strategy=cfg.strategy,
    )
    try:
        if not reserved.wait(cfg.start_timeout_s):
            raise ConfigError(
                f"cluster: Ray did not place {in_words(cfg.seats)} in {cfg.start_timeout_s:g} s. The "
                f"cluster has {_amounts(ray.cluster_resources())}; free are "
                f"{_amounts(ray.available_resources())}. Wait for other programs, ask for less, "
                "or raise cluster.start_timeout_s."
            )
        yield reserved
    finally:
        remove_placement_group(reserved)


def refuse_too_much(seats: Sequence[Seat], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ConfigError where the machines together, or each alone, have less than the seats need. nodes: the
    resources of each machine, as Ray names them.
    """
    asked = {"CPU": sum(seat.cpus for seat in seats), "GPU": sum(seat.gpus for seat in seats)}
    there = {name: sum(node.get(name, 0.0) for node in nodes) for name in asked}
    if any(asked[name] > there[name] for name in asked):
        raise ConfigError(
            f"cluster: {in_words(seats)} need {_amounts(asked)}, and the cluster has {_amounts(there)}. "
            "Use fewer actors, lower cluster.cpus_per_sampler and the like (0.5 is allowed), or join a "
            "larger cluster with cluster.address."
        )
    for seat in seats:
        needed = {"CPU": seat.cpus, "GPU": seat.gpus}
        if not any(all(node.get(name, 0.0) >= needed[name] for name in needed) for node in nodes):
            raise ConfigError(
                f"cluster: one {seat.group} needs {_amounts(needed)} on one machine, and no machine of the "
                "cluster has that many. Ask for less per actor."
            )


def in_words(seats: Sequence[Seat]) -> str:
    """For example "1 learner, 2 sampler, 1 teacher main"."""
    return ", ".join(f"{count} {group}" for group, count in Counter(seat.group for seat in seats).items())


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"
