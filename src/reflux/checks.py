"""One function joins the parts: it refuses what does not fit, in sentences, before any weight is loaded.

Teachers declare what they offer, objectives what they accept, credit what it wants. Each check below is a sentence a user can act on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from reflux.config import RunConfig
from reflux.errors import ConfigError, DataError
from reflux.models import locate
from reflux.objectives.base import Objective
from reflux.objectives.divergence import Divergence
from reflux.objectives.outcome import Outcome
from reflux.objectives.sampled_kl import GROUP_BASELINES, SampledKL
from reflux.parts import kind_of
from reflux.schedules import at
from reflux.teachers.base import spoken_name
from reflux.types import HiddenTarget, SampledTarget, Target, TopKTarget, Wants

_SAID = {
    HiddenTarget: "hidden states (the full distribution)",
    TopKTarget: "a top-k list",
    SampledTarget: "the sampled token's log-prob",
}


def join(cfg: RunConfig) -> Wants:
    """What the assembled parts want computed. Raises ConfigError with every problem found, one a line."""
    problems = list(_problems(cfg))
    if problems:
        raise ConfigError("\n".join(problems))
    speakers = [*cfg.objectives, *cfg.credit.values()]
    return reduce(lambda joined, part: joined | part.wants, speakers, Wants(reward=cfg.reward is not None))


def _problems(cfg: RunConfig) -> Iterator[str]:
    yield from _lengths(cfg)
    yield from _teachers(cfg)
    for index, objective in enumerate(cfg.objectives):
        yield from _objective(cfg, f"objectives[{index}]", objective)
    yield from _shifts(cfg)
    yield from _groups(cfg)
    yield from _variance(cfg)
    yield from _sampling(cfg)


def _lengths(cfg: RunConfig) -> Iterator[str]:
    for step in range(cfg.steps):
        length = at(cfg.sampler.max_tokens, step)
        if length < 1:
            yield f"sampler.max_tokens is {length:g} at step {step}; an attempt needs at least 1 token. Start the schedule at 1 or more."
            return


def _teachers(cfg: RunConfig) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for table, teacher in cfg.teachers.items():
        names.setdefault(spoken_name(table, teacher), []).append(table)
        if teacher.context.min_group > cfg.group_size:
            yield (
                f"teachers.{table}.context needs at least {teacher.context.min_group} attempts per prompt, but group_size is "
                f"{cfg.group_size}. Raise group_size."
            )
    for name, tables in names.items():
        routes = [route for table in tables for route in cfg.teachers[table].routes]
        if len(tables) > 1 and (len(set(routes)) < len(routes) or any(not cfg.teachers[table].routes for table in tables)):
            yield f"teachers {', '.join(tables)} all answer as '{name}', so each needs routes of its own, none of them shared."


def offered(cfg: RunConfig, name: str) -> set[type[Target]]:
    """What the tables behind a teacher name all offer; "said" is what the sampler recorded."""
    if name == "said":
        return {TopKTarget, SampledTarget}
    tables = [teacher for table, teacher in cfg.teachers.items() if spoken_name(table, teacher) == name]
    return set.intersection(*(set(teacher.offers) for teacher in tables)) if tables else set()


def _objective(cfg: RunConfig, where: str, objective: Objective) -> Iterator[str]:
    if objective.teacher is None:
        return
    known = sorted({spoken_name(table, teacher) for table, teacher in cfg.teachers.items()})
    if objective.teacher != "said" and objective.teacher not in known:
        yield (
            f"{where}.teacher: there is no teacher '{objective.teacher}'. "
            + (
                f"Known: {', '.join(known)}, and 'said' (the student as it acted)."
                if known
                else f"Add a [teachers.{objective.teacher}] table."
            )
        )
        return
    offers = offered(cfg, objective.teacher)
    if not offers & set(objective.accepts):
        kinds = ", ".join(_SAID[kind] for kind in objective.accepts if kind in _SAID)
        said = ", ".join(_SAID[kind] for kind in sorted(offers, key=str) if kind in _SAID)
        yield (
            f"{where}: {_called(objective)} needs {kinds}, but teacher '{objective.teacher}' offers {said or 'nothing'}. "
            f"{_remedy(objective)}, or a local teacher."
        )


def _called(objective: Objective) -> str:
    """An objective's kind, with the field that decides what it needs of its teacher."""
    kind = kind_of("objectives", objective)
    if isinstance(objective, SampledKL) and objective.baseline != "none":
        return f'{kind} with baseline = "{objective.baseline}"'
    if isinstance(objective, Divergence) and objective.support != "full":
        return f'{kind} with support = "{objective.support}"'
    return kind


def _remedy(objective: Objective) -> str:
    if isinstance(objective, SampledKL):
        return 'Use baseline = "none", or "leave_one_out" in groups'
    return 'Use support = "teacher" where the teacher gives a list, kind = "sampled_kl" where it gives log-probs'


def _shifts(cfg: RunConfig) -> Iterator[str]:
    takers = [objective for objective in cfg.objectives if objective.takes_shift]
    rules = [name for name, rule in cfg.credit.items() if rule.shifts]
    if rules and not takers:
        kinds = ", ".join(f"'{kind_of('objectives', objective)}'" for objective in cfg.objectives)
        yield (
            f"credit.{rules[0]} shifts advantages, but no objective takes a shift: {kinds} differentiates its cost itself.\n"
            f'    Use kind = "sampled_kl", or add a second [[objectives]] with kind = "outcome".'
        )
    for index, objective in enumerate(cfg.objectives):
        if objective.takes_shift and objective.teacher is None and not rules:
            yield (
                f"objectives[{index}]: {kind_of('objectives', objective)} learns from shifts alone, and no credit rule gives any. "
                f"Add [credit.outcome] and a [reward]."
            )


def _groups(cfg: RunConfig) -> Iterator[str]:
    for name, rule in cfg.credit.items():
        if rule.min_group > cfg.group_size:
            yield f"credit.{name} compares attempts at one prompt: it needs group_size >= {rule.min_group}, got {cfg.group_size}."
        if rule.wants.reward and cfg.reward is None:
            yield f'credit.{name} needs verdicts: add [reward] with kind = "verifier".'
    for index, objective in enumerate(cfg.objectives):
        if isinstance(objective, SampledKL) and objective.baseline in GROUP_BASELINES and cfg.group_size < 2:
            yield (
                f'objectives[{index}]: baseline = "{objective.baseline}" compares attempts at one prompt: it needs group_size >= 2, got '
                f'{cfg.group_size}. Raise group_size, or use baseline = "kl", which needs no siblings.'
            )


def _variance(cfg: RunConfig) -> Iterator[str]:
    if not cfg.log_variance:
        return
    sampled = [(index, objective) for index, objective in enumerate(cfg.objectives) if isinstance(objective, SampledKL)]
    if not sampled:
        yield (
            'log_variance = true measures the noise of the sampled gradient, and no objective samples one. Use kind = "sampled_kl", or '
            "log_variance = false."
        )
    for index, objective in sampled:
        offers = offered(cfg, objective.teacher)
        if offers and HiddenTarget not in offers:
            yield (
                f"log_variance = true needs the whole distribution of every teacher a sampled_kl listens to, but objectives[{index}] "
                f"listens to '{objective.teacher}', which does not offer it. Use a local teacher, or log_variance = false."
            )


def _sampling(cfg: RunConfig) -> Iterator[str]:
    sampler = cfg.sampler
    kind = kind_of("samplers", sampler)
    biased = sampler.temperature != 1 or sampler.top_p != 1
    if biased and sampler.on_policy and not sampler.allow_biased:
        yield (
            f"sampler.temperature = {sampler.temperature:g} and top_p = {sampler.top_p:g}: attempts from another distribution than the "
            f"student's own make on-policy estimators biased. Use 1 and 1, or say sampler.allow_biased = true."
        )
    for index, objective in enumerate(cfg.objectives):
        name = f"objectives[{index}]: {kind_of('objectives', objective)}"
        if objective.takes_shift and not sampler.on_policy:
            yield (
                f"{name} weighs tokens by the student's own probabilities, but sampler '{kind}' gives answers it did not draw. "
                f"Use nll or divergence."
            )
        if isinstance(objective, Divergence) and objective.ratio != "none" and not sampler.on_policy:
            yield (
                f"{name} with ratio = \"{objective.ratio}\" divides by the probability the sampler drew with, but sampler '{kind}' gives "
                f'answers it did not draw. Use ratio = "none".'
            )
        if isinstance(objective, SampledKL | Outcome) and cfg.max_lag and objective.ratio == "none":
            yield (
                f'{name} with ratio = "none" is biased on attempts of an older student, and max_lag is {cfg.max_lag}. '
                f'Use ratio = "truncated".'
            )
        if objective.teacher is None and not objective.takes_shift and sampler.on_policy:
            yield f"{name} on the student's own attempts has an expected gradient of zero. Use sampler 'stored', or another objective."
    if not sampler.on_policy and "prefix" in {kind_of("credit", rule) for rule in cfg.credit.values()}:
        yield "credit.prefix: cutting answers the student did not write teaches it never to end (arXiv 2602.15260). Use sampler 'hf'."


def inputs(cfg: RunConfig) -> None:
    """What a run reads is there, as far as can be told without loading it: asked before its directory is made.

    Raises ModelError for a folder that is none, DataError for an evaluation with nothing to ask.
    """
    for name, part in {"learner": cfg.learner, **{f"teachers.{table}": teacher for table, teacher in cfg.teachers.items()}}.items():
        if "model" in vars(part):
            locate(part.model, f"{name}.model")
    for name, evaluation in cfg.evals.items():
        if next(cfg.task.prompts(evaluation.split, 0), None) is None:
            raise DataError(
                f"evals.{name}: the task has no prompts in its split '{evaluation.split}'; choose another split, or evals.{name}=none"
            )


def warnings(cfg: RunConfig) -> list[str]:
    """What works but is seldom meant."""
    found = []
    used = {objective.teacher for objective in cfg.objectives}
    for table, teacher in cfg.teachers.items():
        if spoken_name(table, teacher) not in used:
            found.append(f"teachers.{table} is asked, but no objective listens to it; only metrics will.")
    found += [text for index, objective in enumerate(cfg.objectives) for text in _seldom(cfg, f"objectives[{index}]", objective)]
    shortest = min((at(cfg.sampler.max_tokens, step) for step in range(cfg.steps)), default=0)
    if cfg.reward is not None and shortest < cfg.longest:
        found.append(
            f"a reward is given while training answers may be cut at {shortest:g} tokens: the verifier will see unfinished answers."
        )
    return found


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
    if objective.teacher == "said" and not cfg.max_lag and not shifted:
        yield f"{where} listens to 'said' at max_lag = 0: the student as it acted is the student of now, so it teaches nothing."
    if isinstance(objective, SampledKL) and objective.baseline == "group_mean":
        yield f'{where}: baseline = "group_mean" counts the attempt itself, which shrinks and turns the gradient; "leave_one_out" does not.'
    if isinstance(objective, Divergence) and objective.tail == "renormalised":
        yield f'{where}: tail = "renormalised" drops the mass outside the list, so the optimum moves; tail = "bucket" keeps it.'
    if isinstance(objective, Divergence) and objective.ratio != "none" and not cfg.max_lag:
        yield f'{where}: ratio = "{objective.ratio}" at max_lag = 0 is 1 up to rounding; ratio = "none" is the same for less.'
