"""Check that the task stores the answers and references that the parts of a run read."""

from __future__ import annotations

from collections.abc import Sequence

from reflux.config.recipe import RunConfig
from reflux.errors import DataError
from reflux.evals.problems import problems
from reflux.evals.prompt_difficulty import FIRST, training_prompts
from reflux.tasks.jsonl import COMPARES
from reflux.types import Prompt


def stored(cfg: RunConfig) -> None:
    """DataError if the sampler trains on references and a training prompt has none, if it reads attempts that
    this run cannot train on, or if a part takes the verdicts of a grader that compares with stored answers,
    and none of the prompts has an answer.
    """
    if cfg.sampler.reads_references:
        _refuse_unreferenced(_trained(cfg))
    elif cfg.task.stored_answers is not None:
        # Reading them finds a prompt without answers.
        _trained(cfg)
    for name, reward in cfg.rewards.items():
        if reward.references_needed:
            _refuse_few_references(f"rewards.{name}", reward.references_needed, _trained(cfg))
    cfg.sampler.check_stored(cfg)
    if cfg.task.judge not in COMPARES:
        return
    for name, evaluation in cfg.evals.items():
        if evaluation.verifies and evaluation.split is not None:
            _refuse_unanswered(
                f"evals.{name}", cfg, evaluation.split, list(problems(cfg.task, evaluation.split))
            )
    for name, reward in cfg.rewards.items():
        if reward.verifies:
            _refuse_unanswered(f"rewards.{name}", cfg, "train", _trained(cfg))


def _trained(cfg: RunConfig) -> list[Prompt]:
    """The different prompts that the run trains on. Of a task that always makes new ones, the first."""
    count = max(1, cfg.steps * cfg.prompts_per_step)
    whole = cfg.task.ends or cfg.task.stored_answers is not None
    return training_prompts(cfg.task, cfg.seed, count if whole else min(count, FIRST))[0]


def _refuse_unreferenced(prompts: Sequence[Prompt]) -> None:
    if without := [prompt.id for prompt in prompts if not prompt.references]:
        raise DataError(
            f"the sampler trains on the references of the prompts, and {len(without)} of {len(prompts)} "
            f"training prompts have none (the first is {without[0]}). Name their column, for example "
            'task.keys = {references = "completion"}, or leave these prompts out.'
        )


def _refuse_few_references(where: str, needed: int, prompts: Sequence[Prompt]) -> None:
    if few := [prompt for prompt in prompts if len(prompt.references) < needed]:
        raise DataError(
            f"{where} needs {needed} answers of the teacher to each prompt, and {len(few)} of {len(prompts)} "
            f"training prompts have fewer: {few[0].id} has {len(few[0].references)}. Name their column, "
            'for example task.keys = {references = "completion"}, or store answers with `reflux answers`, or '
            f"lower {where}.references. The reward `rubric` may also ask during the run ({where}.teacher)."
        )


def _refuse_unanswered(where: str, cfg: RunConfig, split: str, prompts: Sequence[Prompt]) -> None:
    if all(prompt.answer is None for prompt in prompts):
        raise DataError(
            f"{where}: the grader '{cfg.task.judge}' compares with stored answers, and no prompt of the "
            f"split '{split}' has one. Name their column, for example task.keys = {{answer = \"solution\"}}, "
            f"or remove this part with {where}=none."
        )
