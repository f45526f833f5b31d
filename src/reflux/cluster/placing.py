"""Ray for one run: the cluster is started or joined, bundles are reserved, and actors are started in them."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from reflux.cluster.base import Bundle
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
from reflux.cluster.pool import Opening, Pool, first_line, open_part
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
    """The reserved bundles of one run. reserved: Ray's placement group, with one bundle for each bundle."""

    def __init__(self, cfg: Ray, reserved: Any, services: Services):
        self.cfg, self.reserved, self.services = cfg, reserved, services

    @classmethod
    @asynccontextmanager
    async def opened(cls, cfg: Ray, learner: Learner, services: Services) -> AsyncIterator[RayCluster]:
        with connected(cfg), reserved_for(cfg) as reserved:
            cluster = cls(cfg, reserved, services)
            services.listener.noted(f"cluster: {in_words(cfg.bundles)} placed by Ray {ray.__version__}")
            with started(learner, cfg.bundles, cluster.place, cfg.start_timeout_s):
                yield cluster

    def place(self, actor: type, bundle: Bundle, *arguments: Any) -> Any:
        """Start an actor of this class in this bundle. An actor that ends is not started again by Ray,
        because it would come back without its part and its weights.
        """
        strategy = PlacementGroupSchedulingStrategy(
            self.reserved, placement_group_bundle_index=self.cfg.bundles.index(bundle)
        )
        options = ray.remote(actor).options(
            num_cpus=bundle.cpus,
            num_gpus=bundle.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategy,
        )
        return options.remote(*arguments, bundle.gpus)

    def sampler(
        self, part: Sampler, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[Any]:
        bundles = self._bundles("sampler", "")
        return self._sampler(bundles, part, context, services) if bundles else part.open(context, services)

    def teacher(
        self, part: Teacher, context: PartContext, services: Services
    ) -> AbstractAsyncContextManager[Any]:
        bundles = self._bundles("teacher", context.name)
        return self._teacher(bundles, part, context, services) if bundles else part.open(context, services)

    def _bundles(self, role: str, name: str) -> list[Bundle]:
        return [bundle for bundle in self.cfg.bundles if (bundle.role, bundle.name) == (role, name)]

    @asynccontextmanager
    async def _sampler(
        self, bundles: Sequence[Bundle], part: Sampler, context: PartContext, services: Services
    ) -> AsyncIterator[RemoteSampler]:
        start = partial(self._pool, SamplerActor, bundles, part, context)
        sampler = RemoteSampler(services, part.precision, start)
        # The actors are ended with the block, also on an error.
        async with aclosing(sampler.pool) as pool:
            await pool.open()
            yield sampler

    @asynccontextmanager
    async def _teacher(
        self, bundles: Sequence[Bundle], part: Teacher, context: PartContext, services: Services
    ) -> AsyncIterator[RemoteTeacher]:
        async with aclosing(self._pool(TeacherActor, bundles, part, context, lambda: (open_part,))) as pool:
            info = (await pool.open())[0].result.value()
            with closing(RemoteTeacher(part, context, services, pool, info)) as teacher:
                yield teacher

    def _pool(
        self, actor: type, bundles: Sequence[Bundle], part: Any, context: PartContext, opening: Opening
    ) -> Pool:
        """Start the actors of one part."""

        def start(bundle: Bundle) -> Any:
            # Parts that write files, such as the log of a server, have a folder each.
            own = replace(context, folder=context.folder / f"{bundle.index}")
            return self.place(actor, bundle, part, own)

        return Pool(
            bundles,
            start,
            opening,
            self.services,
            restarts=self.cfg.restarts,
            timeout_s=self.cfg.start_timeout_s,
        )


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
            why = first_line(error).rstrip(".")
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
    """A placement group with one bundle for each bundle, the first one on this machine. ConfigError where the
    cluster has less than is asked for: Ray would wait for it without a word.
    """
    refuse_too_much(cfg.bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    here = f"node:{ray.util.get_node_ip_address()}"
    bundles = [{"CPU": bundle.cpus, "GPU": bundle.gpus} for bundle in cfg.bundles]
    bundles[0][here] = 0.001
    reserved = placement_group(
        [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles],
        strategy=cfg.strategy,
    )
    try:
        if not reserved.wait(cfg.start_timeout_s):
            raise ConfigError(
                f"cluster: Ray did not place {in_words(cfg.bundles)} in {cfg.start_timeout_s:g} s. The "
                f"cluster has {_amounts(ray.cluster_resources())}; free are "
                f"{_amounts(ray.available_resources())}. Wait for other programs, ask for less, "
                "or raise cluster.start_timeout_s."
            )
        yield reserved
    finally:
        remove_placement_group(reserved)


def refuse_too_much(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ConfigError where the machines together have less than the bundles need, or no machine has enough
    for one of them. nodes: the resources of each machine, as Ray names them.
    """
    asked = {"CPU": sum(bundle.cpus for bundle in bundles), "GPU": sum(bundle.gpus for bundle in bundles)}
    there = {name: sum(node.get(name, 0.0) for node in nodes) for name in asked}
    if any(asked[name] > there[name] for name in asked):
        raise ConfigError(
            f"cluster: {in_words(bundles)} need {_amounts(asked)}, and the cluster has {_amounts(there)}. "
            "Use fewer actors, lower cluster.cpus_per_sampler and the like (0.5 is allowed), or join a "
            "larger cluster with cluster.address."
        )
    for bundle in bundles:
        needed = {"CPU": bundle.cpus, "GPU": bundle.gpus}
        if not any(all(node.get(name, 0.0) >= needed[name] for name in needed) for node in nodes):
            raise ConfigError(
                f"cluster: one {bundle.label} needs {_amounts(needed)} on one machine, and no machine of the "
                "cluster has that many. Ask for less per actor."
            )


def in_words(bundles: Sequence[Bundle]) -> str:
    """For example "1 x learner, 2 x sampler, 1 x teacher main"."""
    counts = Counter(bundle.label for bundle in bundles)
    return ", ".join(f"{count} x {label}" for label, count in counts.items())


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPUs and {resources.get('GPU', 0.0):g} GPUs"
