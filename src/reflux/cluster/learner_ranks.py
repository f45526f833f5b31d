"""The learner's ranks above 0 as actors. Rank 0 is the process of the loop. They form the same group as the
processes of torchrun, and are described by the same environment variables.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from reflux.cluster.actors import RankActor, SeatActor
from reflux.cluster.pool import end
from reflux.errors import ConfigError

if TYPE_CHECKING:
    from reflux.cluster.base import Seat
    from reflux.learners.base import Learner

# starts an actor of a class in a seat, with further arguments
Place = Callable[..., Any]
# Seconds in which the group itself notices a lost rank and says so. A rank that is lost before there is a
# group is noticed here.
_NOTICED_S = 10.0
_LEAVING_S = 60.0


@contextmanager
def started(learner: Learner, seats: Sequence[Seat], place: Place) -> Iterator[None]:
    """Ranks 1 and above, until the block ends. seats: of the whole run. place: starts an actor in a seat."""
    ranks = [seat for seat in seats if seat.role == "learner"]
    with _own_gpus(ranks[0], place):
        if len(ranks) == 1:
            yield
            return
        if "WORLD_SIZE" in os.environ:
            raise ConfigError(
                "cluster.learner_ranks: torchrun has started ranks already. Start the run without torchrun, "
                "or set cluster.learner_ranks = 1."
            )
        actors = [place(RankActor, seat, learner) for seat in ranks[1:]]
        try:
            # Every process is there before the first of them waits for the others.
            ray.get([actor.pid.remote() for actor in actors])
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
def _own_gpus(seat: Seat, place: Place) -> Iterator[None]:
    """Hold the place of the process of the loop, which Ray has not started, and use its GPUs alone."""
    if not seat.gpus:
        yield
        return
    holder = place(SeatActor, seat)
    try:
        with environment({"CUDA_VISIBLE_DEVICES": ",".join(ray.get(holder.gpus.remote()))}):
            yield
    finally:
        end(holder)


@contextmanager
def _watched(following: Sequence[Any]) -> Iterator[None]:
    """End this process with a sentence when a rank fails before the block ends."""
    over = threading.Event()

    def watch() -> None:
        waiting = list(following)
        while waiting and not over.is_set():
            done, waiting = ray.wait(waiting, timeout=1.0)
            try:
                ray.get(done)
            except RayError:
                time.sleep(_NOTICED_S)
                if over.is_set():
                    return
                sys.stderr.write(
                    "\nreflux: a rank of the learner has ended, and the run ends with it. Unless it was "
                    "killed, its own message is above. The last checkpoint is kept. Continue with --resume.\n"
                )
                sys.stderr.flush()
                os._exit(2)

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
