"""README.md of an exported student: its origin, its training and the papers to cite."""

from __future__ import annotations

from collections.abc import Iterable

from reflux.config.papers import Paper
from reflux.config.recipe import RunConfig, config_hash
from reflux.storage.summary import commit, method_of
from reflux.types import FlowRollout


def model_card(cfg: RunConfig, step: int, papers: Iterable[Paper]) -> str:
    """The model card in the hub's format: a YAML header, then Markdown. step: the number of optimiser steps.
    papers: those to cite. Names from the recipe are quoted as code, so they never act as markup.
    """
    teachers = [_code(name) for teacher in cfg.teachers.values() for name in teacher.sources]
    teachers += ["itself"] * any(teacher.is_student for teacher in cfg.teachers.values())
    draws = cfg.learner.rollouts is FlowRollout
    lines = [
        "---",
        f"library_name: {'diffusers' if draws else 'transformers'}",
        f"pipeline_tag: {'text-to-image' if draws else 'text-generation'}",
        "tags: [distillation, reflux]",
        "---",
        f"# A student of the recipe {_code(cfg.recipe)}",
        "",
        f"- method: {_code(method_of(cfg))}, after {step} of {cfg.steps} optimiser steps",
        f"- started from: {_code(cfg.learner.model)}",
        f"- taught by: {', '.join(teachers) or 'no teacher'}",
        *(
            [f"- every prompt ends with: {_code(repr(suffix))}"]
            if (suffix := cfg.learner.student.prompt_suffix)
            else []
        ),
        f"- config {config_hash(cfg)}, seed {cfg.seed}, library commit "
        f"{commit() or 'of an installed package'}",
        "",
        "The licences of the models it started from and was taught by apply to it.",
        "",
        "```bibtex",
        *(paper.bibtex for paper in papers),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"
