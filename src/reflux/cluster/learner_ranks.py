"""The learner's ranks above 0 as actors. Rank 0 is the process of the loop. All ranks form one group, as the
processes of torchrun do, and the same environment variables describe it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from reflux.cluster.actors import DriverActor, RankActor
from reflux.cluster.pool import end, first_line, not_ready
from reflux.errors import ConfigError, ServerError
from reflux.learners.rank_group import end_process

if TYPE_CHECKING:
    from reflux.cluster.base import Bundle
    from reflux.learners.base import Learner

# starts an actor of a class in a bundle, with further arguments
Place = Callable[..., Any]
# Seconds in which the group itself notices a lost rank and says so. A rank that is lost before there is a
# group is noticed here.
_NOTICED_S = 10.0
_LEAVING_S = 60.0


@contextmanager
def started(learner: Learner, bundles: Sequence[Bundle], place: Place, timeout_s: float) -> Iterator[None]:
    """Ranks 1 and above, until the block ends. bundles: of the whole run. place: starts an actor in a bundle.
    timeout_s: seconds in which the actors must start.
    """
    ranks = [bundle for bundle in bundles if bundle.role == "learner"]
    with _own_gpus(ranks[0], place, timeout_s):
        if len(ranks) == 1:
            yield
            return
        if "WORLD_SIZE" in os.environ:
            raise ConfigError(
                "cluster.learner_ranks: torchrun has started ranks already. Start the run without torchrun, "
                "or set cluster.learner_ranks = 1."
            )
        actors = [place(RankActor, bundle, learner) for bundle in ranks[1:]]
        try:
            # Every process is there before the first of them waits for the others.
            _wait([actor.__ray_ready__.remote() for actor in actors], timeout_s)
            group = {
                "WORLD_SIZE": str(len(ranks)),
                "MASTER_ADDR": ray.util.get_node_ip_address(),
                "MASTER_PORT": _free_port(),
                # Each process sees its own GPUs only.
                "LOCAL_RANK": "0",
            }
            following = [
                actor.follow.remote({**group, "RANK": str(rank)}) for rank, actor in enumerate(actors, 1)
            ]
            with environment({**group, "RANK": "0"}), _watched(following):
                yield
            ray.wait(following, num_returns=len(following), timeout=_LEAVING_S)
        finally:
            for actor in actors:
                end(actor)


@contextmanager
def _own_gpus(bundle: Bundle, place: Place, timeout_s: float) -> Iterator[None]:
    """Hold the bundle of the process of the loop, and hide from it all GPUs but those of the bundle."""
    if not bundle.gpus:
        yield
        return
    holder = place(DriverActor, bundle)
    try:
        with environment({"CUDA_VISIBLE_DEVICES": ",".join(_wait(holder.gpus.remote(), timeout_s))}):
            yield
    finally:
        end(holder)


def _wait(references: Any, timeout_s: float) -> Any:
    """The results of the first calls of the actors of ranks. ServerError where an actor does not start."""
    try:
        return ray.get(references, timeout=timeout_s)
    except GetTimeoutError:
        raise not_ready("a rank of the learner", timeout_s) from None
    except RayActorError as error:
        raise ServerError(
            f"a rank of the learner did not start. Ray says: {first_line(error)} Its own messages are above "
            "and in Ray's log folder."
        ) from error


@contextmanager
def _watched(following: Sequence[Any]) -> Iterator[None]:
    """End this process with a sentence when a rank fails before the block ends."""
    over = threading.Event()

    def watch() -> None:
        waiting = list(following)
        while waiting and not over.is_set():
            done, waiting = ray.wait(waiting, timeout=1.0)
            for reference in done:
                try:
                    ray.get(reference)
                except RayError:
                    if over.wait(_NOTICED_S):
                        return
                    end_process(1 + following.index(reference), 1 + len(following))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process until the block ends."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("", 0))
        return str(one.getsockname()[1])
