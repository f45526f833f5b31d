"""Rules about text and images: all parts of a run handle the same kind of attempt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reflux.config.recipe import RunConfig
from reflux.config.registry import kind_of
from reflux.samplers.flow import without_noise
from reflux.types import FlowRollout, Rollout, TokenRollout

_MADE: dict[type[Rollout], str] = {TokenRollout: "texts", FlowRollout: "images"}
_USUAL: dict[type[Rollout], dict[str, str]] = {
    TokenRollout: {"samplers": "hf", "learners": "hf", "teachers": "local"},
    FlowRollout: {"samplers": "flow", "learners": "flow", "teachers": "flow"},
}
# the fields of Requirements that only a text model can provide, described for error messages
_WORDS = {
    "now_topk": "the student's likeliest tokens",
    "logp": "the teacher's log-probs of tokens",
    "now_candidates": "the teacher's log-probs at the current student's likeliest tokens",
    "candidates": "the teacher's log-probs at the student's likeliest tokens",
    "spans": "the characters that each token wrote",
    "specials": "the special tokens",
}


def problems(cfg: RunConfig) -> Iterator[str]:
    yield from _one_kind(cfg)
    if cfg.task.rollouts is FlowRollout:
        yield from _of_texts(cfg)
        yield from _without_noise(cfg)


def _one_kind(cfg: RunConfig) -> Iterator[str]:
    """The sampler, the learner and the teachers must handle the kind of attempt that the task judges."""
    made = cfg.task.rollouts
    parts: dict[str, tuple[str, Any]] = {
        "sampler": ("samplers", cfg.sampler),
        "learner": ("learners", cfg.learner),
    }
    parts |= {f"teachers.{table}": ("teachers", teacher) for table, teacher in cfg.teachers.items()}
    odd = {where: (group, part) for where, (group, part) in parts.items() if part.rollouts is not made}
    if not odd:
        return
    task = f"task '{kind_of('tasks', cfg.task)}' asks for {_MADE.get(made, made.__name__)}"
    named = ", ".join(f"{where} ('{kind_of(group, part)}')" for where, (group, part) in odd.items())
    if len(odd) == len(parts):
        yield f"{task}, and no other part supports those: {named}. Choose another task, or another base."
        return
    usual = _USUAL.get(made, {})
    kinds = [f'{where}.kind = "{usual[group]}"' for where, (group, _) in odd.items() if group in usual]
    yield f"{task}, which {named} cannot handle. Use {', '.join(kinds) or 'other kinds for these parts'}."


def _of_texts(cfg: RunConfig) -> Iterator[str]:
    """Refuse parts that require quantities that only a text model has, if the run makes images."""
    speakers: dict[str, tuple[str, Any]] = {
        f"objectives[{i}]": ("objectives", one) for i, one in enumerate(cfg.objectives)
    }
    speakers |= {f"credit.{name}": ("credit", rule) for name, rule in cfg.credit.items()}
    speakers |= {
        f"teachers.{table}.context": ("contexts", teacher.context) for table, teacher in cfg.teachers.items()
    }
    for where, (group, part) in speakers.items():
        needed = [words for field, words in _WORDS.items() if getattr(part.requirements, field)]
        name = f"{where} ('{kind_of(group, part)}')"
        if group == "contexts" and part.adds_words:
            yield f"{name} adds text to the teacher's prompt, and image attempts have no text. Use 'same'."
        elif needed:
            yield f"{name} needs {' and '.join(needed)}, and image attempts have none. Remove it."


def _without_noise(cfg: RunConfig) -> Iterator[str]:
    """Denoising steps without noise have no density, so no importance ratio is defined for them. For samplers
    that are not on-policy, `sampling` reports the problem.
    """
    why = without_noise(cfg) if cfg.sampler.on_policy else ""
    for index, objective in enumerate(cfg.objectives):
        if why and objective.takes_advantage_offset:
            yield (
                f"objectives[{index}]: {why}, so {kind_of('objectives', objective)} has no log-probs to "
                "work with. Use a noise_level above 0, such as 0.7."
            )
