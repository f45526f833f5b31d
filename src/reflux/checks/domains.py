"""Texts and pictures: the parts of a run deal with attempts of one kind, and a picture has no words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reflux.accelerators.extrapolate import Extrapolate
from reflux.config import RunConfig
from reflux.contexts.peers import Peers
from reflux.contexts.privileged import Privileged
from reflux.objectives.nll import NLL
from reflux.objectives.velocity_kl import VelocityKL
from reflux.parts import kind_of
from reflux.samplers.drawn import Drawn, drawers, flow_sampler
from reflux.teachers.flow import Flow as FlowTeacher
from reflux.types import FlowRollout, Rollout, TokenRollout

_MADE: dict[type[Rollout], str] = {TokenRollout: "texts", FlowRollout: "pictures"}
_USUAL: dict[type[Rollout], dict[str, str]] = {
    TokenRollout: {"samplers": "hf", "learners": "hf", "teachers": "local"},
    FlowRollout: {"samplers": "flow", "learners": "flow", "teachers": "flow"},
}
_WORDS = {  # the fields of Wants that only a model of texts can give
    "now_topk": "the student's likeliest tokens",
    "logp": "the teacher's log-probs of tokens",
    "candidates": "the teacher's log-probs at tokens the student lists",
    "spans": "the characters that tokens wrote",
}


def problems(cfg: RunConfig) -> Iterator[str]:
    yield from _one_kind(cfg)
    if cfg.task.rollouts is FlowRollout:
        yield from _of_texts(cfg)
        yield from _without_noise(cfg)
        yield from _scored_without_noise(cfg)
        yield from _guidance(cfg)
        yield from _who_draws(cfg)


def _one_kind(cfg: RunConfig) -> Iterator[str]:
    """What samples, learns and teaches deals with what the task can judge."""
    made = cfg.task.rollouts
    parts: dict[str, tuple[str, Any]] = {"sampler": ("samplers", cfg.sampler), "learner": ("learners", cfg.learner)}
    parts |= {f"teachers.{table}": ("teachers", teacher) for table, teacher in cfg.teachers.items()}
    odd = {where: (group, part) for where, (group, part) in parts.items() if part.rollouts is not made}
    if not odd:
        return
    task = f"task '{kind_of('tasks', cfg.task)}' asks for {_MADE.get(made, made.__name__)}"
    named = ", ".join(f"{where} ('{kind_of(group, part)}')" for where, (group, part) in odd.items())
    if len(odd) == len(parts):
        yield f"{task}, and no other part deals with those: {named}. Choose another task, or another base."
        return
    usual = _USUAL.get(made, {})
    remedy = ", ".join(f'{where}.kind = "{usual[group]}"' for where, (group, _) in odd.items() if group in usual)
    yield f"{task}, which {named} cannot deal with. Use {remedy or 'other kinds there'}."


def _of_texts(cfg: RunConfig) -> Iterator[str]:
    """Parts that want what only a model of texts has."""
    speakers: dict[str, tuple[str, Any]] = {f"objectives[{i}]": ("objectives", one) for i, one in enumerate(cfg.objectives)}
    speakers |= {f"credit.{name}": ("credit", rule) for name, rule in cfg.credit.items()}
    speakers |= {f"teachers.{table}.context": ("contexts", teacher.context) for table, teacher in cfg.teachers.items()}
    for where, (group, part) in speakers.items():
        needed = [words for name, words in _WORDS.items() if getattr(part.wants, name)]
        if isinstance(part, Peers | Privileged):
            yield f"{where} ('{kind_of(group, part)}') tells a teacher in words what others wrote, and pictures have none. Use 'same'."
        elif needed:
            yield f"{where} ('{kind_of(group, part)}') needs {' and '.join(needed)}, and pictures have none. Leave it out."
        if isinstance(part, NLL):
            yield (
                f"{where} ('nll') learns the tokens of given answers, and pictures have none. To learn from given pictures use kind = "
                f'"velocity_kl" with teacher = "said" and weight = "mse", and sampler.kind = "drawn".'
            )


def _without_noise(cfg: RunConfig) -> Iterator[str]:
    """Steps that were not drawn have no density: no divergence between them is finite, and no ratio of them is defined."""
    acting = flow_sampler(cfg)
    if acting is None:
        return
    given = isinstance(cfg.sampler, Drawn)
    if not given and acting.noise_level > 0:
        return
    why = "sampler 'drawn' gives states without noise" if given else "sampler.noise_level = 0 draws no step"
    remedy = "" if given else ", or a noise_level above 0, such as 0.7"
    for index, objective in enumerate(cfg.objectives):
        if isinstance(objective, VelocityKL) and objective.weight == "kl":
            yield f'objectives[{index}]: {why}, so the KL is infinite. Use weight = "mse"{remedy}.'
        if objective.takes_shift and not given:  # that a given picture was not drawn by the student is said by `sampling`
            yield (
                f"objectives[{index}]: {why}, so {kind_of('objectives', objective)} has no log-prob to weigh. Use a noise_level above 0, "
                f"such as 0.7."
            )


def _scored_without_noise(cfg: RunConfig) -> Iterator[str]:
    acting, accelerator = flow_sampler(cfg), cfg.accelerator
    if acting is not None and not acting.noise_level and isinstance(accelerator, Extrapolate) and accelerator.score == "minus_kl":
        where = "sampler.generate" if isinstance(cfg.sampler, Drawn) else "sampler"
        yield (
            f'accelerator.score = "minus_kl" takes the KL of steps that were drawn, and {where}.noise_level = 0 draws none: it is '
            f'infinite. Use a noise_level above 0, such as 0.7, or score = "accuracy".'
        )


def _guidance(cfg: RunConfig) -> Iterator[str]:
    """Student and teachers are compared at one guidance."""
    acting = flow_sampler(cfg)
    for table, teacher in cfg.teachers.items():
        if acting is None or not isinstance(teacher, FlowTeacher) or teacher.guidance is None:
            continue
        if teacher.guidance != acting.guidance:
            yield (
                f"teachers.{table}.guidance is {teacher.guidance:g}, but the student is sampled with guidance {acting.guidance:g}: one "
                f"guidance holds for student and teachers, in sampling and in the loss. Leave it out, or set both alike."
            )


def _who_draws(cfg: RunConfig) -> Iterator[str]:
    """Under sampler 'drawn' each route has one teacher that draws."""
    if not isinstance(cfg.sampler, Drawn):
        return
    for route in sorted(cfg.task.routes or [], key=str):
        tables = drawers(cfg.teachers, route)
        if len(tables) != 1:
            found = f"{' and '.join(tables)} could draw" if tables else "no teacher draws"
            yield (
                f"sampler 'drawn' has each prompt's picture drawn by the teacher of its route, and for the route {route!r} {found}. Give "
                f"one table of kind flow that route, or leave the others out."
            )
