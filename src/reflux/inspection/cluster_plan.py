"""The placement of a run on a cluster: processes, memory of each, and bytes that a step sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from reflux.cluster.base import Cluster, Seat
from reflux.config.recipe import RunConfig
from reflux.models.sizes import Size

# a float32 master weight, its gradient and two moments
ADAM_BYTES = 16
_ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}


def placed(
    cfg: RunConfig, cluster: Cluster, student: Size, teachers: Mapping[str, Size], positions: int
) -> Iterator[tuple[str, str]]:
    """Lines of a name and a text. positions: the most sampled positions of one step."""
    for group, found in groupby(cluster.seats, key=lambda seat: seat.group):
        seats = list(found)
        yield group, f"{_count(seats)}, {_reserved(seats)}{_holds(cfg, seats, student, teachers)}"
    cpus, gpus = (sum(amount) for amount in zip(*((s.cpus, s.gpus) for s in cluster.seats), strict=True))
    yield "in all", f"{cpus:g} CPUs and {gpus:g} GPUs, the process of the loop included"
    yield "traffic", "; ".join(_traffic(cfg, cluster, student, teachers, positions))


def weight_bytes(cfg: RunConfig, student: Size) -> int | None:
    """Bytes of the weights as they are sent to samplers: in the sampler's data type where it has 16 bits."""
    if student.parameters is None:
        return None
    return student.parameters * _ITEM.get(cfg.sampler.precision, 4)


def _count(seats: list[Seat]) -> str:
    if seats[0].role == "learner":
        others = f" and {len(seats) - 1} ranks" if len(seats) > 1 else ""
        return f"the process of the loop{others}"
    return f"{len(seats)} actors" if len(seats) > 1 else "1 actor"


def _reserved(seats: list[Seat]) -> str:
    return f"{'each ' if len(seats) > 1 else ''}{seats[0].cpus:g} CPUs and {seats[0].gpus:g} GPUs"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count > 1e8 else f"{count / 1e6:.3g} MB"


def _holds(cfg: RunConfig, seats: list[Seat], student: Size, teachers: Mapping[str, Size]) -> str:
    """What each process holds of weights and optimiser."""
    seat = seats[0]
    each: float | None
    if seat.role == "learner":
        held = ADAM_BYTES if cfg.learner.trains_all else 4
        each = None if student.parameters is None else student.parameters * held / len(seats)
    elif seat.role == "sampler":
        each = weight_bytes(cfg, student)
    else:
        each = teachers[seat.name].stored_bytes if seat.name in teachers else None
    if each is None:
        return ""
    return f", {_size(each)} of weights{' and optimiser' if seat.role == 'learner' else ''}"


def _traffic(
    cfg: RunConfig, cluster: Cluster, student: Size, teachers: Mapping[str, Size], positions: int
) -> Iterator[str]:
    """What a step sends, at most."""
    sent = weight_bytes(cfg, student)
    roles = {seat.role for seat in cluster.seats}
    if "sampler" in roles:
        what = "weights" if sent is None else f"{_size(sent)} of weights"
        yield f"a step sends {what} to each machine with samplers"
    for table in sorted({seat.name for seat in cluster.seats if seat.role == "teacher"}):
        size = teachers.get(table)
        if size is None or size.shape is None or size.stored_bytes is None or not size.parameters:
            yield f"teacher '{table}' sends its hidden states"
            continue
        row = size.shape.width * max(1, round(size.stored_bytes / size.parameters))
        yield (f"teacher '{table}' sends {row / 1e3:.3g} kB a position, at most {_size(row * positions)}")
    if "sampler" not in roles and "teacher" not in roles:
        yield "only between the learner's ranks"
