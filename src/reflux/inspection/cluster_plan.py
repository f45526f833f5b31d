"""The placement of a run on a cluster: processes, memory of each, and bytes that a step sends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from reflux.cluster.base import Bundle, Cluster
from reflux.config.recipe import RunConfig
from reflux.models.sizes import Size

# a float32 master weight, its gradient and two moments
ADAM_BYTES = 16
_ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}


def placed(
    cfg: RunConfig, cluster: Cluster, student: Size, teachers: Mapping[str, Size], positions: int
) -> Iterator[tuple[str, str]]:
    """Lines of a name and a text. positions: the most sampled positions of one step."""
    for group, found in groupby(cluster.bundles, key=lambda bundle: bundle.label):
        bundles = list(found)
        yield group, f"{_count(bundles)}, {_reserved(bundles)}{_holds(cfg, bundles, student, teachers)}"
    cpus, gpus = (sum(amount) for amount in zip(*((b.cpus, b.gpus) for b in cluster.bundles), strict=True))
    yield "in all", f"{cpus:g} CPUs and {gpus:g} GPUs, the process of the loop included"
    yield "traffic", "; ".join(_traffic(cfg, cluster, student, teachers, positions))


def weight_bytes(cfg: RunConfig, student: Size) -> int | None:
    """Bytes of the weights as they are sent to samplers: in the sampler's data type where it has 16 bits."""
    if student.parameters is None:
        return None
    return student.parameters * _ITEM.get(cfg.sampler.precision, 4)


def _count(bundles: list[Bundle]) -> str:
    if bundles[0].role == "learner":
        others = f" and {len(bundles) - 1} ranks" if len(bundles) > 1 else ""
        return f"the process of the loop{others}"
    return f"{len(bundles)} actors" if len(bundles) > 1 else "1 actor"


def _reserved(bundles: list[Bundle]) -> str:
    return f"{'each ' if len(bundles) > 1 else ''}{bundles[0].cpus:g} CPUs and {bundles[0].gpus:g} GPUs"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count > 1e8 else f"{count / 1e6:.3g} MB"


def _holds(cfg: RunConfig, bundles: list[Bundle], student: Size, teachers: Mapping[str, Size]) -> str:
    """What each process holds of weights and optimiser."""
    bundle = bundles[0]
    each: float | None
    if bundle.role == "learner":
        held = ADAM_BYTES if cfg.learner.trains_all else 4
        each = None if student.parameters is None else student.parameters * held / len(bundles)
    elif bundle.role == "sampler":
        each = weight_bytes(cfg, student)
    else:
        each = teachers[bundle.name].stored_bytes if bundle.name in teachers else None
    if each is None:
        return ""
    return f", {_size(each)} of weights{' and optimiser' if bundle.role == 'learner' else ''}"


def _traffic(
    cfg: RunConfig, cluster: Cluster, student: Size, teachers: Mapping[str, Size], positions: int
) -> Iterator[str]:
    """What a step sends, at most."""
    sent = weight_bytes(cfg, student)
    roles = {bundle.role for bundle in cluster.bundles}
    if "sampler" in roles:
        what = "weights" if sent is None else f"{_size(sent)} of weights"
        yield f"a step sends {what} to each machine with samplers"
    for table in sorted({bundle.name for bundle in cluster.bundles if bundle.role == "teacher"}):
        size = teachers.get(table)
        if size is None or size.shape is None or size.stored_bytes is None or not size.parameters:
            yield f"teacher '{table}' sends its hidden states"
            continue
        row = size.shape.width * max(1, round(size.stored_bytes / size.parameters))
        yield (f"teacher '{table}' sends {row / 1e3:.3g} kB a position, at most {_size(row * positions)}")
    if "sampler" not in roles and "teacher" not in roles:
        yield "only between the learner's ranks"
