"""What works but is seldom meant."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.accelerators.extrapolate import Extrapolate
from reflux.checks import lengths
from reflux.checks.teachers import tables_of
from reflux.config import RunConfig
from reflux.contexts.same import Same
from reflux.credit.balance import Balance
from reflux.credit.margin import Margin
from reflux.objectives.base import Objective
from reflux.objectives.divergence import Divergence
from reflux.objectives.outcome import Outcome
from reflux.objectives.sampled_kl import SampledKL
from reflux.objectives.velocity_kl import VelocityKL
from reflux.samplers.drawn import Drawn
from reflux.teachers.base import Teacher, spoken_name
from reflux.teachers.flow import Flow as FlowTeacher
from reflux.teachers.own import Own
from reflux.types import Draw


def warnings(cfg: RunConfig) -> list[str]:
    """What works but is seldom meant."""
    found = []
    used = {objective.teacher for objective in cfg.objectives}
    for table, teacher in cfg.teachers.items():
        if spoken_name(table, teacher) not in used and not isinstance(cfg.sampler, Drawn):  # which draws with them
            found.append(f"teachers.{table} is asked, but no objective listens to it; only metrics will.")
        found += _mute(f"teachers.{table}", teacher)
    for name, rule in cfg.credit.items():
        if isinstance(rule, Margin) and rule.student == "behaviour" and cfg.max_lag:
            found.append(
                f'credit.{name}: student = "behaviour" compares with the student as it was up to {cfg.max_lag} steps ago; see "now".'
            )
        if isinstance(rule, Balance) and rule.ratio != "none" and cfg.normalise == "kept":
            found.append(f'credit.{name} under normalise = "kept": the attempts that stay count for more; see "rollout_means".')
    if isinstance(cfg.accelerator, Extrapolate) and not cfg.accelerator.tries:
        found.append("accelerator.tries = 0: it never jumps.")
    found += [text for index, objective in enumerate(cfg.objectives) for text in _seldom(cfg, f"objectives[{index}]", objective)]
    return [*found, *_two_scales(cfg), *_heard_twice(cfg), *_left_to_others(cfg), *lengths.warnings(cfg)]


def _mute(where: str, teacher: Teacher) -> Iterator[str]:
    """A teacher that says what the student says anyway."""
    if isinstance(teacher, Own) and isinstance(teacher.context, Same) and teacher.follows:
        yield f"{where} follows the student and is shown nothing more: where the student begins, nothing ever moves. Give it a context."


def _unused(objective: Objective) -> Iterator[tuple[str, str]]:
    """(field, why it does nothing here) of fields that were given a value."""
    if isinstance(objective, Divergence):
        listed, truncated = objective.support != "full", objective.ratio == "truncated"
        idle = {"k": (listed, "support = 'full'"), "ratio_cap": (truncated, "ratio = 'none'")}
    elif isinstance(objective, SampledKL):
        by_baseline, by_ratio = f"baseline = '{objective.baseline}'", f"ratio = '{objective.ratio}'"
        idle = {"baseline_k": (objective.baseline == "topk_kl", by_baseline), "ratio_cap": (objective.ratio == "truncated", by_ratio)}
        idle["clip"] = (objective.ratio == "clip", by_ratio)
    else:
        return
    plain = type(objective)()
    for name, (at_work, beside) in idle.items():
        if not at_work and getattr(objective, name) != getattr(plain, name):
            yield name, beside


def _seldom(cfg: RunConfig, where: str, objective: Objective) -> Iterator[str]:
    """What an objective of the menu does that its user may not expect."""
    for name, beside in _unused(objective):
        yield f"{where}.{name} does nothing beside {beside}."
    shifted = objective.takes_shift and any(rule.shifts for rule in cfg.credit.values())
    if objective.teacher == "said" and cfg.sampler.on_policy and not cfg.max_lag and not shifted:
        yield f"{where} listens to 'said' at max_lag = 0: the student as it acted is the student of now, so it teaches nothing."
    if isinstance(objective, SampledKL) and objective.baseline == "group_mean":
        yield f'{where}: baseline = "group_mean" counts the attempt itself, which shrinks and turns the gradient; "leave_one_out" does not.'
    if isinstance(objective, SampledKL | Outcome) and cfg.sampler.on_policy:
        yield from _drawn_elsewhere(cfg.draw(0), where, objective)
    if isinstance(objective, Divergence) and objective.tail == "renormalised":
        yield f'{where}: tail = "renormalised" drops the mass outside the list, so the optimum moves; tail = "bucket" keeps it.'
    if isinstance(objective, Divergence) and objective.ratio != "none" and not cfg.max_lag:
        yield f'{where}: ratio = "{objective.ratio}" at max_lag = 0 is 1 up to rounding; ratio = "none" is the same for less.'


def _drawn_elsewhere(draw: Draw, where: str, objective: SampledKL | Outcome) -> Iterator[str]:
    """What a ratio does to attempts of another distribution than the student's own."""
    if draw.temperature == 1 and draw.top_p == 1:
        return
    at, usual = f"temperature = {draw.temperature:g} and top_p = {draw.top_p:g}", "clip" if isinstance(objective, Outcome) else "truncated"
    if objective.ratio == "none":
        yield f'{where}: ratio = "none" does not correct for attempts drawn at {at}; ratio = "{usual}" does, within its bound.'
    if objective.ratio == "clip":
        yield (
            f'{where}: at {at} the ratio p(a) / behaviour(a) is not near 1 even at the first step, so ratio = "clip" takes the gradient '
            f"of many tokens away; ratio_outside_share says how many."
        )


def _two_scales(cfg: RunConfig) -> Iterator[str]:
    """A KL times |dt| / D beside one in nats: their coefs do not compare."""
    released = [isinstance(objective, VelocityKL) and objective.scale == "released" for objective in cfg.objectives]
    if any(released) and not all(released):
        yield (
            f'objectives[{released.index(True)}]: scale = "released" is the KL times |dt| / D, and objectives[{released.index(False)}] '
            f"beside it is not: their coefs do not compare. Use one scale for all."
        )


def _heard_twice(cfg: RunConfig) -> Iterator[str]:
    """An anchor that is also the teacher of a prompt counts twice there (allowed: it then weighs 1 + beta)."""
    flows = [objective for objective in cfg.objectives if isinstance(objective, VelocityKL) and objective.coef]
    for index, first in enumerate(flows):
        for second in flows[index + 1 :]:
            ours, theirs = _models(cfg, first.teacher), _models(cfg, second.teacher)
            for table in (table for table, model in ours.items() if model in theirs.values()):
                yield (
                    f"teachers.{table} is the model of '{second.teacher}' too: on its prompts that teacher weighs {first.coef:g} + "
                    f"{second.coef:g}."
                )


def _left_to_others(cfg: RunConfig) -> Iterator[str]:
    """Routes on which one objective has no word and another has (where none has, `checks` refuses)."""
    for index, objective in enumerate(cfg.objectives):
        served = [cfg.teachers[table].routes for table in tables_of(cfg, objective.teacher or "")]
        if not served or not all(served):
            continue
        missing = (cfg.task.routes or frozenset()) - {route for routes in served for route in routes}
        if missing:
            names = ", ".join(sorted(f"'{route}'" if route else "(none)" for route in missing))
            yield f"objectives[{index}]: no table of '{objective.teacher}' serves the route {names}, so others alone teach those prompts."


def _models(cfg: RunConfig, name: str) -> dict[str, tuple[str, str | None]]:
    """The weights behind a teacher name, by table."""
    tables = {table: cfg.teachers[table] for table in tables_of(cfg, name)}
    return {table: (one.model, one.adapter) for table, one in tables.items() if isinstance(one, FlowTeacher)}
