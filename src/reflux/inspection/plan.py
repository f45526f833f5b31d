"""The plan of a run: models, memory, positions and FLOP. It is computed from config.json and file headers,
without torch and without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reflux import checks
from reflux.checks import lengths
from reflux.config.recipe import RunConfig, config_hash
from reflux.config.requirements import Requirements
from reflux.inspection.cluster_plan import ADAM_BYTES, placed
from reflux.inspection.working_memory import WorkingMemory, working_memory
from reflux.metrics.values import step_flops
from reflux.models.sizes import Size, size_of
from reflux.storage.summary import method_of
from reflux.teachers.base import alias_of
from reflux.types import FlowRollout

_FROZEN_BYTES = 4
# each field of Requirements, described for users; {} is replaced by its value
_WANTED = {
    "behaviour": "the student's top-{} tokens at sampling",
    "now_at_behaviour": (
        "the current student's log-probs at the top tokens of `behaviour` (one more pass of the student)"
    ),
    "now_topk": "the current student's top-{} tokens (one more pass of the student)",
    "logp": "the teacher's log-probs when attempts arrive (one more pass through its head)",
    "candidates": "the teacher's log-probs at the student's top-{} tokens",
    "now_candidates": (
        "the teacher's log-probs at the current student's top-{} tokens (one more pass through its head)"
    ),
    "supervision_drift": "the teacher's KL to its previous answer, where its context has changed since",
    "spans": "which characters each token wrote",
    "specials": "which tokens are special",
    "reward": "a reward for every attempt",
}
_WANTED_OF_FLOWS = {
    "behaviour": "the student's velocities at sampling",
    "now_at_behaviour": "the current student's velocities at the same states (one more pass of the student)",
    "supervision_drift": "the teacher's distance to its previous velocities, where its context has changed",
    "reward": "a reward for every attempt",
}


@dataclass(frozen=True)
class Plan:
    recipe: str
    method: str
    config_hash: str
    steps: int
    attempts_per_step: int
    student: Size
    teachers: dict[str, Size]
    # bytes of weights, optimiser, the sampler's copy and the teachers, without activations; None if not known
    memory_bytes: int | None
    # what a run of texts takes besides, on a GPU and on a CPU; empty if not known
    working: list[WorkingMemory]
    # the memory of a server that samples; "" without one
    server_memory: str
    # the lowest and the highest length limit of a training attempt, over all steps
    training_positions: tuple[int, int]
    # the length limit of an attempt of an evaluation or of extrapolation's score
    evaluation_positions: int
    # the most positions of all training attempts of all steps together
    positions_at_most: int
    # the name of a position: "token" or "denoising step"
    position: str
    flops_at_most: float | None
    requirements: list[str]
    warnings: list[str]
    # the processes of a cluster and its traffic: lines of a name and a text; empty without a cluster
    cluster: list[tuple[str, str]]


def plan(cfg: RunConfig) -> Plan:
    """The plan of a run. Raises ConfigError or ModelError if the recipe cannot run."""
    requirements = checks.join(cfg)
    checks.models(cfg)
    if cfg.task.local:
        # raises an error if the task's file is missing or malformed
        next(cfg.task.prompts("train", cfg.seed, 0))
    pixels = cfg.sampler.generation.pixels
    student = size_of(cfg.learner.model, "learner.model", pixels, cfg.learner.student.base_model)
    sizes = {
        name: teacher.size(f"teachers.{name}", student, pixels) for name, teacher in cfg.teachers.items()
    }
    teachers = {name: size for name, size in sizes.items() if size is not None}
    attempts = cfg.prompts_per_step * cfg.group_size
    limits = [cfg.draw(step).max_positions for step in range(cfg.steps)]
    positions = sum(attempts * limit for limit in limits)
    flows = cfg.task.rollouts is FlowRollout
    return Plan(
        recipe=cfg.recipe,
        method=method_of(cfg),
        config_hash=config_hash(cfg),
        steps=cfg.steps,
        attempts_per_step=attempts,
        student=student,
        teachers=teachers,
        memory_bytes=_memory(student, _held(cfg, teachers), full=cfg.learner.trains_all),
        working=[
            found
            for gpu in (True, False)
            if (found := working_memory(cfg, student, max(limits, default=0), gpu)) is not None
        ],
        server_memory=cfg.sampler.server_memory,
        training_positions=(min(limits, default=0), max(limits, default=0)),
        evaluation_positions=cfg.evaluation_positions,
        positions_at_most=positions,
        position="denoising step" if flows else "token",
        flops_at_most=_flops(
            cfg,
            student,
            teachers,
            int(positions * cfg.sampler.computed_share),
            requirements.now_at_behaviour or bool(requirements.now_topk),
        ),
        requirements=wanted(requirements, _WANTED_OF_FLOWS if flows else _WANTED),
        warnings=[*checks.warnings(cfg), *lengths.cut_by_window(cfg, student.context_tokens)],
        cluster=[]
        if cfg.cluster is None
        else list(placed(cfg, cfg.cluster, student, teachers, attempts * max(limits, default=0))),
    )


def wanted(requirements: Requirements, words: Mapping[str, str] = _WANTED) -> list[str]:
    """Descriptions of the quantities in `requirements`, which are computed in addition to the loss. words:
    the description of each field.
    """
    values = ((name, getattr(requirements, name)) for name in requirements.__slots__)
    return [words[name].format(value) for name, value in values if value]


def _held(cfg: RunConfig, teachers: dict[str, Size]) -> list[Size]:
    """The models whose weights the teachers hold. A model that several teachers share is counted once."""
    shared = {size.name: size for table, size in teachers.items() if cfg.teachers[table].shares_weights}
    return [
        *shared.values(),
        *(size for table, size in teachers.items() if not cfg.teachers[table].shares_weights),
    ]


def _memory(student: Size, teachers: list[Size], full: bool) -> int | None:
    """Bytes of all weights and the optimiser; None if a size is not known. full: all weights are trained.
    Otherwise adapters train about a hundredth of the weights, and only the frozen float32 weights
    are counted.
    """
    known = [size.stored_bytes for size in (student, *teachers)]
    if student.parameters is None or any(count is None for count in known):
        return None
    weights = student.parameters * (ADAM_BYTES if full else _FROZEN_BYTES) + sum(
        count for count in known if count
    )
    return weights + max(size.beside_bytes for size in (student, *teachers))


def _flops(
    cfg: RunConfig, student: Size, teachers: dict[str, Size], positions: int, observed: bool
) -> float | None:
    """FLOP of the run if all attempts have their full length; None if a size is not known. This is an
    upper bound, except that the prompts of texts are not counted. observed: the student runs over all
    positions once more.
    """
    by_name: dict[str, list[int]] = {}
    for table, size in teachers.items():
        if size.macs is not None:
            by_name.setdefault(alias_of(table, cfg.teachers[table]), []).append(size.macs)
    if student.macs is None or len(teachers) != sum(map(len, by_name.values())):
        return None
    read_by = sum(sum(counts) // len(counts) for counts in by_name.values())
    return (
        sum(step_flops(student.macs, read_by, 0, positions, positions).values())
        + 2.0 * student.macs * positions * observed
    )
